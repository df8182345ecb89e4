"""What an engine asks of speculative decoding: drafts for the sequences of a step, fitted to what they are worth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from irc.runtime.requests import SequenceState
from irc.runtime.speculation.controller import Controller

_CATCHING_UP = 16
"""Tokens since its last draft beyond which a sequence's next one costs more than usual."""


@dataclass(frozen=True)
class Proposal:
    """Tokens that may follow a sequence, and the probabilities [k, V] they were drawn from (None: not drawn)."""

    tokens: list[int]
    probabilities: Tensor | None = None


class Proposer(Protocol):
    """Guesses tokens."""

    def propose(self, sequences: Sequence[SequenceState], lengths: Sequence[int]) -> list[Proposal]:
        """For each sequence at most so many tokens; fewer or none are fine."""

    def forget(self, sequence: SequenceState) -> None:
        """The sequence has ended."""


@dataclass
class SpeculationStats:
    """What speculation did.

    Attributes:
        rounds: sequences' steps with a draft.
        drafted, accepted: tokens.
        plain_steps: sequences' steps without a draft.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    plain_steps: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted tokens of the drafted ones."""
        return self.accepted / self.drafted if self.drafted else None

    def __str__(self) -> str:
        rate, tokens = self.acceptance_rate, self.tokens_per_step
        if rate is None or tokens is None:
            return "speculation: nothing was guessed"
        return f"speculation: {self.accepted} of {self.drafted} guesses stood ({rate:.0%}), {tokens:.2f} tokens a step"

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens a sequence gets in a step."""
        steps = self.rounds + self.plain_steps
        return (steps + self.accepted) / steps if steps else None


@dataclass
class Speculation:
    """A proposer with the controller that decides how many tokens it is asked for."""

    proposer: Proposer
    controller: Controller = field(default_factory=Controller)
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    _guessed: int = 0
    _batch: int = 0
    _drafted_at: dict[SequenceState, int] = field(default_factory=dict)

    def propose(self, sequences: Sequence[SequenceState], max_length: int) -> None:
        """Set the drafts of the sequences that decode in the next step."""
        for sequence in sequences:
            sequence.draft, sequence.draft_probs = [], None
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
                sequence.draft = proposal.tokens[:length]
                probabilities = proposal.probabilities
                sequence.draft_probs = None if probabilities is None else probabilities[:length]
                self._guessed += len(sequence.draft)
        self.stats.plain_steps += sum(not s.draft for s in sequences)

    def verified(self, sequence: SequenceState, drafted: int, accepted: int) -> None:
        """The model kept the first `accepted` of a sequence's draft."""
        self.stats.rounds += 1
        self.stats.drafted += drafted
        self.stats.accepted += accepted
        self.controller.verified(sequence, drafted, accepted)

    def measured(self, num_tokens: int, model_ms: float) -> None:
        """A step over so many tokens took so long."""
        if self._batch:
            self.controller.measured(num_tokens, model_ms)

    def forget(self, sequence: SequenceState) -> None:
        """The sequence has ended."""
        self._drafted_at.pop(sequence, None)
        self.proposer.forget(sequence)
        self.controller.forget(sequence)
