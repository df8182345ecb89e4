"""Quantize and dequantize: the one representation of quantization.

A quantized weight is `irc::dequantize(stored, scale, zero_point, format)` feeding an ordinary op. The
format is a value (see `irc.core.formats`) carried as its text, so targets read it off the node. Parts that a
format does not have are None: a GGUF block brings its own scales; only nvfp4 has a scale for the whole tensor.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from irc.core import formats
from irc.core.errors import OptionError
from irc.core.ops.registry import Shape, define_op


def _read(format: str, scale: Tensor | None, zero_point: Tensor | None, tensor_scale: Tensor | None) -> formats.Format:
    """The format, after a look at whether its parts are there."""
    chosen = formats.parse(format)
    needs_scale = isinstance(chosen, formats.ScaledFormat)
    problems = []
    if needs_scale != (scale is not None):
        problems.append(f"{'needs a' if needs_scale else 'has no'} scale")
    if chosen.has_tensor_scale != (tensor_scale is not None):
        problems.append(f"{'needs a' if chosen.has_tensor_scale else 'has no'} tensor_scale")
    if zero_point is not None and not isinstance(chosen, formats.QuantFormat):
        problems.append("has no zero_point")
    if problems:
        raise OptionError(f"format {format} " + " and ".join(problems))
    return chosen


def _dequantize_fake(
    stored: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None = None,
    *,
    format: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    chosen = _read(format, scale, zero_point, tensor_scale)
    shape = chosen.logical_shape(tuple(stored.shape))
    return torch.empty(shape, dtype=dtype or chosen.result_dtype(scale), device=stored.device)


def _elements(stored: Shape, *_: object, format: str, **__: object) -> sympy.Expr:
    return 2 * sympy.prod(formats.parse(format).logical_shape(stored))


@define_op(
    "dequantize(Tensor stored, Tensor? scale, Tensor? zero_point, Tensor? tensor_scale=None, *,"
    " str format, ScalarType? dtype=None) -> Tensor",
    fake=_dequantize_fake,
    flops=_elements,
)
def dequantize(
    stored: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None = None,
    *,
    format: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(unpacked numbers - zero_point) * scale, per group of the format.

    Shapes: stored: what the format packs a [..., K] tensor to; scale, zero_point [..., K / group] (None for GGUF
        blocks); tensor_scale [1] (nvfp4 only); returns [..., K] in `dtype` (default: scale's type for formats
        with a float scale, f32 for the others).
    """
    chosen = _read(format, scale, zero_point, tensor_scale)
    return chosen.dequantize(stored, scale, zero_point, dtype or chosen.result_dtype(scale), tensor_scale)


def _quantize_fake(
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None = None,
    *,
    format: str,
) -> Tensor:
    chosen = _read(format, scale, zero_point, tensor_scale)
    return torch.empty(chosen.stored_shape(tuple(x.shape)), dtype=chosen.storage_dtype, device=x.device)


def _quantize_flops(x: Shape, *_: object, **__: object) -> sympy.Expr:
    return 3 * sympy.prod(x)


@define_op(
    "quantize(Tensor x, Tensor? scale, Tensor? zero_point, Tensor? tensor_scale=None, *, str format) -> Tensor",
    fake=_quantize_fake,
    flops=_quantize_flops,
)
def quantize(
    x: Tensor, scale: Tensor | None, zero_point: Tensor | None, tensor_scale: Tensor | None = None, *, format: str
) -> Tensor:
    """clamp(round(x / scale) + zero_point), packed as the format says; rounds half to even.

    Shapes: x [..., K]; scale, zero_point [..., K / group]; tensor_scale [1]; returns the packed numbers.
    """
    chosen = _read(format, scale, zero_point, tensor_scale)
    return chosen.quantize(x, scale, zero_point, tensor_scale)
