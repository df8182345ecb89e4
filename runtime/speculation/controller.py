"""How many tokens to guess: as many as pay, from measured acceptance and measured times; none where guessing loses.

With acceptance α a draft of k tokens gives (1 - α^(k+1)) / (1 - α) tokens in expectation. A step over n tokens takes
T(n), a draft D(k); both are measured while running. The length is the k that maximises tokens per time,

    Σ_s E_s(k) / (T(n_0 + k·B) + D(k)),    k = 0: plain decoding

Where k = 0 wins, it is tried again after a while, ever more rarely; where guessing wins, a plain step now and then
keeps T(B) true. Times are of whole steps, as a guess that stands also saves the work around the model. A machine that
has other work is at times half as fast for a while: all times are multiples of one pace, which follows every step.

Source: Leviathan, Kalman and Matias 2023, section 3 (expected number of tokens and improvement factor).
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from irc.runtime.requests import SequenceState

_REMEMBERED = 7
_PLAIN_EVERY = 64
_FIRST_LENGTHS = (4, 2, 4, 2, 4, 2)
"""Drafts before anything is decided: the first step of a new size is often a slow one, and must not decide alone."""
_MEMORY = 0.9
_PRIOR_WEIGHT = 6.0
_SHORT_PAUSE, _FIRST_PAUSE, _LONGER, _LONGEST_PAUSE = 8, 16, 4, 1024
_PACE = 0.1
_GAIN = 1.05
"""Guessing must promise at least this much: figures are noisy, and plain decoding has none of the risk."""


def expected_tokens(acceptance: float, length: float) -> float:
    """Tokens that a round with a draft of `length` gives in expectation."""
    if acceptance >= 1.0:
        return length + 1.0
    return (1.0 - acceptance ** (length + 1)) / (1.0 - acceptance)


def predicted_speedup(acceptance: float, length: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Speed-up over plain decoding; costs are in plain steps: of one guessed token, and of the verifying step."""
    return expected_tokens(acceptance, length) / (verify_cost + length * draft_cost)


@dataclass
class Pace:
    """How fast the machine is now; 1: as at the first step."""

    factor: float = 1.0

    def follow(self, ratio: float) -> None:
        """A step took `ratio` times as long as was expected."""
        self.factor *= min(max(ratio, 0.5), 2.0) ** _PACE


@dataclass
class Times:
    """Times in ms by a count: the median of the latest ones, at today's pace; between counts that were seen,
    interpolated."""

    pace: Pace = field(default_factory=Pace)
    _known: dict[int, float] = field(default_factory=dict)
    _order: list[int] = field(default_factory=list)
    _latest: dict[int, deque[float]] = field(default_factory=dict)

    def add(self, count: int, ms: float) -> None:
        """Take in one measurement; a rare long one (something else had the processor) does not count, nor does the
        first of a size, in which targets work out what they will need again."""
        latest = self._latest.get(count)
        if latest is None:
            self._latest[count] = deque(maxlen=_REMEMBERED)
            return
        if latest:
            self.pace.follow(ms / self.seen_at(count))
        else:
            bisect.insort(self._order, count)
        latest.append(ms / self.pace.factor)
        self._known[count] = sorted(latest)[(len(latest) - 1) // 2]

    @property
    def seen(self) -> dict[int, float]:
        """The times of the counts that were seen."""
        return {count: self.seen_at(count) for count in self._order}

    def seen_at(self, count: int) -> float:
        """The time of a count that was seen."""
        return self._known[count] * self.pace.factor

    @property
    def smallest(self) -> int | None:
        """The smallest count that was seen."""
        return self._order[0] if self._order else None

    def nearest(self, count: int) -> int | None:
        """The count nearest to this one that was seen."""
        return min(self._order, key=lambda known: abs(known - count)) if self._order else None

    def at(self, count: int) -> float | None:
        """The time for a count; None before anything was seen."""
        if not self._order:
            return None
        if count in self._known:
            return self.seen_at(count)
        at = bisect.bisect(self._order, count)
        if at == 0:
            return self.seen_at(self._order[0])
        low = self._order[at - 1]
        if at == len(self._order):
            return self.seen_at(low)  # optimistic: what was never tried is worth trying
        high = self._order[at]
        share = (count - low) / (high - low)
        return self.seen_at(low) + share * (self.seen_at(high) - self.seen_at(low))


@dataclass
class _Acceptance:
    accepted: float = 0.0
    rejected: float = 0.0

    def add(self, accepted: int, rejected: int) -> None:
        self.accepted = self.accepted * _MEMORY + accepted
        self.rejected = self.rejected * _MEMORY + rejected

    def fade(self) -> None:
        """What is known gets old."""
        self.accepted, self.rejected = 0.5 * self.accepted, 0.5 * self.rejected


@dataclass
class Controller:
    """Chooses draft lengths.

    Attributes:
        max_length: longest draft.
        fixed: always this length (for measurements); None: adapt.
        prior: acceptance that is assumed before anything was seen.
    """

    max_length: int = 8
    fixed: int | None = None
    prior: float = 0.7
    times: Times = field(default_factory=Times)
    draft_times: Times = field(default_factory=Times)
    _all: _Acceptance = field(default_factory=_Acceptance)
    _own: dict[SequenceState, _Acceptance] = field(default_factory=dict)
    _pause: int = _FIRST_PAUSE
    _paused: int = 0
    _guessed: int = 0
    _rounds: int = 0

    def __post_init__(self) -> None:
        self.draft_times.pace = self.times.pace

    def acceptance(self, sequence: SequenceState | None = None) -> float:
        """Estimated probability that a guessed token stands: of a sequence, with what all showed as a prior."""
        weight = self._all.accepted + self._all.rejected
        overall = (self._all.accepted + self.prior) / (weight + 1.0)
        own = self._own.get(sequence) if sequence is not None else None
        if own is None:
            return overall
        return (own.accepted + _PRIOR_WEIGHT * overall) / (own.accepted + own.rejected + _PRIOR_WEIGHT)

    def lengths(self, sequences: Sequence[SequenceState]) -> list[int]:
        """The draft length of each sequence of the next step."""
        if self.fixed is not None:
            return [self.fixed] * len(sequences)
        if not sequences:
            return []
        if self.rests() or not self._plain_known(len(sequences)):
            return [0] * len(sequences)
        if self._rounds < len(_FIRST_LENGTHS):
            return [min(_FIRST_LENGTHS[self._rounds], self.max_length)] * len(sequences)
        rates = [self.acceptance(s) for s in sequences]
        best = self.best_length(rates)
        if best == 0 and self.best_length([self.acceptance()] * len(sequences)) > 0:
            self._paused = _SHORT_PAUSE  # it is these sequences that are hard to guess, and not for ever
            for sequence in sequences:
                if sequence in self._own:
                    self._own[sequence].fade()
            return [0] * len(sequences)
        if best == 0:
            # The next try after the pause is a short one: it only has to show that things have changed.
            self._paused, self._pause = self._pause, min(_LONGER * self._pause, _LONGEST_PAUSE)
            return [2 if self._pause > _FIRST_PAUSE * _LONGER else 0] * len(sequences)
        self._pause = _FIRST_PAUSE
        return [best] * len(sequences)

    def rests(self) -> bool:
        """Whether the next step is one of a pause, which it then counts."""
        resting = self._paused > 0 and self.fixed is None
        self._paused -= resting
        return resting

    def _plain_known(self, batch: int) -> bool:
        """Whether it was measured, and lately, what a step without guesses takes."""
        self._guessed += 1
        if self._guessed % _PLAIN_EVERY == 0:
            return False
        smallest = self.times.smallest
        return smallest is not None and smallest <= batch

    def best_length(self, rates: Sequence[float]) -> int:
        """The length that gives most tokens per time; 0: none."""
        batch = len(rates)
        plain = self.times.at(batch)
        assert plain is not None
        best, most = 0, batch / plain * _GAIN
        for length in range(1, self.max_length + 1):
            verify = self.times.at(batch * (length + 1))
            assert verify is not None
            time_ms = max(verify, plain) + self._draft_time(length)
            speed = sum(expected_tokens(rate, length) for rate in rates) / time_ms
            if speed > most:
                best, most = length, speed
        return best

    def predicted(self, alpha: float | None, rounds: int, drafted: int, plain_steps: int) -> float | None:
        """Speed-up of one sequence by the formula, from measured times and how often how much was guessed.

        Args:
            alpha: probability that a token stands.
            rounds, drafted: steps with a draft, and the tokens of all drafts.
            plain_steps: steps without.
        """
        plain = self.times.at(1)
        if alpha is None or plain is None or not rounds:
            return None
        length = drafted / rounds
        near = max(round(length), 1)
        verify = max(self.times.at(near + 1) or plain, plain)
        tokens = rounds * expected_tokens(alpha, length) + plain_steps
        return tokens * plain / (rounds * (verify + self._draft_time(near)) + plain_steps * plain)

    def _draft_time(self, length: int) -> float:
        """Measured, or in proportion to the nearest length that was."""
        nearest = self.draft_times.nearest(length)
        return 0.0 if nearest is None else self.draft_times.seen_at(nearest) * length / nearest

    def measured_draft(self, length: int, ms: float) -> None:
        """A draft of so many tokens took so long."""
        self.draft_times.add(length, ms)

    def measured(self, num_tokens: int, ms: float) -> None:
        """A step over so many tokens took so long."""
        self.times.add(num_tokens, ms)

    def verified(self, sequence: SequenceState, drafted: int, accepted: int) -> None:
        """The model kept the first `accepted` of a sequence's draft."""
        self._rounds += 1
        rejected = int(accepted < drafted)
        self._all.add(accepted, rejected)
        self._own.setdefault(sequence, _Acceptance()).add(accepted, rejected)

    def forget(self, sequence: SequenceState) -> None:
        """The sequence has ended."""
        self._own.pop(sequence, None)
