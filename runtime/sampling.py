"""Sampling: logits → next tokens, for a whole batch at once.

Order of the steps: logit bias and penalties, allowed tokens, temperature, top-k, top-p, min-p, typical. Random numbers
are a function of the request's key and the position, so what a sequence gets does not depend on what else is in
the batch, on when it runs, or on whether it is computed a second time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
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
        typical_p: keep the tokens whose information is nearest to the expected one, up to this probability.
        repetition_penalty: logits of tokens that the prompt or the answer has are divided by it if positive, else
            multiplied.
        presence_penalty: taken from the logits of tokens that the answer has.
        frequency_penalty: taken from them as often as the answer has them.
        logit_bias: (token, number added to its logit); a mapping is taken too.
        seed: of the random numbers.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", tuple(sorted(self.logit_bias.items())))
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature must be 0 or more, not {self.temperature!r}")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k must be at least 1, not {self.top_k!r}")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                problems.append(f"{name} must be above 0 and at most 1, not {value!r}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            problems.append(f"min_p must be from 0 to 1, not {self.min_p!r}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            problems.append(f"repetition_penalty must be above 0, not {self.repetition_penalty!r}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                problems.append(f"{name} must be a number, not {getattr(self, name)!r}")
        if any(token < 0 or math.isnan(bias) for token, bias in self.logit_bias):
            problems.append("logit_bias must map token ids to numbers")
        if problems:
            raise OptionError("sampling: " + "; ".join(problems))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalizes(self) -> bool:
        """Logits depend on which tokens there were."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def plain(self) -> bool:
        """The likeliest token of the model's own logits."""
        return self.temperature == 0.0 and not self.penalizes and not self.logit_bias


@dataclass(slots=True)
class Row:
    """One row of logits: whose it is.

    Attributes:
        ids: tokens before it, where penalties ask for them; the first `prompt_length` are the prompt.
        position: of the token that is chosen.
        allowed: bool[V], or None.
    """

    sampling: Sampling
    key: int
    position: int
    ids: Sequence[int] = ()
    prompt_length: int = 0
    allowed: Tensor | None = None


def likeliest(logits: Tensor) -> list[int]:
    """The token with the largest logit of each row of [R, V]; the first of equals."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        found: list[int] = logits.numpy().argmax(-1).tolist()  # vectorised, ten times as fast as PyTorch's
        return found
    return logits.argmax(-1).tolist()


def choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row.

    Shapes: logits [R, V], one row for each of `rows`.
    """
    if all(row.sampling.plain and row.allowed is None for row in rows):
        return likeliest(logits)
    adjusted = adjusted_logits(logits, rows)
    best = adjusted.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if not row.sampling.greedy]
    if drawn:
        probabilities = kept_probabilities(adjusted[drawn], [rows[i].sampling for i in drawn])
        numbers = uniforms([rows[i].key for i in drawn], [rows[i].position for i in drawn])
        best[drawn] = draw(probabilities, numbers)
    return best.tolist()


def draw(probabilities: Tensor, numbers: np.ndarray) -> Tensor:
    """Inverse transform over the cumulative sum, in double precision: i64[R] of probabilities [R, V]."""
    cumulative = probabilities.double().cumsum(-1)
    targets = torch.from_numpy(np.ascontiguousarray(numbers)).unsqueeze(-1) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    return torch.minimum(chosen, _last_kept(probabilities))


def adjusted_logits(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits after bias and penalties, f32 on the CPU; tokens that are not allowed have -inf."""
    adjusted = logits.float().cpu()
    biased = [i for i, row in enumerate(rows) if row.sampling.logit_bias]
    penalized = [i for i, row in enumerate(rows) if row.sampling.penalizes]
    masked = [i for i, row in enumerate(rows) if row.allowed is not None]
    if biased or penalized or masked:
        adjusted = adjusted.clone()
    if penalized:
        adjusted[penalized] = _penalized(adjusted[penalized], [rows[i] for i in penalized])
    if biased:
        places = [(i, token, bias) for i in biased for token, bias in rows[i].sampling.logit_bias]
        at, tokens, values = zip(*places, strict=True)
        adjusted.index_put_((torch.tensor(at), torch.tensor(tokens)), torch.tensor(values), accumulate=True)
    if masked:
        allowed = torch.stack([rows[i].allowed for i in masked])  # type: ignore[misc]  # `masked` are those that have one
        adjusted[masked] = adjusted[masked].masked_fill(~allowed, -math.inf)
    return adjusted


def _penalized(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Keskar et al. 2019 for repetition; presence and frequency as in OpenAI's interface."""
    whole = _counts([row.ids for row in rows], logits)
    answer = _counts([row.ids[row.prompt_length :] for row in rows], logits)
    repetition, presence, frequency = (
        torch.tensor([[getattr(row.sampling, f"{name}_penalty")] for row in rows])
        for name in ("repetition", "presence", "frequency")
    )
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(whole > 0, scaled, logits)
    return logits - presence * (answer > 0) - frequency * answer


def _counts(ids: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """How often each row's tokens occur: [R, V]."""
    at = torch.tensor([i for i, row in enumerate(ids) for _ in row], dtype=torch.int64)
    tokens = torch.tensor([token for row in ids for token in row], dtype=torch.int64)
    return torch.zeros_like(logits).index_put_((at, tokens), torch.ones(len(at)), accumulate=True)


def kept_probabilities(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Probabilities after temperature and filters; what is dropped has probability 0.

    Shapes: logits [R, V]; returns [R, V], each row summing to 1. The likeliest token is always kept.
    """
    temperature = torch.tensor([[s.temperature or 1.0] for s in samplings], dtype=torch.float64)
    # Subtracting the largest first keeps tiny temperatures from overflowing.
    shifted = logits - logits.amax(-1, keepdim=True)
    scaled = (shifted.double() / temperature).to(logits.dtype)
    width = scaled.shape[-1]
    if any(s.top_k is not None and s.top_k < width for s in samplings):
        most = torch.tensor([[s.top_k or width] for s in samplings])
        order = scaled.sort(dim=-1, descending=True, stable=True).indices
        ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(width).expand_as(order))
        scaled = scaled.masked_fill(ranks >= most, -math.inf)
    probabilities = scaled.softmax(-1)
    if any(s.top_p is not None and s.top_p < 1 for s in samplings):
        mass = torch.tensor([[2.0 if s.top_p is None or s.top_p >= 1 else s.top_p] for s in samplings])
        probabilities = probabilities.masked_fill(~_shortest(probabilities, -probabilities, mass), 0.0)
    if any(s.min_p for s in samplings):
        share = torch.tensor([[s.min_p or 0.0] for s in samplings])
        threshold = share * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < threshold, 0.0)
    if any(s.typical_p is not None and s.typical_p < 1 for s in samplings):
        probabilities = _typical(probabilities / probabilities.sum(-1, keepdim=True), samplings)
    return probabilities / probabilities.sum(-1, keepdim=True)


def _typical(probabilities: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Meister et al. 2022: nearest to the entropy first."""
    information = -probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    entropy = (probabilities * information).sum(-1, keepdim=True)
    mass = torch.tensor([[2.0 if s.typical_p is None or s.typical_p >= 1 else s.typical_p] for s in samplings])
    distance = (information - entropy).abs().masked_fill(probabilities == 0, math.inf)
    return probabilities.masked_fill(~_shortest(probabilities, distance, mass), 0.0)


def _shortest(probabilities: Tensor, rank: Tensor, mass: Tensor) -> Tensor:
    """bool[R, V]: the shortest prefix, by rising `rank`, that reaches `mass`."""
    order = rank.sort(dim=-1, stable=True).indices
    ordered = probabilities.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, order, before < mass)


def _last_kept(probabilities: Tensor) -> Tensor:
    """Index of the last token with any probability: where rounding must not lead beyond."""
    width = probabilities.shape[-1]
    return width - 1 - (probabilities.flip(-1) > 0).to(torch.uint8).argmax(-1)


# -------------------------------------------------------------------- random numbers

_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_STEP, _PURPOSE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)


def uniforms(keys: Sequence[int], positions: Sequence[int], purpose: int = 0) -> np.ndarray:
    """Numbers in [0, 1), f64: a function of key, position and purpose alone.

    Source: splitmix64 (Steele, Lea and Flood 2014), its finalizer applied to the key and again with the counter.
    """
    key = _mixed(np.array(keys, dtype=np.uint64))
    counter = np.array(positions, dtype=np.uint64) * _STEP + np.array([purpose], dtype=np.uint64) * _PURPOSE
    return (_mixed(_mixed(key + counter)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
