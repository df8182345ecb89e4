"""`irc::quantize` and `irc::dequantize` of values computed at run time → `QuantizeLinear`, `DequantizeLinear`.

`QuantizeLinear` clamps to the range of its type. A format with a narrower one (symmetric formats leave out the smallest
integer; fewer bits) has its input clamped first, at the numbers that the format's outermost integers stand for.
"""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.program import VAL, Program
from irc.lowering.onnx.registry import Setting, emit, translates


def _why_not(setting: Setting, program: Program, node: fx.Node) -> str | None:
    chosen = formats.parse(str(node.kwargs["format"]))
    if not isinstance(chosen, formats.QuantFormat) or chosen.packs_two:
        return f"{chosen} is no integer of a byte"
    values = [n.meta[VAL] for n in node.all_input_nodes]
    floats = {v.dtype for v in (*values, node.meta[VAL]) if v.is_floating_point()}
    if floats != {torch.float32}:
        return "is used for f32 only"
    if not chosen.per_tensor:
        # ONNX Runtime 1.32 moves transposes through operators with blocks and leaves the scales as they were.
        return "a scale a row or group is written in plain operators"
    return None


@translates("quantize", "QuantizeLinear", why_not=_why_not)
def quantize(
    setting: Setting, x: Tensor, scale: Tensor, zero_point: Tensor | None, tensor_scale: None = None, *, format: str
) -> Tensor:
    """Rounds half to even, as irc does."""
    chosen = formats.parse(format)
    assert isinstance(chosen, formats.QuantFormat)
    dtype, step = chosen.storage_dtype, scale.reshape(())
    zero = torch.zeros((), dtype=dtype) if zero_point is None else zero_point.reshape(())
    inputs = (_clamped(x, step, zero, chosen), step, zero)
    return emit("QuantizeLinear", inputs, dtype=dtype, shape=x.shape, version=setting.opset)


def _clamped(x: Tensor, step: Tensor, zero: Tensor, chosen: formats.QuantFormat) -> Tensor:
    bounds, shift = torch.iinfo(chosen.storage_dtype), zero.to(x.dtype)
    if chosen.low > bounds.min:
        x = torch.maximum(x, (chosen.low - shift) * step)
    if chosen.high < bounds.max:
        x = torch.minimum(x, (chosen.high - shift) * step)
    return x


@translates("dequantize", "DequantizeLinear", why_not=_why_not)
def dequantize(
    setting: Setting,
    stored: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: None = None,
    *,
    format: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(integers - zero point) · scale."""
    zero = torch.zeros((), dtype=stored.dtype) if zero_point is None else zero_point.reshape(())
    inputs = (stored, scale.reshape(()), zero)
    return emit("DequantizeLinear", inputs, dtype=scale.dtype, shape=stored.shape, version=setting.opset)
