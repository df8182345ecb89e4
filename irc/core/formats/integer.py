"""Integers of 2 to 8 bits with a scale, and a zero point if asymmetric, per group, row or tensor.

`QuantFormat(bits=4, group_size=32)` prints as `int4.g32` and parses back from it; graph nodes carry
that text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from irc.core.errors import OptionError
from irc.core.formats.base import (
    GROUP_PATTERN,
    ScaledFormat,
    Scales,
    by_group,
    check_group,
    group_from_text,
    group_text,
)
from irc.core.formats.nibbles import pack_nibbles, packed_shape, unpack_nibbles, unpacked_shape, why_not_pairs

_TEXT = re.compile(rf"(?P<sign>u?)int(?P<bits>[2-8])\.{GROUP_PATTERN}(?P<asym>\.asym)?")


@dataclass(frozen=True)
class QuantFormat(ScaledFormat):
    """Integers of `bits` bits with a scale (and a zero point if asymmetric) per group.

    Attributes:
        bits: 2 to 8.
        group_size: neighbours along the last axis that share a scale; None: the whole row.
        symmetric: no zero point; the range is ±(2^(bits-1) - 1).
        signed: integers run from -2^(bits-1), else from 0.
        per_tensor: one scale for everything (then group_size is None).

    Storage: 8 bits: one int8/uint8 each. 4 bits: two to a byte along the last axis, even index in the
    low nibble, signed values offset by 8. Other widths: one byte each.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    signed: bool = True
    per_tensor: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise OptionError(f"bits must be 2 to 8, not {self.bits}")
        check_group(self.group_size, self.per_tensor)

    def __str__(self) -> str:
        group = group_text(self.group_size, self.per_tensor)
        return f"{'' if self.signed else 'u'}int{self.bits}.{group}{'' if self.symmetric else '.asym'}"

    @property
    def precision(self) -> int:
        coarse = self.group_size is None or self.group_size > 128
        return max(2, self.bits - 1) if coarse else self.bits

    @property
    def low(self) -> int:
        """Smallest integer. Symmetric signed formats leave out -2^(bits-1), so that ±x are alike."""
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + (1 if self.symmetric else 0)

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def lowest_stored(self) -> int:
        """Smallest integer that can be stored, if not chosen by rounding: -2^(bits-1) or 0."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def packs_two(self) -> bool:
        return self.bits == 4

    @property
    def row_multiple(self) -> int:
        return math.lcm(self.group_size or 1, 2 if self.packs_two else 1)

    @property
    def storage_dtype(self) -> torch.dtype:
        return torch.int8 if self.signed and not self.packs_two else torch.uint8

    @property
    def zero_point_dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    def stored_shape(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return packed_shape(shape) if self.packs_two else shape

    def logical_shape(self, stored: tuple[Any, ...]) -> tuple[Any, ...]:
        return unpacked_shape(stored) if self.packs_two else stored

    def why_not_rows_of(self, width: int) -> str | None:
        return super().why_not_rows_of(width) or (why_not_pairs(width) if self.packs_two else None)

    def scales_of_range(
        self, low: Tensor, high: Tensor, scale_dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None
    ) -> Scales:
        """Symmetric: absmax / high. Asymmetric: the range, widened to hold 0, over all integers.

        A group of zeros gets scale 1.
        """
        if self.symmetric:
            scale = _or_one((torch.maximum(-low, high) / self.high).to(scale_dtype))
            return Scales(scale)
        low = low.clamp(max=0)
        scale = _or_one(((high.clamp(min=0) - low) / (self.high - self.low)).to(scale_dtype))
        # From the scale as stored, so that its rounding is made up for.
        zero_point = (self.low - low / scale.float()).round_().clamp_(self.low, self.high)
        return Scales(scale, zero_point.to(self.zero_point_dtype))

    def quantize(
        self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None, tensor_scale: Tensor | None = None
    ) -> Tensor:
        assert scale is not None
        values = torch.round(by_group(x, scale) / scale.unsqueeze(-1))
        if zero_point is not None:
            values = values + zero_point.unsqueeze(-1)
        return self.pack(values.clamp(self.low, self.high).flatten(-2).to(torch.int16))

    def dequantize(
        self,
        stored: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        dtype: torch.dtype,
        tensor_scale: Tensor | None = None,
    ) -> Tensor:
        """(integers - zero_point) * scale, computed in f32 at least and rounded once to `dtype`.

        f32 holds the integers and their products with a scale of half the width exactly.
        """
        assert scale is not None
        wide = torch.promote_types(scale.dtype, torch.float32)
        values = by_group(self._unpack_floats(stored), scale)
        if zero_point is not None:
            values = values.sub_(zero_point.unsqueeze(-1).float())
        return values.to(wide).mul_(scale.unsqueeze(-1).to(wide)).flatten(-2).to(dtype)

    def pack(self, values: Tensor) -> Tensor:
        """Integers → storage."""
        if not self.packs_two:
            return values.to(self.storage_dtype)
        # Numbers 0 to 15: the conversion to signed bytes is five times as fast.
        return pack_nibbles((values + (8 if self.signed else 0)).to(torch.int8).view(torch.uint8))

    def unpack(self, stored: Tensor) -> Tensor:
        """Storage → integers (int16)."""
        if not self.packs_two:
            return stored.to(torch.int16)
        return unpack_nibbles(stored).to(torch.int16) - (8 if self.signed else 0)

    def _unpack_floats(self, stored: Tensor) -> Tensor:
        """Storage → integers (f32), in memory of their own."""
        if not self.packs_two:
            return stored.float()
        values = unpack_nibbles(stored).float()
        return values.sub_(8) if self.signed else values

    def worst_errors(self, groups: Tensor) -> Tensor:
        """Half a step."""
        if self.symmetric:
            return groups.abs().amax(-1) / (2 * self.high)
        span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
        return span / (2 * (self.high - self.low))


def _or_one(scale: Tensor) -> Tensor:
    return scale.masked_fill_(scale == 0, 1)


def read_integer(text: str) -> QuantFormat | None:
    """`int4.g32`, `uint8.tensor.asym`, …"""
    found = _TEXT.fullmatch(text)
    if found is None:
        return None
    group_size, per_tensor = group_from_text(found["group"])
    return QuantFormat(
        bits=int(found["bits"]),
        group_size=group_size,
        symmetric=found["asym"] is None,
        signed=found["sign"] == "",
        per_tensor=per_tensor,
    )
