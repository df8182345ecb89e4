"""Rows of f32 to GGUF blocks, with or without an importance for each column."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from irc.core import formats
from irc.core.formats import gguf_k, gguf_search
from irc.lowering.gguf import super_blocks

_Search = Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]
_SEARCHES: dict[str, tuple[_Search, Callable[..., Tensor]]] = {
    "q2_k": (gguf_search.search_q2_k, gguf_k.join_q2_k),
    "q3_k": (gguf_search.search_q3_k, gguf_k.join_q3_k),
    "q4_k": (gguf_search.search_q4_k, gguf_k.join_q4_k),
    "q5_k": (gguf_search.search_q5_k, gguf_k.join_q5_k),
    "q6_k": (gguf_search.search_q6_k, gguf_k.join_q6_k),
}
# Numbers at a time: the search keeps a dozen tensors of that size, which should stay in the cache.
_BLOCK = 1 << 18


def quantize_rows(values: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """u8 [n, bytes] of f32 [n, K].

    Super-blocks are made by compiled code where there is a compiler; the bytes are the same without.

    `importance`: f32 [K], the mean square of what each column is multiplied by; super-blocks weigh errors by it,
    the types of 32 numbers round to nearest whatever it says.
    """
    if kind in super_blocks.KINDS and super_blocks.available():
        return super_blocks.quantize(values, kind, importance)
    step = max(1, _BLOCK // values.shape[-1])
    return torch.cat([search_rows(rows, kind, importance) for rows in values.split(step)])


def search_rows(values: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """The same with PyTorch's operations."""
    if importance is None or kind not in _SEARCHES:
        return formats.parse(kind).quantize(values, None)
    search, join = _SEARCHES[kind]
    blocks = values.unflatten(-1, (-1, 256))
    return join(*search(blocks, importance.view(1, -1, 256).expand_as(blocks))).flatten(-2)
