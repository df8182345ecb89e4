"""What an engine asks of speculative decoding: drafts for the sequences of a step, fitted to what they are worth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from irc.runtime.requests import Proposal, SequenceState
from irc.runtime.speculation.controller import Controller
from irc.runtime.speculation.stats import SpeculationStats

_CATCHING_UP = 16
"""Tokens since its last draft beyond which a sequence's next one costs more than usual."""


class Proposer(Protocol):
    """Guesses tokens."""

    def propose(self, sequences: Sequence[SequenceState], lengths: Sequence[int]) -> list[Proposal]:
        """For each sequence at most so many tokens; fewer or none are fine."""

    def forget(self, sequence: SequenceState) -> None:
        """The sequence has ended."""


def _cut(proposal: Proposal, length: int) -> Proposal:
    probabilities = proposal.probabilities
    return Proposal(proposal.tokens[:length], None if probabilities is None else probabilities[:length])


@dataclass
class Speculation:
    """A proposer with the controller that decides how many tokens it is asked for."""

    proposer: Proposer
    controller: Controller = field(default_factory=Controller)
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    _guessed: int = 0
    _batch: int = 0
    _resting: bool = False
    _drafted_at: dict[SequenceState, int] = field(default_factory=dict)

    def rests(self, num_running: int) -> bool:
        """Whether the next step goes without guesses, as guessing does not pay now: nothing else is to be done then."""
        self._resting = self.controller.rests(num_running)
        if self._resting:
            self.stats.plain_steps += num_running
        return self._resting

    def propose(self, sequences: Sequence[SequenceState], max_length: int) -> int:
        """Set the drafts of the sequences that decode in the next step; how many tokens were guessed."""
        for sequence in sequences:
            sequence.drop_draft()
        self._batch, self._guessed = len(sequences), 0
        lengths = self.controller.lengths(sequences)
        asked = []
        for sequence, length in zip(sequences, lengths, strict=True):
            room = min(max_length, sequence.prompt_length + sequence.request.max_new_tokens) - len(sequence.ids) - 1
            if min(length, room) > 0:
                asked.append((sequence, min(length, room)))
        if asked:
            # The first draft of a sequence reads its whole prompt: that is no measure of the next ones.
            steady = all(len(s.ids) - self._drafted_at.get(s, 0) <= _CATCHING_UP for s, _ in asked)
            started = time.perf_counter()
            proposals = self.proposer.propose([s for s, _ in asked], [n for _, n in asked])
            if steady:
                self.controller.measured_draft(max(n for _, n in asked), (time.perf_counter() - started) * 1e3)
            self._drafted_at.update((s, len(s.ids)) for s, _ in asked)
            for (sequence, length), proposal in zip(asked, proposals, strict=True):
                main, *others = (_cut(one, length) for one in (proposal, *proposal.branches))
                sequence.draft, sequence.draft_probs, sequence.branches = main.tokens, main.probabilities, others
                self.stats.branches += len(others)
                self._guessed += len(sequence.draft)
            found = sum(bool(sequence.draft) for sequence, _ in asked)
            self.stats.missed += len(asked) - found
            self.controller.proposed(found, len(asked))
        self.stats.plain_steps += sum(not s.draft for s in sequences)
        return self._guessed

    def verified(self, sequence: SequenceState, drafted: int, accepted: int, branch: bool = False) -> None:
        """The model kept the first `accepted` of a sequence's draft, or of a branch of so many tokens."""
        self.stats.rounds += 1
        self.stats.branches_taken += branch
        self.stats.drafted += drafted
        self.stats.accepted += accepted
        self.stats.refused += accepted < drafted
        self.controller.verified(sequence, drafted, accepted)

    @property
    def measures(self) -> bool:
        """Whether the time of the step is wanted."""
        return self.controller.measures

    def measured(self, num_tokens: int, model_ms: float) -> None:
        """A step over so many tokens took so long."""
        if self._batch:
            self.controller.measured(num_tokens, model_ms)

    def forget(self, sequence: SequenceState) -> None:
        """The sequence has ended."""
        self._drafted_at.pop(sequence, None)
        self.proposer.forget(sequence)
        self.controller.forget(sequence)
