"""What steps with guesses cost, in plain steps of the same batch: ratios, measured where the two meet.

A machine with other work is two or five times as slow for a while, and behind a draft a plain step finds its weights
gone from the caches. So a time by itself says little. Compared are steps with guesses and the plain ones just before
them: both in rows, without the first steps of a row, and not longer than the plain ones are good for.
"""

from __future__ import annotations

import bisect
import statistics
from collections import deque
from dataclasses import dataclass, field

_REMEMBERED = 9
_ENOUGH, _LEVEL = 3, 8
"""Plain steps that a level is made of: at least, and at most."""
_SETTLING = 2
"""Steps at the beginning of a row that tell nothing."""
_TELLING = 12
"""Steps behind plain ones that are compared with them."""
_CARRIED = 0.2


@dataclass
class Ratios:
    """Ratios by a count: the median of the latest ones; between counts that were seen, interpolated."""

    _known: dict[int, float] = field(default_factory=dict)
    _order: list[int] = field(default_factory=list)
    _latest: dict[int, deque[float]] = field(default_factory=dict)

    def add(self, count: int, ratio: float) -> None:
        """Take in one, but for the first of a count, in which targets work out what they will need again."""
        latest = self._latest.get(count)
        if latest is None:
            self._latest[count] = deque(maxlen=_REMEMBERED)
            return
        if not latest:
            bisect.insort(self._order, count)
        latest.append(ratio)
        self._known[count] = statistics.median_low(latest)

    def get(self, count: int) -> float | None:
        """What is known of just this count."""
        return self._known.get(count)

    def wanted(self, count: int) -> bool:
        """Whether little is known of a count."""
        return len(self._latest.get(count, ())) < _REMEMBERED

    def nearest(self, count: int) -> int | None:
        """The count nearest to this one that was seen."""
        return min(self._order, key=lambda known: abs(known - count)) if self._order else None

    def at(self, count: int) -> float:
        """The ratio for a count; 1 before anything was seen."""
        if count in self._known:
            return self._known[count]
        at = bisect.bisect(self._order, count)
        if not self._order or at == 0:
            return 1.0
        low = self._order[at - 1]
        if at == len(self._order):
            return self._known[low]  # optimistic: what was never tried is worth trying
        high = self._order[at]
        share = (count - low) / (high - low)
        return self._known[low] + share * (self._known[high] - self._known[low])


@dataclass
class Costs:
    """Costs at batches of about one size.

    Attributes:
        steps: of a step by how many tokens each sequence has in it.
        drafts: of a draft by how many tokens each sequence gets.
        row: how many steps of one kind there have been since the last one of the other.
    """

    steps: Ratios = field(default_factory=Ratios)
    drafts: Ratios = field(default_factory=Ratios)
    _plain: deque[float] = field(default_factory=lambda: deque(maxlen=_LEVEL))
    _level: float | None = None
    row: int = 0
    _guesses: bool = False

    @property
    def known(self) -> bool:
        """Whether there is something to compare with."""
        return self._level is not None or len(self._plain) >= _ENOUGH

    @property
    def plain_ms(self) -> float | None:
        """A plain step as it was lately."""
        return statistics.median(self._plain) if self._plain else self._level

    def begin(self, guesses: bool) -> None:
        """The next step is one with guesses or without: it belongs to the row of those before it, or begins another."""
        if guesses == self._guesses:
            self.row += 1
            return
        self._guesses, self.row = guesses, 1
        if guesses and len(self._plain) >= _ENOUGH:
            self._level = statistics.median(self._plain)
        elif not guesses:
            self._plain.clear()

    def plain(self, ms: float) -> None:
        """A step without guesses took so long."""
        if self.row > _SETTLING:
            self._plain.append(ms)

    def step(self, tokens: int, ms: float) -> None:
        """A step with so many tokens of each sequence, guesses among them, took so long.

        The first of a row does not count: threads and caches have to get used to it.
        """
        known = self.steps.get(tokens)
        if self.row == 1:
            return
        self._learn(self.steps, tokens, ms)
        if self.row > _TELLING and self._level is not None and known is not None:
            # The plain steps are long ago: the machine's pace is taken from what is known of these.
            self._level *= min(max(ms / (known * self._level), 0.8), 1.25) ** _CARRIED

    def draft(self, length: int, ms: float) -> None:
        """A draft of so many tokens for each sequence took so long."""
        self._learn(self.drafts, length, ms)

    def draft_at(self, length: int) -> float:
        """Of a draft: measured, or in proportion to the nearest length that was."""
        nearest = self.drafts.nearest(length)
        return 0.0 if nearest is None else self.drafts.at(nearest) * length / nearest

    def _learn(self, ratios: Ratios, count: int, ms: float) -> None:
        if self._level is not None and (self.row <= _TELLING or ratios.wanted(count)):
            ratios.add(count, ms / self._level)
