"""Counts of what speculative decoding did, and rates of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SpeculationStats:
    """What speculation did.

    Attributes:
        rounds: sequences' steps with a draft.
        drafted, accepted: tokens.
        refused: rounds in which a token was refused.
        plain_steps: sequences' steps without a draft.
        missed: those among them for which one was wanted, and nothing was found.
        branches, branches_taken: other ways to go on that were guessed, and those that were followed.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    refused: int = 0
    plain_steps: int = 0
    missed: int = 0
    branches: int = 0
    branches_taken: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted tokens of the drafted ones."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def alpha(self) -> float | None:
        """Estimated probability that a token stands, those before it standing: the α of the formulas."""
        judged = self.accepted + self.refused
        return self.accepted / judged if judged else None

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
