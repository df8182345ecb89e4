"""8-bit floating point, e4m3 and e5m2, with a float scale per group, row or tensor: `f8e4m3.row`.

Scales computed at run time (a row is a token then) have the same shapes as those stored beside a weight.

Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022); OCP 8-bit Floating Point Specification
(OFP8) 1.0: e4m3 has no infinities and ends at 448, e5m2 follows IEEE 754 and ends at 57344.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
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

_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# Half the distance of the largest neighbours: 448 and 416, 57344 and 49152.
_HALF_STEP = {"e4m3": 16, "e5m2": 4096}
_TEXT = re.compile(rf"f8(?P<kind>e4m3|e5m2)\.{GROUP_PATTERN}")


@dataclass(frozen=True)
class Float8Format(ScaledFormat):
    """value * scale; values stored as PyTorch's float8 types, which safetensors and the text form know."""

    kind: str = "e4m3"
    group_size: int | None = None
    per_tensor: bool = False
    bits: int = field(default=8, init=False, repr=False)
    symmetric: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in _DTYPES:
            raise OptionError(f"an 8-bit float is {' or '.join(_DTYPES)}, not {self.kind!r}")
        check_group(self.group_size, self.per_tensor)

    def __str__(self) -> str:
        return f"f8{self.kind}.{group_text(self.group_size, self.per_tensor)}"

    @property
    def precision(self) -> int:
        return 6 if self.kind == "e4m3" else 5

    @property
    def storage_dtype(self) -> torch.dtype:
        return _DTYPES[self.kind]

    @property
    def high(self) -> float:
        """Largest value: 448 or 57344."""
        return torch.finfo(self.storage_dtype).max

    def stored_shape(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return shape

    def logical_shape(self, stored: tuple[Any, ...]) -> tuple[Any, ...]:
        return stored

    def scales_of_range(
        self, low: Tensor, high: Tensor, scale_dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None
    ) -> Scales:
        """absmax / high; a group of zeros gets scale 1."""
        scale = (torch.maximum(-low, high) / self.high).to(scale_dtype)
        return Scales(scale.masked_fill_(scale == 0, 1))

    def quantize(
        self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None, tensor_scale: Tensor | None = None
    ) -> Tensor:
        assert scale is not None
        values = by_group(x.float(), scale) / scale.float().unsqueeze(-1)
        return values.clamp(-self.high, self.high).flatten(-2).to(self.storage_dtype)

    def dequantize(
        self,
        stored: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        dtype: torch.dtype,
        tensor_scale: Tensor | None = None,
    ) -> Tensor:
        """value * scale, computed in f32 at least."""
        assert scale is not None
        wide = scale.to(torch.promote_types(scale.dtype, torch.float32)).unsqueeze(-1)
        return (by_group(stored.float(), scale) * wide).flatten(-2).to(dtype)

    def worst_errors(self, groups: Tensor) -> Tensor:
        return groups.abs().amax(-1) * (_HALF_STEP[self.kind] / self.high)


def read_float8(text: str) -> Float8Format | None:
    """`f8e4m3.row`, `f8e5m2.g32`, `f8e4m3.tensor`."""
    found = _TEXT.fullmatch(text)
    return None if found is None else Float8Format(found["kind"], *group_from_text(found["group"]))
