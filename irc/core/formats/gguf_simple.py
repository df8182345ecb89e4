"""GGUF blocks of 32 numbers with one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

A block: the f16 scale; for the `_1` types the f16 offset (the block's minimum); for 5 bits a 32-bit word of
the numbers' top bits; the low nibbles of numbers 0 to 15 with those of 16 to 31 above them, or 32 signed bytes.

Source: llama.cpp, `quantize_row_q*_ref` in `ggml/src/ggml-quants.c`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32


class Simple(NamedTuple):
    """bits: of an integer; has_offset: number = scale * integer + offset, integers from 0; else centred."""

    bits: int
    has_offset: bool

    @property
    def num_bytes(self) -> int:
        return 2 + 2 * self.has_offset + BLOCK * self.bits // 8

    @property
    def low(self) -> int:
        return 0 if self.has_offset else -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return self.low + (1 << self.bits) - 1


SIMPLE = {
    "q4_0": Simple(4, False),
    "q4_1": Simple(4, True),
    "q5_0": Simple(5, False),
    "q5_1": Simple(5, True),
    "q8_0": Simple(8, False),
}


class Split(NamedTuple):
    """number = scales * integers + offsets.

    Shapes: integers [..., blocks, groups, n] int16; scales, offsets [..., blocks, groups, 1] f32.
    """

    integers: Tensor
    scales: Tensor
    offsets: Tensor | None


def halves(data: Tensor) -> Tensor:
    """Bytes [..., 2 n] → the n f16 numbers in them, as f32."""
    return data.contiguous().view(torch.float16).float()


def half_bytes(values: Tensor) -> Tensor:
    """f32 [..., n] → the bytes [..., 2 n] of their nearest f16 numbers."""
    return values.to(torch.float16).contiguous().view(torch.uint8)


def split_simple(form: Simple, blocks: Tensor) -> Split:
    scales = halves(blocks[..., 0:2]).unsqueeze(-1)
    offsets = halves(blocks[..., 2:4]).unsqueeze(-1) if form.has_offset else None
    rest = blocks[..., 4 if form.has_offset else 2 :]
    if form.bits == 8:
        return Split(rest.contiguous().view(torch.int8).to(torch.int16).unsqueeze(-2), scales, offsets)
    top, low = (rest[..., :4], rest[..., 4:]) if form.bits == 5 else (None, rest)
    integers = torch.cat((low & 0xF, low >> 4), dim=-1).to(torch.int16)
    if top is not None:
        positions = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        integers = integers + (
            (torch.bitwise_right_shift(top.unsqueeze(-1), positions) & 1).flatten(-2).to(torch.int16) << 4
        )
    return Split((integers + form.low).unsqueeze(-2), scales, offsets)


def join_simple(form: Simple, integers: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor:
    """Integers [..., blocks, 32], scales and offsets [..., blocks, 1] → bytes [..., blocks, num_bytes]."""
    parts = [half_bytes(scales)]
    if offsets is not None:
        parts.append(half_bytes(offsets))
    if form.bits == 8:
        return torch.cat((*parts, integers.to(torch.int8).view(torch.uint8)), dim=-1)
    codes = (integers - form.low).to(torch.uint8)
    if form.bits == 5:
        weights = torch.tensor([1 << i for i in range(8)], dtype=torch.int16, device=codes.device)
        bits = (codes >> 4).to(torch.int16).unflatten(-1, (4, 8))
        parts.append((bits * weights).sum(-1).to(torch.uint8))
    parts.append((codes[..., : BLOCK // 2] & 0xF) | (codes[..., BLOCK // 2 :] << 4))
    return torch.cat(parts, dim=-1)


def round_simple(form: Simple, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(integers, scales, offsets) of blocks [..., 32]: to nearest by the scale before its rounding to f16.

    Centred types of 4 and 5 bits give the number of largest magnitude the lowest integer, which has the largest
    magnitude; Q8_0 stays symmetric. Offset types span minimum to maximum.
    """
    if form.has_offset:
        offsets = x.amin(-1, keepdim=True)
        scales = (x.amax(-1, keepdim=True) - offsets) / form.high
        codes = ((x - offsets) * _inverse(scales) + 0.5).trunc().clamp(0, form.high)
        return codes, scales, offsets
    if form.bits == 8:
        scales = x.abs().amax(-1, keepdim=True) / form.high
        values = x * _inverse(scales)
        whole = values.abs().floor()
        return (whole + (2 * (values.abs() - whole)).floor()) * values.sign(), scales, None
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    scales = largest / form.low
    codes = (x * _inverse(scales) + (0.5 - form.low)).trunc().clamp(0, form.high - form.low)
    return codes + form.low, scales, None


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0, 1 / scales)
