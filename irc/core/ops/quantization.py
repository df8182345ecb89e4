"""Quantize and dequantize: the one representation of quantization.

A quantized weight is `irc::dequantize(stored, scale, zero_point, format)` feeding an ordinary op. The
format is a value (see `irc.core.formats`) carried as its text, so targets read it off the node.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from irc.core import formats
from irc.core.ops.registry import Shape, define_op


def _dequantize_fake(
    stored: Tensor, scale: Tensor, zero_point: Tensor | None, *, format: str, dtype: torch.dtype | None = None
) -> Tensor:
    shape = formats.parse(format).logical_shape(tuple(stored.shape))
    return torch.empty(shape, dtype=dtype or scale.dtype, device=stored.device)


def _elements(stored: Shape, *_: object, format: str, **__: object) -> sympy.Expr:
    return 2 * sympy.prod(formats.parse(format).logical_shape(stored))


@define_op(
    "dequantize(Tensor stored, Tensor scale, Tensor? zero_point, *, str format, ScalarType? dtype=None) -> Tensor",
    fake=_dequantize_fake,
    flops=_elements,
)
def dequantize(
    stored: Tensor, scale: Tensor, zero_point: Tensor | None, *, format: str, dtype: torch.dtype | None = None
) -> Tensor:
    """(unpacked integers - zero_point) * scale, per group of the format.

    Shapes: stored: what the format packs a [..., K] tensor to; scale, zero_point [..., K / group];
        returns [..., K] in `dtype` (default: scale's type).
    """
    return formats.parse(format).dequantize(stored, scale, zero_point, dtype or scale.dtype)


def _quantize_fake(x: Tensor, scale: Tensor, zero_point: Tensor | None, *, format: str) -> Tensor:
    chosen = formats.parse(format)
    return torch.empty(chosen.stored_shape(tuple(x.shape)), dtype=chosen.storage_dtype, device=x.device)


def _quantize_flops(x: Shape, *_: object, **__: object) -> sympy.Expr:
    return 3 * sympy.prod(x)


@define_op(
    "quantize(Tensor x, Tensor scale, Tensor? zero_point, *, str format) -> Tensor",
    fake=_quantize_fake,
    flops=_quantize_flops,
)
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, *, format: str) -> Tensor:
    """clamp(round(x / scale) + zero_point), packed as the format says; rounds half to even.

    Shapes: x [..., K]; scale, zero_point [..., K / group]; returns the packed integers.
    """
    return formats.parse(format).quantize(x, scale, zero_point)
