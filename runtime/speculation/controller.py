"""How many tokens to guess: as many as pay, from measured acceptance and measured costs; none where guessing loses.

With acceptance α a draft of k tokens gives (1 - α^(k+1)) / (1 - α) tokens in expectation. A step in which each
sequence has n tokens costs T(n) plain steps, a draft D(k); both are measured while running (`costs`). The length is the
k that maximises tokens per time,

    Σ_s E_s(k) / (T(k + 1) + D(k)),    k = 0: plain decoding, one step a token

Steps for which a look-up finds nothing have a share of their own: they give one token, and cost T(1) + D(k), which is
more than a plain step in a row of plain ones.

Where k = 0 wins, guessing is tried again after a while, ever more rarely; where guessing wins, a few plain steps now
and then give costs something to be compared with. Times are of whole steps, as a guess that stands also saves the work
around the model.

Source: Leviathan, Kalman and Matias 2023, section 3 (expected number of tokens and improvement factor).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from irc.runtime.requests import SequenceState
from irc.runtime.speculation.costs import Costs

_PLAIN_EVERY, _PLAIN_ROW = 192, 6
"""After so many steps with guesses come so many without."""
_LENGTH_TRIED, _FIRST_TRIES, _TRIES = 3, 4, 3
"""Drafts of this length, so many in a row, before anything is decided, and later where guessing lost."""
_MEMORY = 0.97
_PRIOR_WEIGHT = 6.0
_SHORT_PAUSE, _FIRST_PAUSE, _LONGER, _LONGEST_PAUSE = 8, 64, 4, 1024
_MEASURED = 16
"""Steps at the end of a pause that are measured."""
_PROVEN = 24
"""Steps with guesses in a row after which pauses are short again; until then it may have been luck."""
_GAIN = 1.1
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
        measures: whether times of the next step are wanted.
        costs: at the batch of the latest step; batches share them from one power of two to the next.
        fixed: always this length (for measurements); None: adapt.
        prior: acceptance that is assumed before anything was seen.
    """

    max_length: int = 8
    fixed: int | None = None
    prior: float = 0.7
    costs: Costs = field(default_factory=Costs)
    _all: _Acceptance = field(default_factory=_Acceptance)
    _found: _Acceptance = field(default_factory=_Acceptance)
    _own: dict[SequenceState, _Acceptance] = field(default_factory=dict)
    _pause: int = _FIRST_PAUSE
    _paused: int = 0
    _tries: int = _FIRST_TRIES
    _guessed: int = 0
    _guesses: bool = False
    _batch: int = 0
    measures: bool = True
    _costs: dict[int, Costs] = field(default_factory=dict)

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
        if self.rests(len(sequences)):
            return [0] * len(sequences)
        self._over(len(sequences))
        self.measures = True
        length = self._length(sequences) if self.costs.known else 0
        self._guesses = length > 0
        self.costs.begin(self._guesses)
        return [length] * len(sequences)

    def _length(self, sequences: Sequence[SequenceState]) -> int:
        self._guessed += 1
        if self._guessed > _PLAIN_EVERY:
            self._guessed, self._paused = 0, _PLAIN_ROW - 1
            return 0
        if self._tries:
            self._tries -= 1
            return min(_LENGTH_TRIED, self.max_length)
        best = self.best_length([self.acceptance(s) for s in sequences])
        if best > 0:
            if self.costs.row > _PROVEN:
                self._pause = _FIRST_PAUSE
        elif self.best_length([self.acceptance()] * len(sequences)) > 0:
            self._paused = _SHORT_PAUSE  # it is these sequences that are hard to guess, and not for ever
            for sequence in sequences:
                if sequence in self._own:
                    self._own[sequence].fade()
        else:
            self._paused, self._pause = self._pause, min(_LONGER * self._pause, _LONGEST_PAUSE)
            self._tries = _TRIES
        return best

    def rests(self, batch: int) -> bool:
        """Whether the next step, over so many sequences, is one of a pause, which it then counts."""
        if self._paused <= 0 or self.fixed is not None:
            return False
        self._paused -= 1
        self.measures = self._paused < _MEASURED
        if self.measures:
            self._over(batch)
            self._guesses = False
            self.costs.begin(guesses=False)
        return True

    def _over(self, batch: int) -> None:
        """The next step is one over so many sequences."""
        if batch == self._batch:
            return
        self._batch = batch
        size = batch.bit_length()
        if size not in self._costs:
            self._costs[size] = Costs()
        self.costs = self._costs[size]

    def best_length(self, rates: Sequence[float]) -> int:
        """The length that gives most tokens per time; 0: none."""
        costs, found = self.costs, self.found
        best, most = 0, len(rates) * _GAIN
        for length in range(1, self.max_length + 1):
            time = found * self._step_cost(length) + (1.0 - found) * self._step_cost(0) + costs.draft_at(length)
            tokens = found * sum(expected_tokens(rate, length) for rate in rates) + (1.0 - found) * len(rates)
            if (speed := tokens / time) > most:
                best, most = length, speed
        return best

    @property
    def found(self) -> float:
        """Share of the sequences for which there was a guess, of those for which one was wanted."""
        asked = self._found.accepted + self._found.rejected
        return (self._found.accepted + 1.0) / (asked + 1.0)

    def _step_cost(self, length: int) -> float:
        return max(self.costs.steps.at(length + 1), 1.0)

    def predicted(
        self, alpha: float | None, rounds: int, drafted: int, plain_steps: int, missed: int = 0
    ) -> float | None:
        """Speed-up of one sequence by the formula, from measured costs and how often how much was guessed.

        Args:
            alpha: probability that a token stands.
            rounds, drafted: steps with a draft, and the tokens of all drafts.
            plain_steps: steps without.
            missed: those among them in which nothing was found.
        """
        if alpha is None or not rounds or not self.costs.known:
            return None
        length = drafted / rounds
        near = max(round(length), 1)
        guessing = rounds * self._step_cost(near) + missed * self._step_cost(0)
        guessing += (rounds + missed) * self.costs.draft_at(near)
        return (rounds * expected_tokens(alpha, length) + plain_steps) / (guessing + plain_steps - missed)

    def proposed(self, found: int, asked: int) -> None:
        """For so many of the sequences there was a guess."""
        self._found.add(found, asked - found)

    def measured_draft(self, length: int, ms: float) -> None:
        """A draft of so many tokens took so long."""
        self.costs.draft(length, ms)

    def measured(self, num_tokens: int, ms: float) -> None:
        """A step over so many tokens took so long."""
        if self._guesses:
            self.costs.step(round(num_tokens / self._batch), ms)
        elif not self._guesses and num_tokens == self._batch:
            self.costs.plain(ms)

    def verified(self, sequence: SequenceState, drafted: int, accepted: int) -> None:
        """The model kept the first `accepted` of a sequence's draft."""
        rejected = int(accepted < drafted)
        self._all.add(accepted, rejected)
        self._own.setdefault(sequence, _Acceptance()).add(accepted, rejected)

    def forget(self, sequence: SequenceState) -> None:
        """The sequence has ended."""
        self._own.pop(sequence, None)
