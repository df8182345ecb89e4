"""What a checkpoint layout does: one layer's tensors to a weight in a format and back, and the configuration.

A layout says `Refusal(reason)` for what it cannot hold; `loading` and `saving` collect these over all layers. Those
that there are: `layouts`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from irc.core.formats import Format, Parts, QuantFormat


class Refusal(Exception):
    """Why one layer, or a configuration, cannot be taken. Never leaves the package."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear layer's weight [N, K] in a format.

    Attributes:
        order: where each input column lies among the stored columns, if these are sorted by group (GPTQ's
            act-order): weight = dequantized[:, order].
    """

    parts: Parts
    format: Format
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.format.logical_shape(tuple(self.parts.stored.shape))
        return int(rows), int(width)

    def codes(self, bits: int) -> tuple[Tensor, Tensor]:
        """Integers 0 to 2^bits - 1 [N, K] (int16), and zero points on the same scale [N, groups]."""
        chosen = self.format
        if not isinstance(chosen, QuantFormat):
            raise Refusal(f"{chosen} is no integer format")
        if chosen.bits != bits:
            raise Refusal(f"{chosen} has {chosen.bits} bits, not {bits}")
        assert self.parts.scale is not None
        move = 1 << (bits - 1) if chosen.signed else 0
        zero = torch.zeros_like(self.parts.scale, dtype=torch.int16)
        if self.parts.zero_point is not None:
            zero = self.parts.zero_point.to(torch.int16)
        return chosen.unpack(self.parts.stored) + move, zero + move


def from_codes(
    codes: Tensor, zero: Tensor, scale: Tensor, bits: int, group_size: int | None, *, order: Tensor | None = None
) -> QuantizedWeight:
    """The weight of unsigned integers [N, K] and zero points [N, groups]: symmetric if all of these are the middle."""
    middle = 1 << (bits - 1)
    if bool((zero == middle).all()):
        chosen = QuantFormat(bits, group_size)
        return QuantizedWeight(Parts(_plain(chosen.pack(codes - middle)), _plain(scale)), chosen, order)
    chosen = QuantFormat(bits, group_size, symmetric=False, signed=False)
    parts = Parts(_plain(chosen.pack(codes)), _plain(scale), _plain(zero.to(torch.uint8)))
    return QuantizedWeight(parts, chosen, order)


def _plain(tensor: Tensor) -> Tensor:
    """In row-major order; a column that was a row has odd strides and calls itself contiguous."""
    return tensor.clone(memory_format=torch.contiguous_format)


class Layout(ABC):
    """A way to lay out quantized layers in a state dict."""

    method: ClassVar[str]
    """`quant_method` of the configuration."""

    @property
    @abstractmethod
    def marks(self) -> tuple[str, ...]:
        """Tensor names that only quantized layers have."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[str, ...]:
        """Every tensor name of a quantized layer (the bias is not one)."""

    @abstractmethod
    def unpack(self, module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        """The weight of shape [N, K] in a layer's tensors; raises `Refusal`."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """A layer's tensors; raises `Refusal`."""


# -------------------------------------------------------------------- checks that layouts share


def need(tensors: Mapping[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> Tensor:
    """A layer's tensor of that name, type and shape."""
    if name not in tensors:
        raise Refusal(f"{name} is missing")
    tensor = tensors[name]
    if tensor.dtype not in dtypes:
        raise Refusal(f"{name} has type {tensor.dtype}, not {' or '.join(map(str, dtypes))}")
    if tuple(tensor.shape) != shape:
        raise Refusal(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
    return tensor


def need_scale(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    scale = need(tensors, name, (torch.float16, torch.bfloat16, torch.float32), shape)
    if not bool(torch.isfinite(scale).all()):
        raise Refusal(f"{name} holds numbers that are not finite")
    return scale


def number(config: Mapping[str, Any], *names: str) -> int:
    """The whole number in a configuration under the first of these names that it has."""
    for name in names:
        if name in config:
            value = config[name]
            if isinstance(value, bool) or not isinstance(value, int):
                raise Refusal(f"{name} must be a whole number, not {value!r}")
            return value
    raise Refusal(f"{names[0]} is missing")


def group_of(config: Mapping[str, Any], *names: str) -> int | None:
    """The group size in a configuration; None: whole rows (-1)."""
    size = number(config, *names)
    if size != -1 and size < 1:
        raise Refusal(f"{names[0]} must be positive or -1, not {size}")
    return None if size == -1 else size


def groups_in(width: int, group_size: int | None) -> int:
    if group_size is None:
        return 1
    if width % group_size:
        raise Refusal(f"group size {group_size} does not divide its {width} inputs")
    return width // group_size


def as_half(scale: Tensor) -> Tensor:
    """Scales as f16, if that changes none."""
    half = scale.to(torch.float16)
    wrong = half.to(torch.float64) != scale.to(torch.float64)
    if bool(wrong.any()):
        raise Refusal(
            f"{int(wrong.sum())} of {scale.numel()} scales of type {scale.dtype} cannot be held as f16"
            " (quantize with scale_dtype='f16')"
        )
    return half


def one_shape(weights: Mapping[str, QuantizedWeight]) -> tuple[int, int | None, bool]:
    """(bits, group size, symmetric) that all weights share; for layouts that have one configuration for all."""
    found: dict[tuple[int, int | None], list[str]] = {}
    problems = []
    for module, weight in weights.items():
        chosen = weight.format
        if not isinstance(chosen, QuantFormat) or chosen.per_tensor:
            problems.append(f"{module}: {chosen} is no integer format with scales a group or row")
        else:
            found.setdefault((chosen.bits, chosen.group_size), []).append(module)
    if len(found) > 1:
        problems += [
            f"{names[0]} and {len(names) - 1} more: {b} bits, group size {g}" for (b, g), names in found.items()
        ]
        problems.append("one configuration must hold for all layers")
    if problems:
        raise Refusal("; ".join(problems))
    if not found:
        raise Refusal("the program has no quantized linear layer")
    bits, group_size = next(iter(found))
    return bits, group_size, all(w.parts.zero_point is None for w in weights.values())
