"""What every number format promises: text form, shapes of its stored parts, and the way there and back.

A format is a value. A tensor in it consists of `Parts`: the packed numbers, and beside them what the format
needs to read them, a scale per group, a zero point per group, a scale for the whole tensor, or nothing
where the scales lie in the packed blocks themselves. Groups run along the last axis.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irc.core.errors import OptionError


class Scales(NamedTuple):
    """What a format needs beside the packed numbers; None where it needs nothing."""

    scale: Tensor | None = None
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None


class Parts(NamedTuple):
    """A tensor in a format: the arguments of `irc::dequantize` in their order."""

    stored: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self if part is not None)


class Format(ABC):
    """How stored bits stand for real numbers.

    Attributes:
        bits: bits of one element, scales not counted.
        group_size: neighbours along the last axis that share a scale; None: the whole row or tensor.
        per_tensor: one scale for everything (then group_size is None).
        symmetric: no zero point.
        precision: bits of the integers in small groups that lose about as much on weights.
    """

    bits: int
    group_size: int | None
    per_tensor: bool
    symmetric: bool

    @property
    @abstractmethod
    def precision(self) -> int: ...

    @property
    def storage_dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def row_multiple(self) -> int:
        """Rows must be a multiple of this long."""
        return self.group_size or 1

    @property
    def has_tensor_scale(self) -> bool:
        return False

    @property
    def takes_scale_dtype(self) -> bool:
        """Whether the scales' type is the user's choice, not the format's."""
        return True

    # ------------------------------------------------------------ shapes

    @abstractmethod
    def stored_shape(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """Shape of the packed tensor for a tensor of that shape."""

    @abstractmethod
    def logical_shape(self, stored: tuple[Any, ...]) -> tuple[Any, ...]:
        """Shape of the numbers that a packed tensor of that shape holds."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of scale and zero point (None: no such parts).

        Raises:
            OptionError: the group does not divide the last size.
        """
        if self.per_tensor:
            return (1,) * len(shape)
        if self.group_size is None:
            return (*shape[:-1], 1)
        if shape[-1] % self.group_size:
            raise OptionError(f"group size {self.group_size} does not divide {shape[-1]} (shape {list(shape)})")
        return (*shape[:-1], shape[-1] // self.group_size)

    def why_not_rows_of(self, width: int) -> str | None:
        """Why rows of that length cannot be stored, or None if they can."""
        if self.group_size is not None and width % self.group_size:
            return f"group size {self.group_size} does not divide its rows of {width}"
        return None

    def scale_dtype(self, wanted: torch.dtype) -> torch.dtype:
        """Type of the scales, when `wanted` is asked for."""
        return wanted

    def result_dtype(self, scale: Tensor | None) -> torch.dtype:
        """Type of the dequantized numbers when none is asked for."""
        return torch.float32 if scale is None else scale.dtype

    def num_bytes(self, shape: tuple[int, ...], scale_dtype: torch.dtype = torch.float32) -> int:
        """Bytes of a tensor of that shape as stored, scales and zero points included."""
        total = math.prod(self.stored_shape(shape)) * self.storage_dtype.itemsize
        groups = self.scale_shape(shape)
        if groups is not None:
            per_group = self.scale_dtype(scale_dtype).itemsize + (0 if self.symmetric else 1)
            total += math.prod(groups) * per_group
        return total + (4 if self.has_tensor_scale else 0)

    def bits_per_weight(self, shape: tuple[int, ...] | None = None, scale_dtype: torch.dtype = torch.float32) -> float:
        """Stored bits a number, scales included; without a shape: of a tensor so large that only groups count."""
        if shape is not None:
            return 8 * self.num_bytes(shape, scale_dtype) / math.prod(shape)
        width = self.row_multiple if self.group_size is not None else 1 << 40
        whole = self.num_bytes((1, width), scale_dtype) - (4 if self.has_tensor_scale else 0)
        return round(8 * whole / width, 6)

    # ------------------------------------------------------------ numbers

    @abstractmethod
    def compute_scales(self, x: Tensor, scale_dtype: torch.dtype = torch.float32) -> Scales:
        """Scales by the extreme values of each group, so that none of them saturates."""

    @abstractmethod
    def quantize(
        self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None = None, tensor_scale: Tensor | None = None
    ) -> Tensor:
        """Packed numbers of x: to nearest, ties to even; saturates."""

    @abstractmethod
    def dequantize(
        self,
        stored: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        dtype: torch.dtype,
        tensor_scale: Tensor | None = None,
    ) -> Tensor:
        """Real numbers of a packed tensor, rounded once to `dtype`."""

    @abstractmethod
    def worst_errors(self, groups: Tensor) -> Tensor:
        """Largest error that rounding to nearest may make in each group: [..., groups, K] → [..., groups]."""

    @property
    def check_group(self) -> int | None:
        """Neighbours that `worst_errors` judges together (None: whole rows)."""
        return self.group_size


class ScaledFormat(Format):
    """A format with a scale beside the packed numbers."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        found = super().scale_shape(shape)
        assert found is not None
        return found

    @abstractmethod
    def scales_of_range(
        self, low: Tensor, high: Tensor, scale_dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None
    ) -> Scales:
        """Scales of groups whose numbers run from `low` to `high`, f32 tensors of the scales' shape."""

    def tensor_scale_of(self, low: Tensor, high: Tensor) -> Tensor | None:
        """The scale of a whole tensor whose numbers run from `low` to `high`; None if the format has none."""
        return None

    def compute_scales(self, x: Tensor, scale_dtype: torch.dtype = torch.float32) -> Scales:
        x = x.detach()
        shape = self.scale_shape(tuple(x.shape))
        if self.per_tensor:
            low, high = (bound.float().reshape(shape) for bound in torch.aminmax(x))
        else:
            groups = x.float().unflatten(-1, (shape[-1], -1))
            low, high = groups.amin(-1), groups.amax(-1)
        return self.scales_of_range(low, high, scale_dtype, self.tensor_scale_of(low.amin(), high.amax()))


def by_group(values: Tensor, scale: Tensor) -> Tensor:
    """[..., K] → [..., groups, K / groups], so that a scale of one entry a group broadcasts."""
    return values.unflatten(-1, (scale.shape[-1], -1))


def group_text(group_size: int | None, per_tensor: bool) -> str:
    """`tensor`, `row` or `g32`."""
    return "tensor" if per_tensor else "row" if group_size is None else f"g{group_size}"


GROUP_PATTERN = r"(?P<group>g[1-9]\d{0,9}|row|tensor)"


def group_from_text(text: str) -> tuple[int | None, bool]:
    """(group size, per tensor) of what `group_text` wrote."""
    return (int(text[1:]) if text.startswith("g") else None), text == "tensor"


def check_group(group_size: int | None, per_tensor: bool) -> None:
    if group_size is not None and group_size < 1:
        raise OptionError(f"group_size must be positive, not {group_size}")
    if per_tensor and group_size is not None:
        raise OptionError("a per-tensor format has no group_size")
