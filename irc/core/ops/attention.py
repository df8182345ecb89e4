"""Attention: one canonical op, its memory-efficient twin, and the key-value cache writes.

Mask kinds (`mask=`), in terms of a query at absolute position p and a key at index t:

- `full`: every key.
- `causal`: t ≤ p.
- `sliding`: p - window < t ≤ p.
- `chunked`: t ≤ p and t // window == p // window.

Without `positions`, query s of S sits at p = T - S + s, so that the last query sees the last key.
With `positions` [B, S] each query says its own p: keys then sit in a cache, index = position.
`bias` [B|1, H|1, S, T] is added to the scores (float) or keeps where true (bool), on top of the mask.
A row with every key masked out gives zeros.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from irc.core.ops.registry import Shape, define_op

MASKS = ("full", "causal", "sliding", "chunked")

_ARGUMENTS = (
    "(Tensor query, Tensor key, Tensor value, *, Tensor? bias=None, Tensor? positions=None, Tensor? sinks=None,"
    " str mask='full', int? window=None, float scale=1.0, float? softcap=None) -> Tensor"
)
# Block of scores of flash attention; large enough that a step is worth its overhead in Python.
_QUERY_BLOCK, _KEY_BLOCK = 128, 256


def _fake(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=value.dtype)


def _flops(query: Shape, key: Shape, value: Shape, **_: object) -> sympy.Expr:
    batch, heads, queries, width = query
    keys = key[-2]
    return batch * heads * queries * keys * (2 * width + 2 * value[-1] + 5)


def keep_mask(mask: str, window: int | None, query_positions: Tensor, key_positions: Tensor) -> Tensor | None:
    """bool[..., S, T], true where the query at position p may see key t; None for `full`."""
    if mask == "full":
        return None
    p, t = query_positions.unsqueeze(-1), key_positions
    keep = t <= p
    if mask == "causal":
        return keep
    if window is None:
        raise ValueError(f"mask={mask!r} needs a window")
    if mask == "sliding":
        return keep & (t > p - window)
    if mask == "chunked":
        return keep & (t // window == p // window)
    raise ValueError(f"unknown mask {mask!r}; known: {', '.join(MASKS)}")


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, Hkv, T, D] → [B, H, T, D]: each key-value head serves H / Hkv consecutive query heads."""
    repeats = num_heads // x.shape[1]
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)


@define_op("attention" + _ARGUMENTS, fake=_fake, flops=_flops, source="Vaswani et al. 2017")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: str = "full",
    window: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """softmax(cap(query · keyᵀ · scale) + bias, masked) · value, softmax in f32.

    Shapes: query [B, H, S, D]; key [B, Hkv, T, D]; value [B, Hkv, T, Dv], H a multiple of Hkv;
        sinks [H] (one extra logit a head that takes probability and gives nothing);
        returns [B, H, S, Dv] in value's type.
    `softcap` c: scores become c·tanh(scores / c) before bias and mask (Gemma 2).
    """
    num_heads, num_keys = query.shape[1], key.shape[2]
    key, value = repeat_heads(key, num_heads), repeat_heads(value, num_heads)
    scores = (query @ key.transpose(-1, -2)).to(_wide(query)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    key_positions = torch.arange(num_keys, device=query.device)
    if positions is None:
        query_positions = torch.arange(query.shape[2], device=query.device) + (num_keys - query.shape[2])
    else:
        query_positions = positions.unsqueeze(1)
    scores = _apply_masks(scores, bias, keep_mask(mask, window, query_positions, key_positions))
    return (_softmax(scores, sinks).to(value.dtype)) @ value


@define_op(
    "flash_attention" + _ARGUMENTS,
    fake=_fake,
    flops=_flops,
    source="Dao 2023 (FlashAttention-2), https://arxiv.org/abs/2307.08691",
)
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: str = "full",
    window: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`irc::attention` with an online softmax over blocks of keys: the scores are never whole in memory.

    Shapes: as `irc::attention`. Peak memory beyond inputs and result is one block of scores a head and,
    for a block of queries, its accumulator: O(S) altogether.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    plain = bias is None and positions is None and sinks is None and softcap is None
    if plain and (mask == "full" or (mask == "causal" and num_queries == num_keys)) and _has_flash(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            _rows_packed(query), _rows_packed(key), _rows_packed(value),
            is_causal=mask == "causal", scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    out = query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=value.dtype)
    for start in range(0, num_queries, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, num_queries)
        first_key, last_key = 0, num_keys
        if positions is None:
            p = torch.arange(start, stop, device=query.device) + (num_keys - num_queries)
            offset = num_keys - num_queries
            first_key, last_key = _key_range(mask, window, start + offset, stop - 1 + offset, num_keys)
        else:
            p = positions[:, start:stop].unsqueeze(1)
        state = _SoftmaxState(query[:, :, start:stop], value, sinks)
        for first in range(first_key, last_key, _KEY_BLOCK):
            last = min(first + _KEY_BLOCK, last_key)
            scores = _grouped_matmul(query[:, :, start:stop], key[:, :, first:last].transpose(-1, -2))
            scores = scores.to(_wide(query)) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            part = None if bias is None else _bias_block(bias, start, stop, first, last)
            keep = keep_mask(mask, window, p, torch.arange(first, last, device=query.device))
            state.update(_apply_masks(scores, part, keep), value[:, :, first:last])
        out[:, :, start:stop] = state.result()
    return out


class _SoftmaxState:
    """Running maximum, sum and weighted values of a block of queries (the online softmax)."""

    def __init__(self, queries: Tensor, value: Tensor, sinks: Tensor | None) -> None:
        wide = _wide(queries)
        self.top = queries.new_full((*queries.shape[:-1], 1), -torch.inf, dtype=wide)
        self.total = torch.zeros_like(self.top)
        if sinks is not None:
            self.top = sinks.to(wide).view(1, -1, 1, 1).expand_as(self.top)
            self.total = torch.ones_like(self.top)
        self.values = queries.new_zeros((*queries.shape[:-1], value.shape[-1]), dtype=wide)

    def update(self, scores: Tensor, value: Tensor) -> None:
        """Take in the scores of a block of keys and those keys' values."""
        top = torch.maximum(self.top, scores.amax(-1, keepdim=True))
        # Rows without any key so far have no finite maximum to shift by.
        shift = torch.where(top == -torch.inf, 0.0, top)
        weights = torch.exp(scores - shift)
        decay = torch.exp(self.top - shift)
        self.total = self.total * decay + weights.sum(-1, keepdim=True)
        self.values = self.values * decay + _grouped_matmul(weights, value.to(weights.dtype))
        self.top = top

    def result(self) -> Tensor:
        """The attention of the block; zeros for a row that saw no key."""
        return self.values / torch.where(self.total == 0, 1.0, self.total)


def _grouped_matmul(left: Tensor, right: Tensor) -> Tensor:
    """left [B, H, S, M] · right [B, Hkv, M, N] → [B, H, S, N], without a copy of `right` for each query head."""
    repeats = left.shape[1] // right.shape[1]
    if repeats == 1:
        return left @ right
    stacked = left.unflatten(1, (right.shape[1], repeats)).flatten(2, 3)
    return (stacked @ right).unflatten(2, (repeats, -1)).flatten(1, 2)


def _key_range(mask: str, window: int | None, first: int, last: int, num_keys: int) -> tuple[int, int]:
    """The keys [start, stop) that queries at positions first to last can see."""
    if mask == "full":
        return 0, num_keys
    start = 0
    if mask == "sliding" and window is not None:
        start = max(0, first - window + 1)
    elif mask == "chunked" and window is not None:
        start = max(0, first // window * window)
    return start, max(start, min(num_keys, last + 1))


def _has_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True where PyTorch has a kernel for full and causal attention that keeps no scores."""
    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    if query.device.type == "cuda":  # without a mask, its f32 and half kernels need equal heads and aligned rows
        return same and query.shape[1] == key.shape[1] and query.shape[-1] % 8 == 0
    return same and query.device.type == "cpu" and query.is_floating_point()


def _rows_packed(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _bias_block(bias: Tensor, start: int, stop: int, first: int, last: int) -> Tensor:
    rows = bias if bias.shape[-2] == 1 else bias[..., start:stop, :]
    return rows if rows.shape[-1] == 1 else rows[..., first:last]


def _apply_masks(scores: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return scores if keep is None else scores.masked_fill(~keep, -torch.inf)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over keys in which a fully masked row gives zeros instead of NaN."""
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1)
        top = torch.maximum(top, sink)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    return weights / torch.where(total == 0, 1.0, total)
