"""Paged caches as PyTorch runs them: writes in place, keys gathered once for each sequence instead of for each token.

The reference op gathers every token's pages. Here the step is planned once (`plan_step`): tokens of one sequence lie
side by side, so sequences with equally many tokens form one dense batch; pages that lie one behind the other are read
where they are. Quantized pages are gathered as they are stored and restored after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irc.core.ops.attention import attention, keep_mask
from irc.core.ops.cache import as_bytes, bias_of_keys
from irc.core.ops.quantization import dequantize


@dataclass(frozen=True)
class StoredPages:
    """Pages of another type than attention reads: parts that are gathered alike, and how rows are restored."""

    parts: tuple[Tensor, ...]
    restore: Callable[..., Tensor]


Pages = Tensor | StoredPages


@dataclass
class Group:
    """Sequences with equally many tokens in a step.

    Attributes:
        tokens: i64[G, c], indices of the tokens, or None when the group is the whole step in order.
        positions: i64[G, c].
        tables: i64[G·M], blocks of all keys that any of them may see, or a pair (first, M) of one sequence's
            blocks that lie one behind the other.
    """

    count: int
    tokens: Tensor | None
    positions: Tensor
    tables: Tensor | tuple[int, int]
    num_keys: int
    masks: dict[Any, Tensor | None] = field(default_factory=dict)

    def mask(self, kind: str, window: int | None, repeats: int) -> Tensor | None:
        """bool[G, 1, repeats·c, T]: which keys a query may see; None: all."""
        key = (kind, window, repeats)
        if key not in self.masks:
            keys = torch.arange(self.num_keys, device=self.positions.device)
            keep = keep_mask(kind, window, self.positions, keys)
            if keep is not None:
                keep = None if bool(keep.all()) else keep.unsqueeze(1).repeat(1, 1, repeats, 1)
            self.masks[key] = keep
        return self.masks[key]


@dataclass(frozen=True)
class StepPlan:
    """What all attentions of a step share.

    Attributes:
        written: indices of the tokens that are written, or None: all of them.
    """

    groups: list[Group]
    slots: Tensor
    written: Tensor | None


def plan_step(
    block_tables: Tensor, sequence_ids: Tensor, positions: Tensor, slots: Tensor, block_size: int
) -> StepPlan:
    """Group the sequences of a step by their number of tokens."""
    written = None
    if slots.numel() and int(slots.min()) < 0:
        written = (slots >= 0).nonzero().squeeze(1)
        slots = slots[written]
    num_tokens, num_sequences = len(positions), len(block_tables)
    per_sequence = torch.bincount(sequence_ids, minlength=num_sequences)
    counts = per_sequence.tolist()
    if counts and min(counts) == max(counts):
        shaped = positions.view(num_sequences, -1)
        return StepPlan([_group(counts[0], None, shaped, block_tables, block_size)], slots, written)
    starts = torch.cumsum(per_sequence, 0) - per_sequence
    groups = []
    for count in sorted(set(counts) - {0}):
        rows = (per_sequence == count).nonzero().squeeze(1)
        tokens = starts[rows].unsqueeze(1) + torch.arange(count, device=positions.device)
        groups.append(_group(count, tokens, positions[tokens], block_tables[rows], block_size))
    assert num_tokens == sum(counts)
    return StepPlan(groups, slots, written)


def _group(count: int, tokens: Tensor | None, positions: Tensor, tables: Tensor, block_size: int) -> Group:
    num_blocks = int(positions.max()) // block_size + 1
    used = tables[:, :num_blocks]
    num_keys = num_blocks * block_size
    if len(used) == 1:
        first = int(used[0, 0])
        if used[0].tolist() == list(range(first, first + num_blocks)):
            return Group(count, tokens, positions, (first, num_blocks), num_keys)
    return Group(count, tokens, positions, used.reshape(-1), num_keys)


def write_pages(cache: Tensor, value: Tensor, plan: StepPlan) -> Tensor:
    """`irc::paged_cache_write` into the cache itself."""
    if plan.written is not None:
        value = value[plan.written]
    as_bytes(cache).flatten(0, 1).index_copy_(0, plan.slots, as_bytes(value.to(cache.dtype)))
    return cache


def stored_pages(stored: Tensor, *parts: Any, **options: Any) -> StoredPages:
    """`irc::dequantize` of pages, put off until they are gathered."""
    tensors = tuple(part for part in parts if isinstance(part, Tensor))
    places = [i for i, part in enumerate(parts) if isinstance(part, Tensor)]

    def restore(rows: Tensor, *gathered: Tensor) -> Tensor:
        given = list(parts)
        for place, part in zip(places, gathered, strict=True):
            given[place] = part
        return dequantize(rows, *given, **options)

    return StoredPages((stored, *tensors), restore)


def converted_pages(stored: Tensor, *, dtype: torch.dtype) -> StoredPages:
    """`aten._to_copy` of pages, put off until they are gathered."""
    return StoredPages((stored,), lambda rows: rows.to(dtype))


def attend_pages(
    query: Tensor,
    key_pages: Pages,
    value_pages: Pages,
    plan: StepPlan,
    *,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: str = "causal",
    window: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`irc::paged_attention` over a planned step: [N, H, D] → [N, H, Dv]."""
    plain = bias is None and sinks is None and softcap is None
    out: Tensor | None = None
    for group in plan.groups:
        queries = query.unflatten(0, group.positions.shape) if group.tokens is None else query[group.tokens]
        keys, values = _gather(key_pages, group), _gather(value_pages, group)
        if plain:
            made = _fused(queries, keys, values, group, mask, window, scale)
        else:
            made = attention(
                queries.transpose(1, 2), keys, values, bias=_bias(bias, group), positions=group.positions,
                sinks=sinks, mask=mask, window=window, scale=scale, softcap=softcap,
            ).transpose(1, 2)  # fmt: skip
        if group.tokens is None:
            return made.flatten(0, 1)
        if out is None:
            out = made.new_empty((query.shape[0], *made.shape[2:]))
        out[group.tokens] = made
    assert out is not None
    return out


def _fused(
    queries: Tensor, keys: Tensor, values: Tensor, group: Group, mask: str, window: int | None, scale: float
) -> Tensor:
    """PyTorch's attention; query heads of one key-value head become rows, so that no key is repeated."""
    count, heads = queries.shape[1:3]
    kv_heads = keys.shape[1]
    repeats = heads // kv_heads
    rows = queries.transpose(1, 2)
    if repeats > 1:
        rows = rows.unflatten(1, (kv_heads, repeats)).flatten(2, 3)
    made = F.scaled_dot_product_attention(rows, keys, values, attn_mask=group.mask(mask, window, repeats), scale=scale)
    if repeats > 1:
        made = made.unflatten(2, (repeats, count)).flatten(1, 2)
    return made.transpose(1, 2)


def _gather(pages: Pages, group: Group) -> Tensor:
    """[G, Hkv, T, D]: the keys (or values) of the group's sequences."""
    if isinstance(pages, StoredPages):
        rows = pages.restore(*(_rows(part, group) for part in pages.parts))
    else:
        rows = _rows(pages, group)
    return rows.transpose(1, 2)


def _rows(cache: Tensor, group: Group) -> Tensor:
    """[G, T, Hkv, D]."""
    if isinstance(group.tables, tuple):
        first, count = group.tables
        return cache[first : first + count].flatten(0, 1).unsqueeze(0)
    rows = as_bytes(cache).index_select(0, group.tables)
    return rows.view(cache.dtype).view(group.positions.shape[0], -1, *cache.shape[2:])


def _bias(bias: Tensor | None, group: Group) -> Tensor | None:
    """[G|1, H|1, c, T] of a bias [N|1, H|1, L]."""
    if bias is None:
        return None
    keys = bias_of_keys(bias, group.num_keys)
    if bias.shape[0] == 1:
        return keys.unsqueeze(2)
    rows = keys.unflatten(0, group.positions.shape) if group.tokens is None else keys[group.tokens]
    return rows.transpose(1, 2)
