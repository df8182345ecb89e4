"""Rows of f32 to GGUF blocks, with or without an importance for each column."""

from __future__ import annotations

from torch import Tensor

from irc.core import formats


def quantize_rows(values: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """u8 [n, bytes] of f32 [n, K]."""
    return formats.parse(kind).quantize(values, None)
