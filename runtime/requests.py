"""Requests, and the sequences that they become: one for each sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from irc.runtime.block_manager import ROOT
from irc.runtime.results import FinishReason
from irc.runtime.sampling import Sampling
from irc.runtime.text import TextStream


class Constraint(Protocol):
    """What a sequence may say next (structured output); holds its own state."""

    def masks(self, draft: Sequence[int]) -> list[torch.Tensor | None]:
        """bool[V] for the next token and for the one behind each draft token, true where it is allowed; None: all are.

        Behind a draft token that is not allowed any mask will do. The state stays as it is.
        """

    def advance(self, token: int) -> None:
        """The token has been chosen."""

    def finished(self) -> bool:
        """Nothing may follow but the end."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client wants.

    Attributes:
        prompt: token ids.
        max_new_tokens: of each sample.
        sampling: how tokens are chosen.
        key: of the random numbers (see `request_key`); the sample's index is added to it.
        end_tokens, stop_tokens: end a sample, and are not part of it.
        text: makes the text stream of a sample, which also finds stop texts; None: no text is made.
        constraint: makes the constraint of a sample.
        num_samples: how many continuations of the prompt are wanted; they share its pages.
        logprobs: how many of the likeliest tokens are reported with their log-probability; None: none at all.
        priority: smaller is served first.
        client: requests of one priority are shared out among clients by what each has got so far.
        deadline: time (`time.monotonic`) at which it is ended as it is.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    key: int = 0
    end_tokens: frozenset[int] = frozenset()
    stop_tokens: frozenset[int] = frozenset()
    text: Callable[[], TextStream] | None = None
    constraint: Callable[[], Constraint] | None = None
    num_samples: int = 1
    logprobs: int | None = None
    priority: int = 0
    client: str = ""
    deadline: float | None = None


def request_key(*parts: object) -> int:
    """A 64-bit key for the random numbers of a request, from whatever tells it apart."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one position, before temperature and filters: of the chosen token and the likeliest ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Output:
    """What a step gave one sample: tokens, text that became final, and why it ended if it did.

    Attributes:
        end_token: the end or stop token that ended it, which is not part of it.
    """

    request_id: int
    sample: int
    token_ids: list[int]
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: Sequence[TokenLogprobs] = ()
    error: str = ""
    end_token: int | None = None


@dataclass(frozen=True)
class Proposal:
    """Tokens that may follow a sequence, and the probabilities [k, V] they were drawn from (None: not drawn).

    Attributes:
        branches: other ways to go on, from the sequence's last token too. Where several begin alike, those that go on
            there were drawn one after the other without those before: first this one's token, then those of branches.
    """

    tokens: list[int]
    probabilities: torch.Tensor | None = None
    branches: tuple[Proposal, ...] = ()


@dataclass(slots=True, eq=False)
class SequenceState:
    """State of one sample.

    Attributes:
        ids: prompt and new tokens.
        longest: `ids` that are longer than this end it, by max_new_tokens or the cache.
        ends: tokens that end it.
        plain: its next token is the likeliest one of the model's own logits.
        quick: nothing is wanted of a token that goes on but its id.
        num_computed: how many of them have keys and values in `blocks`.
        contents: numbers of the contents of the full blocks that are registered.
        row: of the engine's block tables while it runs.
        moved: the row has to be written again.
        shared: its last block may be another sequence's too.
        draft: proposed tokens behind `ids`, to be verified in the next step.
        branches: other proposals, to be verified beside it.
        pending_samples: further samples to be split off when the prompt has been read.
    """

    request_id: int
    sample: int
    request: Request
    ids: list[int]
    prompt_length: int
    arrival: int
    key: int
    longest: int
    text: TextStream | None = None
    constraint: Constraint | None = None
    ends: frozenset[int] = field(init=False)
    plain: bool = field(init=False)
    quick: bool = field(init=False)
    blocks: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)
    num_computed: int = 0
    shared: bool = False
    row: int = -1
    moved: bool = True
    draft: list[int] = field(default_factory=list)
    draft_probs: torch.Tensor | None = None
    branches: Sequence[Proposal] = ()
    pending_samples: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        request = self.request
        self.ends = request.end_tokens | request.stop_tokens
        self.plain = request.sampling.plain and self.constraint is None
        self.quick = self.text is None and self.constraint is None and request.logprobs is None

    def goes_on(self, token: int) -> bool:
        """Whether a token is simply one more: nothing is to be made of it, and it ends nothing."""
        return self.quick and len(self.ids) < self.longest and token not in self.ends and not self.pending_samples

    def drop_draft(self) -> None:
        """Nothing is guessed of it any more."""
        self.draft, self.draft_probs, self.branches = [], None, ()

    @property
    def order(self) -> tuple[int, int, int]:
        """Who goes first: priority, then arrival."""
        return (self.request.priority, self.arrival, self.sample)

    @property
    def num_new(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def last_content(self) -> int:
        return self.contents[-1] if self.contents else ROOT

    @property
    def decoding(self) -> bool:
        """All but the last token are in the pages."""
        return self.num_computed == len(self.ids) - 1 and self.num_computed >= self.prompt_length - 1
