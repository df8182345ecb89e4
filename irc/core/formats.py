"""Quantization formats as values: how integers stand for real numbers and how they are stored.

`QuantFormat(bits=4, group_size=32)` prints as `int4.g32` and parses back from it; graph nodes carry
that text. Scales run along the last axis: one scale per `group_size` neighbours, per row
(`group_size=None`: per channel), or one for the whole tensor (`per_tensor`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from irc.core.errors import OptionError, ParseError

_TEXT = re.compile(r"(?P<sign>u?)int(?P<bits>[2-8])\.(?P<group>g[1-9]\d{0,9}|row|tensor)(?P<asym>\.asym)?")


@dataclass(frozen=True)
class QuantFormat:
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
        if self.group_size is not None and self.group_size < 1:
            raise OptionError(f"group_size must be positive, not {self.group_size}")
        if self.per_tensor and self.group_size is not None:
            raise OptionError("a per-tensor format has no group_size")

    def __str__(self) -> str:
        group = "tensor" if self.per_tensor else "row" if self.group_size is None else f"g{self.group_size}"
        return f"{'' if self.signed else 'u'}int{self.bits}.{group}{'' if self.symmetric else '.asym'}"

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
    def packs_two(self) -> bool:
        return self.bits == 4

    @property
    def storage_dtype(self) -> torch.dtype:
        return torch.int8 if self.signed and not self.packs_two else torch.uint8

    def stored_shape(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """Shape of the packed tensor for a tensor of that shape."""
        return (*shape[:-1], shape[-1] // 2) if self.packs_two else shape

    def logical_shape(self, stored: tuple[Any, ...]) -> tuple[Any, ...]:
        """Shape of the numbers that a packed tensor of that shape holds."""
        return (*stored[:-1], stored[-1] * 2) if self.packs_two else stored

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of scale and zero point; raises `OptionError` when the group does not divide."""
        if self.per_tensor:
            return (1,) * len(shape)
        if self.group_size is None:
            return (*shape[:-1], 1)
        if shape[-1] % self.group_size:
            raise OptionError(f"group size {self.group_size} does not divide {shape[-1]} (shape {list(shape)})")
        return (*shape[:-1], shape[-1] // self.group_size)

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Packed integers of x; rounds half to even, saturates."""
        values = torch.round(_grouped(x, scale) / scale.unsqueeze(-1))
        if zero_point is not None:
            values = values + zero_point.unsqueeze(-1)
        return self.pack(values.clamp(self.low, self.high).flatten(-2).to(torch.int16))

    def dequantize(self, stored: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Real numbers of a packed tensor, computed in scale's type and rounded once to `dtype`."""
        values = _grouped(self.unpack(stored), scale)
        if zero_point is not None:
            values = values - zero_point.unsqueeze(-1).to(values.dtype)
        return (values.to(scale.dtype) * scale.unsqueeze(-1)).flatten(-2).to(dtype)

    def pack(self, values: Tensor) -> Tensor:
        """Integers → storage."""
        if not self.packs_two:
            return values.to(self.storage_dtype)
        if values.shape[-1] % 2:
            raise OptionError(f"4-bit storage packs pairs: the last size {values.shape[-1]} is odd")
        offset = (values + (8 if self.signed else 0)).to(torch.uint8)
        return offset[..., 0::2] | (offset[..., 1::2] << 4)

    def unpack(self, stored: Tensor) -> Tensor:
        """Storage → integers (int16)."""
        if not self.packs_two:
            return stored.to(torch.int16)
        pairs = torch.stack((stored & 0xF, stored >> 4), dim=-1).flatten(-2)
        return pairs.to(torch.int16) - (8 if self.signed else 0)


def _grouped(values: Tensor, scale: Tensor) -> Tensor:
    """[..., K] → [..., groups, K / groups], so that a scale of one entry a group broadcasts."""
    return values.unflatten(-1, (scale.shape[-1], -1))


@lru_cache(maxsize=256)
def parse(text: str) -> QuantFormat:
    """Read `int4.g32`, `uint8.tensor.asym`, …: the inverse of `str(format)`."""
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ParseError(f"{text!r} is not a quantization format; examples: int4.g32, int8.row, uint8.tensor.asym")
    group = found["group"]
    return QuantFormat(
        bits=int(found["bits"]),
        group_size=int(group[1:]) if group.startswith("g") else None,
        symmetric=found["asym"] is None,
        signed=found["sign"] == "",
        per_tensor=group == "tensor",
    )
