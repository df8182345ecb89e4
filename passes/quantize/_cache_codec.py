"""How keys and values are kept in a quantized cache: the nodes that store and restore them, and the same on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.program import VAL, Program

ops = torch.ops.irc


@dataclass(frozen=True)
class Codec:
    """Numbers of a format with a scale a token and head: irc.quantize and irc.dequantize over rows of D numbers.

    Attributes:
        text: the format, which the cache's metadata says too.
    """

    text: str

    def why_not(self, width: int) -> str | None:
        """Why a head of `width` numbers cannot be stored, or None."""
        problem = formats.parse(self.text).why_not_rows_of(width)
        return None if problem is None else f"a head cannot be stored as {self.text}: {problem}"

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


CODECS = {"int8": Codec("int8.row"), "int4": Codec("int4.row"), "fp8": Codec("f8e4m3.row")}
