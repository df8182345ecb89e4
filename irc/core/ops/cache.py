"""Key-value cache: functional writes, contiguous and paged, and attention over a paged cache.

A write returns a new cache. A program declares which output continues which input
(`Program.aliases`), and a target that owns the buffers then writes in place.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from irc.core.ops.attention import attention
from irc.core.ops.registry import Shape, define_op


def _same_as_cache(cache: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(cache)


def _no_flops(*_: object, **__: object) -> sympy.Expr:
    return sympy.Integer(0)


@define_op("cache_write(Tensor cache, Tensor value, Tensor positions) -> Tensor", fake=_same_as_cache, flops=_no_flops)
def cache_write(cache: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """cache with cache[b, :, positions[b, s], :] = value[b, :, s, :].

    Shapes: cache [B, Hkv, L, D]; value [B, Hkv, S, D]; positions i64[B, S], each in [0, L).
    """
    index = positions.unsqueeze(1).unsqueeze(-1).expand(-1, value.shape[1], -1, value.shape[3])
    written = as_bytes(cache).scatter(2, index, as_bytes(value.to(cache.dtype)))
    return written if written.dtype == cache.dtype else written.view(cache.dtype)


def as_bytes(x: Tensor) -> Tensor:
    """A tensor of an 8-bit float type as bytes, any other as it is: PyTorch scatters no 8-bit floats."""
    return x.view(torch.uint8) if x.is_floating_point() and x.dtype.itemsize == 1 else x


@define_op(
    "paged_cache_write(Tensor cache, Tensor value, Tensor slots) -> Tensor", fake=_same_as_cache, flops=_no_flops
)
def paged_cache_write(cache: Tensor, value: Tensor, slots: Tensor) -> Tensor:
    """cache with cache[slots[n] // P, slots[n] % P] = value[n]; negative slots are padding, not written.

    Shapes: cache [num_blocks, P, Hkv, D], P tokens a block; value [N, Hkv, D] for N flat tokens;
        slots i64[N] (slot = block · P + offset).
    """
    num_blocks, block_size = cache.shape[:2]
    # One block more takes the padding: sent to a real slot, it could undo the write of another token.
    wider = torch.nn.functional.pad(as_bytes(cache), (0, 0, 0, 0, 0, 0, 0, 1))
    target = slots.masked_fill(slots < 0, num_blocks * block_size)
    index = (target // block_size, target % block_size)
    written = wider.index_put(index, as_bytes(value.to(cache.dtype)))[:num_blocks]
    return written if written.dtype == cache.dtype else written.view(cache.dtype)


def _paged_fake(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: Tensor, **__: object) -> Tensor:
    return query.new_empty((*query.shape[:-1], value_cache.shape[-1]), dtype=value_cache.dtype)


def _paged_flops(
    query: Shape, key_cache: Shape, value_cache: Shape, block_tables: Shape, *_: object, **__: object
) -> sympy.Expr:
    num_tokens, heads, width = query
    keys = block_tables[1] * key_cache[1]
    return num_tokens * heads * keys * (2 * width + 2 * value_cache[-1] + 5)


@define_op(
    "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor sequence_ids,"
    " Tensor positions, *, Tensor? bias=None, Tensor? sinks=None, str mask='causal', int? window=None, float scale=1.0,"
    " float? softcap=None) -> Tensor",
    fake=_paged_fake,
    flops=_paged_flops,
    source="Kwon et al. 2023 (PagedAttention), https://arxiv.org/abs/2309.06180",
)
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    *,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: str = "causal",
    window: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Attention of N flat tokens, each over its own sequence's pages: the key at index t is the one of position t.

    Shapes: query [N, H, D]; key_cache, value_cache [num_blocks, P, Hkv, D]; block_tables
        i64[num_sequences, max_blocks] (unused entries: any valid block); sequence_ids, positions i64[N];
        bias [N|1, H|1, L], added to the scores of the keys at positions 0 to L - 1; sinks as in `irc::attention`;
        returns [N, H, Dv] in the values' type.
    """
    tables = block_tables[sequence_ids]

    def pages(cache: Tensor) -> Tensor:
        gathered = cache[tables]  # [N, max_blocks, P, Hkv, D]
        return gathered.flatten(1, 2).transpose(1, 2)

    out = attention(
        query.unsqueeze(2),
        pages(key_cache),
        pages(value_cache),
        bias=None if bias is None else bias_of_keys(bias, tables.shape[1] * key_cache.shape[1]).unsqueeze(2),
        positions=positions.unsqueeze(1),
        sinks=sinks,
        mask=mask,
        window=window,
        scale=scale,
        softcap=softcap,
    )
    return out.squeeze(2)


def bias_of_keys(bias: Tensor, num_keys: int) -> Tensor:
    """bias [..., L] for `num_keys` keys; keys behind L belong to no position, so what they get does not matter."""
    keys = torch.arange(num_keys, device=bias.device).clamp(max=bias.shape[-1] - 1)
    return bias.index_select(-1, keys)
