"""Sampling: logits → next tokens, for a whole batch at once.

Order of the steps, as most libraries have it: temperature, top-k, top-p, min-p. Each sequence draws from its
own stream of random numbers, so that what it gets does not depend on what else is in the batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from irc.core.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0: always the likeliest token; else logits are divided by it.
        top_k: keep only the k likeliest tokens.
        top_p: keep the likeliest tokens that together have at least this probability (nucleus).
        min_p: drop tokens less likely than this share of the likeliest one.
        seed: of the random numbers.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature must be 0 or more, not {self.temperature!r}")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k must be at least 1, not {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            problems.append(f"min_p must be from 0 to 1, not {self.min_p!r}")
        if problems:
            raise OptionError("sampling: " + "; ".join(problems))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class Sampler:
    """Chooses tokens for a batch of sequences; holds their random streams."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]]) -> None:
        self.sampling = sampling
        self._generators = [] if sampling.greedy else _streams(sampling.seed, prompts)

    def __call__(self, logits: Tensor, sequences: list[int]) -> list[int]:
        """The next token of each of the given sequences.

        Shapes: logits [N, V], row n for sequence `sequences[n]`.
        """
        if self.sampling.greedy:
            return logits.argmax(-1).tolist()
        probabilities = kept_probabilities(logits.float().cpu(), self.sampling)
        # One number a sequence, drawn in double precision: inverse transform over the cumulative sum.
        draws = torch.tensor(
            [torch.rand((), dtype=torch.float64, generator=self._generators[i]).item() for i in sequences],
            dtype=torch.float64,
        )
        cumulative = probabilities.double().cumsum(-1)
        chosen = torch.searchsorted(cumulative, draws.unsqueeze(-1) * cumulative[:, -1:], right=True).squeeze(-1)
        return chosen.clamp(max=_last_kept(probabilities)).tolist()


def kept_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after temperature, top-k, top-p and min-p; what is dropped has probability 0.

    Shapes: logits [N, V]; returns [N, V], each row summing to 1. The likeliest token is always kept.
    """
    # Subtracting the largest first keeps tiny temperatures from overflowing.
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        keep = torch.zeros_like(scaled, dtype=torch.bool)
        keep.scatter_(-1, scaled.topk(sampling.top_k, dim=-1).indices, True)
        scaled = scaled.masked_fill(~keep, -math.inf)
    probabilities = scaled.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        probabilities = probabilities.masked_fill(~_nucleus(probabilities, sampling.top_p), 0.0)
    if sampling.min_p is not None:
        threshold = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < threshold, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """bool[N, V]: the shortest prefix, by falling probability, that reaches `top_p`."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, order, before < top_p)


def _last_kept(probabilities: Tensor) -> Tensor:
    """Index of the last token with any probability: where rounding must not lead beyond."""
    width = probabilities.shape[-1]
    return width - 1 - (probabilities.flip(-1) > 0).to(torch.uint8).argmax(-1)


def _streams(seed: int, prompts: Sequence[Sequence[int]]) -> list[torch.Generator]:
    """A stream for each prompt, from the seed and the prompt itself: the same alone and in any batch.

    When a prompt comes several times, each time has its own stream.
    """
    times: dict[tuple[int, ...], int] = {}
    streams = []
    for prompt in prompts:
        key = tuple(prompt)
        nth = times[key] = times.get(key, -1) + 1
        digest = hashlib.blake2b(repr((seed, nth, key)).encode(), digest_size=8).digest()
        streams.append(torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1))
    return streams
