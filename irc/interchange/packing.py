"""Integers packed densely into 32-bit words, the first in the lowest bits, along one axis.

32 integers of b bits fill exactly b words; for 3 bits some straddle two words. GPTQ packs its 3-bit weights so too.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def pack_words(values: Tensor, bits: int, *, axis: int) -> Tensor:
    """Integers 0 to 2^bits - 1 → int32, the axis shorter by 32 / bits (rounded up; what is left over is zero)."""
    rows = values.movedim(axis, -1).to(torch.int64)
    width = rows.shape[-1]
    num_words = -(-width * bits // WORD)
    whole = -(-width // WORD) * WORD
    rows = torch.nn.functional.pad(rows, (0, whole - width)).unflatten(-1, (-1, WORD))
    words = rows.new_zeros((*rows.shape[:-1], bits))
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        spread = rows[..., i] << shift
        words[..., word] |= spread & 0xFFFFFFFF
        if shift + bits > WORD:
            words[..., word + 1] |= spread >> WORD
    flat = words.flatten(-2)[..., :num_words]
    signed = torch.where(flat >= 1 << 31, flat - (1 << 32), flat).to(torch.int32)
    return signed.movedim(-1, axis).contiguous()


def unpack_words(words: Tensor, bits: int, count: int, *, axis: int) -> Tensor:
    """The inverse: `count` integers (int16) along the axis."""
    rows = words.movedim(axis, -1).to(torch.int64) & 0xFFFFFFFF
    missing = -rows.shape[-1] % bits
    rows = torch.nn.functional.pad(rows, (0, missing)).unflatten(-1, (-1, bits))
    parts = []
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        value = rows[..., word] >> shift
        if shift + bits > WORD:
            value = value | (rows[..., word + 1] << (WORD - shift))
        parts.append(value & ((1 << bits) - 1))
    flat = torch.stack(parts, dim=-1).flatten(-2)[..., :count].to(torch.int16)
    return flat.movedim(-1, axis).contiguous()


def num_words(count: int, bits: int) -> int:
    return -(-count * bits // WORD)
