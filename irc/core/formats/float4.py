"""4-bit floating point (e2m1): with float scales (`f4e2m1.g32`), and the block formats mxfp4 and nvfp4.

The values of e2m1 are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; bits, from the top: sign, two of
exponent, one of mantissa. Two lie in a byte, even index in the low nibble.

| text | block | scale | scale of the tensor |
| --- | --- | --- | --- |
| `f4e2m1.g32`, `.row`, `.tensor` | any | float | |
| `mxfp4` | 32 | a power of two, its exponent + 127 in a byte (e8m0; 255 is NaN) | |
| `nvfp4` | 16 | f8e4m3 | f32, multiplied |

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.2, 5.3.3, 5.4.1 and 6.3 (the power of two is
that of the largest magnitude over that of 6, so magnitudes over 6 scales saturate); NVIDIA's "Pretraining Large
Language Models with NVFP4" (2025) and the layout of ModelOpt's `weight`, `weight_scale`, `weight_scale_2`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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

HIGH = 6.0
_TEXT = re.compile(rf"f4e2m1\.{GROUP_PATTERN}")
_E8M0_BIAS, _E8M0_MAX = 127, 254
_E4M3_MAX = 448.0
_E4M3_MIN = 2.0**-9


def encode_e2m1(values: Tensor) -> Tensor:
    """f32 → codes 0 to 15 (uint8): to nearest, ties to the even code, saturating at ±6; keeps the sign of zero."""
    size = values.abs().clamp(max=HIGH)
    # Codes count up by 0.5 below 2, by 1 below 4, by 2 from there: rounding to integers is rounding to codes.
    code = torch.where(size < 2, (size * 2).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    return code.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Codes (uint8) → f32. The bits of e2m1 are, moved into place, an e4m3 number 2^6 times smaller."""
    return (((codes & 7) << 2) | ((codes & 8) << 4)).view(torch.float8_e4m3fn).float() * 64


@dataclass(frozen=True)
class Float4Format(ScaledFormat):
    """e2m1 value * scale."""

    group_size: int | None = None
    per_tensor: bool = False
    bits: int = field(default=4, init=False, repr=False)
    symmetric: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_group(self.group_size, self.per_tensor)

    def __str__(self) -> str:
        return f"f4e2m1.{group_text(self.group_size, self.per_tensor)}"

    @property
    def precision(self) -> int:
        return 3 if self.group_size is None or self.group_size > 128 else 4

    @property
    def row_multiple(self) -> int:
        return math.lcm(self.group_size or 1, 2)

    def stored_shape(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return packed_shape(shape)

    def logical_shape(self, stored: tuple[Any, ...]) -> tuple[Any, ...]:
        return unpacked_shape(stored)

    def why_not_rows_of(self, width: int) -> str | None:
        return super().why_not_rows_of(width) or why_not_pairs(width)

    def real_scale(self, scale: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
        """The numbers that the stored scales stand for, in f32 at least."""
        return scale.to(torch.promote_types(scale.dtype, torch.float32))

    def scales_of_range(
        self, low: Tensor, high: Tensor, scale_dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None
    ) -> Scales:
        """absmax / 6; a group of zeros gets scale 1."""
        scale = (torch.maximum(-low, high) / HIGH).to(scale_dtype)
        return Scales(scale.masked_fill_(scale == 0, 1))

    def quantize(
        self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None, tensor_scale: Tensor | None = None
    ) -> Tensor:
        assert scale is not None
        values = by_group(x.float(), scale) / self.real_scale(scale, tensor_scale).unsqueeze(-1)
        return self.pack(values.flatten(-2))

    def dequantize(
        self,
        stored: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        dtype: torch.dtype,
        tensor_scale: Tensor | None = None,
    ) -> Tensor:
        """value * scale, computed in f32 (nvfp4: value * (scale * tensor_scale))."""
        assert scale is not None
        values = by_group(self.unpack(stored), scale)
        return (values * self.real_scale(scale, tensor_scale).unsqueeze(-1)).flatten(-2).to(dtype)

    def pack(self, values: Tensor) -> Tensor:
        """f32 in units of the scale → storage."""
        return pack_nibbles(encode_e2m1(values))

    def unpack(self, stored: Tensor) -> Tensor:
        """Storage → f32 in units of the scale."""
        return decode_e2m1(unpack_nibbles(stored))

    def worst_errors(self, groups: Tensor) -> Tensor:
        """Half the distance of 4 and 6."""
        return groups.abs().amax(-1) / 6


@dataclass(frozen=True)
class MxFloat4Format(Float4Format):
    """OCP mxfp4: blocks of 32 share a power of two."""

    group_size: int | None = field(default=32, init=False, repr=False)
    per_tensor: bool = field(default=False, init=False, repr=False)

    def __str__(self) -> str:
        return "mxfp4"

    @property
    def takes_scale_dtype(self) -> bool:
        return False

    def scale_dtype(self, wanted: torch.dtype) -> torch.dtype:
        return torch.uint8

    def result_dtype(self, scale: Tensor | None) -> torch.dtype:
        return torch.float32

    def real_scale(self, scale: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
        return scale.view(torch.float8_e8m0fnu).float()

    def scales_of_range(
        self, low: Tensor, high: Tensor, scale_dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None
    ) -> Scales:
        """2^(floor(log2(absmax)) - 2); a block of zeros gets scale 1."""
        largest = torch.maximum(-low, high)
        exponent = torch.frexp(largest).exponent - 3 + _E8M0_BIAS
        exponent = exponent.clamp(0, _E8M0_MAX).masked_fill(largest == 0, _E8M0_BIAS)
        return Scales(exponent.to(torch.uint8))

    def worst_errors(self, groups: Tensor) -> Tensor:
        """Magnitudes just under 8 scales saturate at 6."""
        return groups.abs().amax(-1) / 4


@dataclass(frozen=True)
class NvFloat4Format(Float4Format):
    """NVIDIA's nvfp4: blocks of 16 share an e4m3 scale, the tensor an f32 scale."""

    group_size: int | None = field(default=16, init=False, repr=False)
    per_tensor: bool = field(default=False, init=False, repr=False)

    def __str__(self) -> str:
        return "nvfp4"

    @property
    def takes_scale_dtype(self) -> bool:
        return False

    @property
    def has_tensor_scale(self) -> bool:
        return True

    def scale_dtype(self, wanted: torch.dtype) -> torch.dtype:
        return torch.float8_e4m3fn

    def result_dtype(self, scale: Tensor | None) -> torch.dtype:
        return torch.float32

    def real_scale(self, scale: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
        assert tensor_scale is not None
        return scale.float() * tensor_scale

    def tensor_scale_of(self, low: Tensor, high: Tensor) -> Tensor:
        """The largest block's scale becomes the largest e4m3 number; a tensor of zeros gets 1."""
        scale = torch.maximum(-low, high).float().reshape(1) / (HIGH * _E4M3_MAX)
        return scale.masked_fill_(scale == 0, 1)

    def scales_of_range(
        self, low: Tensor, high: Tensor, scale_dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None
    ) -> Scales:
        """absmax / 6 / tensor_scale in e4m3, never 0."""
        if tensor_scale is None:
            tensor_scale = self.tensor_scale_of(low.amin(), high.amax())
        scale = torch.maximum(-low, high) / HIGH / tensor_scale
        return Scales(scale.clamp(_E4M3_MIN, _E4M3_MAX).to(torch.float8_e4m3fn), None, tensor_scale)

    def worst_errors(self, groups: Tensor) -> Tensor:
        """Half the distance of 4 and 6, after the scale was rounded by at most a sixteenth or half of 2^-9."""
        coarse = groups.abs().amax() / _E4M3_MAX * _E4M3_MIN
        return groups.abs().amax(-1) * ((1 / 6 + 1 / 16) / (1 - 1 / 16)) + coarse


def read_float4(text: str) -> Float4Format | None:
    """`f4e2m1.g32`, `f4e2m1.row`, `mxfp4`, `nvfp4`."""
    if text == "mxfp4":
        return MxFloat4Format()
    if text == "nvfp4":
        return NvFloat4Format()
    found = _TEXT.fullmatch(text)
    return None if found is None else Float4Format(*group_from_text(found["group"]))
