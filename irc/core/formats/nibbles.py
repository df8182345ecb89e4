"""Two 4-bit numbers to a byte, even index in the low nibble: the layout of 4-bit integers and of fp4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irc.core.errors import OptionError


def pack_nibbles(values: Tensor) -> Tensor:
    """Numbers 0 to 15 (uint8) [..., K] → bytes [..., K / 2]."""
    if values.shape[-1] % 2:
        raise OptionError(f"4-bit storage packs pairs: the last size {values.shape[-1]} is odd")
    pairs = values.contiguous().view(torch.int16)  # even numbers in the low byte, so without strided reads
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack_nibbles(stored: Tensor) -> Tensor:
    """Bytes [..., K / 2] → numbers 0 to 15 (uint8) [..., K]."""
    pairs = stored.to(torch.int16)
    return ((pairs | (pairs << 4)) & 0x0F0F).view(torch.uint8)


def packed_shape(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*shape[:-1], shape[-1] // 2)


def unpacked_shape(stored: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*stored[:-1], stored[-1] * 2)


def why_not_pairs(width: int) -> str | None:
    return f"4-bit numbers are stored in pairs, and its rows have {width}" if width % 2 else None
