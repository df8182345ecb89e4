"""How keys and values are kept in a quantized cache: the nodes that store and restore them, and the same on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.program import VAL, Program

aten, ops = torch.ops.aten, torch.ops.irc

_FP8 = torch.float8_e4m3fn
_FP8_LARGEST = 448.0
# The smallest row maximum that is told from zero: keeps scales normal numbers.
_TINY = 1e-30


@dataclass(frozen=True)
class IntegerCodec:
    """Integers with a scale a token and head: irc.quantize and irc.dequantize over rows of D numbers."""

    bits: int

    @property
    def text(self) -> str:
        """What the cache's metadata says."""
        return f"int{self.bits}.row"

    def why_not(self, width: int) -> str | None:
        """Why a head of `width` numbers cannot be stored, or None."""
        return f"4-bit numbers are stored in pairs, and a head has {width}" if self.bits == 4 and width % 2 else None

    def stored(self, shape: tuple[Any, ...]) -> tuple[tuple[Any, ...], torch.dtype]:
        """Shape and type of the stored cache for a cache of that shape."""
        form = formats.parse(self.text)
        return form.stored_shape(shape), form.storage_dtype

    def encode(self, program: Program, value: fx.Node, before: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Nodes of the stored numbers and their scales."""
        scale = program.insert(ops.dynamic_scale.default, value, before=before, format=self.text)
        return program.insert(ops.quantize.default, value, scale, None, before=before, format=self.text), scale

    def decode(self, program: Program, stored: fx.Node, scale: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        """Node of the numbers that are read back."""
        options: dict[str, Any] = {} if dtype == scale.meta[VAL].dtype else {"dtype": dtype}
        return program.insert(ops.dequantize.default, stored, scale, None, before=before, format=self.text, **options)

    def encode_tensor(self, value: Tensor) -> tuple[Tensor, Tensor]:
        scale = ops.dynamic_scale(value, format=self.text)
        return ops.quantize(value, scale, None, format=self.text), scale

    def decode_tensor(self, stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return ops.dequantize(stored, scale, None, format=self.text, dtype=dtype)


@dataclass(frozen=True)
class Float8Codec:
    """fp8 (e4m3) with a scale a token and head that takes the largest of D numbers to 448."""

    text: str = "fp8"

    def why_not(self, width: int) -> str | None:
        return None

    def stored(self, shape: tuple[Any, ...]) -> tuple[tuple[Any, ...], torch.dtype]:
        return shape, _FP8

    def encode(self, program: Program, value: fx.Node, before: fx.Node) -> tuple[fx.Node, fx.Node]:
        wide = value
        if value.meta[VAL].dtype != torch.float32:
            wide = program.insert(aten._to_copy.default, value, before=before, dtype=torch.float32)
        largest = program.insert(
            aten.amax.default, program.insert(aten.abs.default, wide, before=before), [-1], True, before=before
        )
        kept = program.insert(aten.clamp_min.default, largest, _TINY, before=before)
        scale = program.insert(aten.div.Tensor, kept, _FP8_LARGEST, before=before)
        steps = program.insert(aten.div.Tensor, wide, scale, before=before)
        return program.insert(aten._to_copy.default, steps, before=before, dtype=_FP8), scale

    def decode(self, program: Program, stored: fx.Node, scale: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        wide = program.insert(aten._to_copy.default, stored, before=before, dtype=torch.float32)
        value = program.insert(aten.mul.Tensor, wide, scale, before=before)
        if dtype == torch.float32:
            return value
        return program.insert(aten._to_copy.default, value, before=before, dtype=dtype)

    def encode_tensor(self, value: Tensor) -> tuple[Tensor, Tensor]:
        scale = value.float().abs().amax(-1, keepdim=True).clamp_min(_TINY) / _FP8_LARGEST
        return (value.float() / scale).to(_FP8), scale

    def decode_tensor(self, stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return (stored.float() * scale).to(dtype)


Codec = IntegerCodec | Float8Codec
CODECS: dict[str, Codec] = {"int8": IntegerCodec(8), "int4": IntegerCodec(4), "fp8": Float8Codec()}
