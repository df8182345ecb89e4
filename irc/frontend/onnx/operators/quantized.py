"""Quantized numbers: weights become `irc::dequantize` over the file's own integers and scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irc.core.errors import CaptureError
from irc.core.formats import QuantFormat
from irc.frontend.onnx.calls import Call, operator
from irc.frontend.onnx.operators.contrib import blocks


@operator("DequantizeLinear")
def dequantize_linear(call: Call) -> Tensor:
    """(x - zero point) · scale: per tensor, along an axis, or in blocks."""
    x, scale, zero = call.tensor(0), call.tensor(1), call.maybe(2)
    axis, block = call.attribute("axis", 1), call.attribute("block_size", 0)
    four_bits = call.attribute("irc_four_bits", False)
    if x.dtype not in (torch.int8, torch.uint8):
        raise CaptureError(f"DequantizeLinear {call.name!r}: {x.dtype} is not read")
    if scale.dim() > 0 and scale.numel() > 1 and not block and x.dim() != 2:
        return _along_axis(x, scale, zero, axis)
    if scale.numel() > 1:
        axis %= x.dim()
        if x.dim() != 2:
            return _in_blocks(x, scale, zero, axis, block)
        # The format's groups lie along the last axis: turned before and after, if they are another's.
        along_last = (axis == 1) == bool(block)
        if not along_last:
            x, scale, zero = x.t(), scale.t() if block else scale, zero.t() if block and zero is not None else zero
        scale = scale if block else scale.unsqueeze(1)
        zero = zero if block or zero is None else zero.unsqueeze(1)
    else:
        along_last, block = True, 0
        scale = scale.reshape([1] * x.dim())
        zero = None if zero is None else zero.reshape([1] * x.dim())
    signed = x.dtype == torch.int8
    form = QuantFormat(
        4 if four_bits else 8, group_size=int(block) or None if scale.numel() > 1 else None, symmetric=zero is None,
        signed=signed, per_tensor=scale.numel() == 1,
    )  # fmt: skip
    stored = _stored(x.contiguous(), form)
    result = torch.ops.irc.dequantize(
        stored, scale.contiguous(), None if zero is None else zero.contiguous(), format=str(form)
    )
    return result if along_last else result.t()


def _stored(x: Tensor, form: QuantFormat) -> Tensor:
    if not form.packs_two:
        return x
    raised = x.to(torch.int16) + (8 if form.signed else 0)
    pairs = raised.unflatten(-1, (-1, 2))
    return (pairs[..., 0] | (pairs[..., 1] << 4)).to(torch.uint8)


def _along_axis(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    if axis == 0:  # the kernel of a convolution: a scale a row, as the format has it
        form = QuantFormat(8, symmetric=zero is None, signed=x.dtype == torch.int8)
        rows = torch.ops.irc.dequantize(
            x.flatten(1), scale.unsqueeze(1), None if zero is None else zero.unsqueeze(1), format=str(form)
        )
        return rows.reshape(x.shape)
    shape = [1] * x.dim()
    shape[axis % x.dim()] = -1
    whole = x.to(scale.dtype)
    return (whole if zero is None else whole - zero.to(scale.dtype).reshape(shape)) * scale.reshape(shape)


def _in_blocks(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int, block: int) -> Tensor:
    spread = scale.repeat_interleave(block, axis)
    whole = x.to(scale.dtype)
    return (whole if zero is None else whole - zero.to(scale.dtype).repeat_interleave(block, axis)) * spread


@operator("QuantizeLinear")
def quantize_linear(call: Call) -> Tensor:
    """One scale and zero point for all."""
    x, scale, zero = call.tensor(0), call.tensor(1), call.maybe(2)
    dtype = zero.dtype if zero is not None else torch.uint8
    if scale.numel() != 1 or dtype not in (torch.int8, torch.uint8):
        raise CaptureError(f"QuantizeLinear {call.name!r}: only 8-bit integers with one scale are read")
    form = QuantFormat(8, symmetric=False, signed=dtype == torch.int8, per_tensor=True)
    shape = [1] * x.dim()
    zero = torch.zeros(shape, dtype=dtype) if zero is None else zero.reshape(shape)
    return torch.ops.irc.quantize(x, scale.reshape(shape), zero, format=str(form))


@operator("MatMulNBits", domain="com.microsoft")
def matmul_nbits(call: Call) -> Tensor:
    """linear(x, dequantize(blocks, scales, zero points)): 4 and 8 bits, in whole blocks."""
    x, stored, scales, zeros = call.tensor(0), call.tensor(1), call.tensor(2), call.maybe(3)
    bits, block, width, rows = (call.attribute(n) for n in ("bits", "block_size", "K", "N"))
    bits = 4 if bits is None else bits
    if bits not in (4, 8) or width % block or call.has(4) or (zeros is not None and zeros.dtype != torch.uint8):
        raise CaptureError(f"MatMulNBits {call.name!r}: {bits} bits in blocks of {block} of {width} are not read")
    weight = blocks(stored.reshape(rows, -1), scales.reshape(rows, width // block), zeros, bits, block)
    bias: Any = call.maybe(5)
    return torch.nn.functional.linear(x, weight, bias)
