"""Quantize and dequantize: the one representation of quantization.

A quantized weight is `irc::dequantize(stored, scale, zero_point, format)` feeding an ordinary op, a quantized
activation is quantize → dequantize, with a scale that is stored or computed by `irc::dynamic_scale`. The
format is a value (see `irc.core.formats`) carried as its text, so targets read it off the node. Parts that a
format does not have are None: a GGUF block brings its own scales; only nvfp4 has a scale for the whole tensor.
In training `irc::fake_quantize` stands for both.
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


def _dynamic(format: str) -> formats.ScaledFormat:
    """A format whose scales can be computed at run time."""
    chosen = formats.parse(format)
    if isinstance(chosen, formats.ScaledFormat) and chosen.symmetric and chosen.takes_scale_dtype:
        return chosen
    raise OptionError(f"a dynamic scale needs a symmetric format with a float scale, not {format}")


def _scale_fake(x: Tensor, *, format: str) -> Tensor:
    shape = _dynamic(format).scale_shape(tuple(x.shape))
    return torch.empty(shape, dtype=_scale_dtype(x), device=x.device)


def _scale_flops(x: Shape, *, format: str) -> sympy.Expr:
    return 2 * sympy.prod(x)


@define_op("dynamic_scale(Tensor x, *, str format) -> Tensor", fake=_scale_fake, flops=_scale_flops)
def dynamic_scale(x: Tensor, *, format: str) -> Tensor:
    """max |x| / largest number, per group of a symmetric format: the scale that x is quantized with at run time.

    `int8.row` over [..., K] gives a scale a token (and head). A group of zeros has scale 1; one that holds NaN
    has scale NaN, so that what is dequantized with it shows.

    Shapes: x [..., K]; returns [..., K / group] in f32 (f64 for f64).
    """
    chosen = _dynamic(format)
    dtype = _scale_dtype(x)
    shape = chosen.scale_shape(tuple(x.shape))
    magnitudes = x.to(dtype).abs()
    if chosen.per_tensor:
        largest = magnitudes.amax().reshape(shape)
    else:
        largest = magnitudes.unflatten(-1, (shape[-1], -1)).amax(-1)
    scale = chosen.scales_of_range(-largest, largest, dtype).scale
    assert scale is not None
    return scale


def _scale_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_quantize_fake(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, *, format: str, learned: bool = False
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_quantize_flops(x: Shape, *_: object, **__: object) -> sympy.Expr:
    return 5 * sympy.prod(x)


@define_op(
    "fake_quantize(Tensor x, Tensor scale, Tensor? zero_point, *, str format, bool learned=False) -> Tensor",
    fake=_fake_quantize_fake,
    flops=_fake_quantize_flops,
    source="Esser et al. 2020 (LSQ), https://arxiv.org/abs/1902.08153; Bengio et al. 2013 (straight-through)",
)
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, *, format: str, learned: bool = False) -> Tensor:
    """dequantize(quantize(x)), number for number, with gradients to train through.

    With v = x / scale: dx is 1 where v lies within the integers' range and 0 outside (straight-through). With
    `learned`, dscale is round(v) - v within and the integer bound outside, times 1 / √(n · largest integer) for
    the n values that share a scale; else 0.

    Shapes: x [..., K]; scale, zero_point [..., K / group]; returns x's shape and type.
    """
    chosen = formats.parse(format)
    if not isinstance(chosen, formats.QuantFormat):
        raise OptionError(f"fake quantization is for integers, not {format}")
    if learned:
        factor = (x.numel() / scale.numel() * chosen.high) ** -0.5
        # The value is scale itself, exactly; only the gradient is multiplied.
        scale = scale.detach() + (scale - scale.detach()) * factor
    else:
        scale = scale.detach()
    step = scale.unsqueeze(-1)
    steps = x.unflatten(-1, (scale.shape[-1], -1)) / step
    # Clamping first, at whole numbers, gives the same integers and stops the gradient outside the range.
    shift = torch.zeros((), dtype=steps.dtype, device=x.device)
    if zero_point is not None:
        shift = zero_point.unsqueeze(-1).to(steps.dtype)
    steps = steps.clamp(chosen.low - shift, chosen.high - shift)
    whole = torch.round(steps).detach() + (steps - steps.detach())
    return (whole.to(scale.dtype) * step).flatten(-2).to(x.dtype)
