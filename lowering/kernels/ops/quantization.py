"""Quantize and dequantize by element, for integers with a scale; other formats are read when a program is compiled."""

from __future__ import annotations

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from irc.core import formats
from irc.core.formats import QuantFormat
from irc.lowering.kernels.definitions import At, Call, apply, convert, defines, literal, settle
from irc.lowering.kernels.values import REGISTER, Value


def _why_not(call: Call) -> str | None:
    chosen = formats.parse(call.raw("format"))
    return None if isinstance(chosen, QuantFormat) else f"numbers in {chosen} at run time"


def _format(call: Call) -> QuantFormat:
    chosen = formats.parse(call.raw("format"))
    assert isinstance(chosen, QuantFormat)
    return chosen


def _group(chosen: QuantFormat, at: At) -> At:
    """Index of the scale of an element."""
    if chosen.per_tensor:
        return tuple(sympy.Integer(0) for _ in at)
    if chosen.group_size is None:
        return (*at[:-1], sympy.Integer(0))
    return (*at[:-1], FloorDiv(at[-1], chosen.group_size))


@defines("irc.dequantize", kind="pointwise", refuses=_why_not)
def dequantize(call: Call, index: At) -> Value:
    """(integer - zero point) · scale."""
    chosen, stored, scale = _format(call), call.operand("stored"), call.operand("scale")
    group = _group(chosen, index)
    if chosen.packs_two:
        byte = stored.at((*index[:-1], FloorDiv(index[-1], 2)))
        shift = convert(call.definer.number(Mod(index[-1], 2) * 4), "i32")
        value = apply("bitwise_and", apply("shift_right", byte, shift), literal(15, "i32"))
        if chosen.signed:
            value = apply("sub", value, literal(8, "i32"))
    else:
        value = stored.at(index)
    if call.has("zero_point"):
        value = apply("sub", value, call.operand("zero_point").at(group))
    wide = REGISTER[scale.dtype]
    return settle(apply("mul", convert(value, wide), convert(scale.at(group), wide)), call.dtype)


@defines("irc.quantize", kind="pointwise", refuses=_why_not)
def quantize(call: Call, index: At) -> Value:
    """clamp(round(x / scale) + zero point), two to a byte for four bits."""
    chosen = _format(call)
    if not chosen.packs_two:
        return settle(_integer(call, chosen, index), call.dtype)
    offset = literal(8 if chosen.signed else 0, "i32")
    low, high = (apply("add", _integer(call, chosen, (*index[:-1], 2 * index[-1] + i)), offset) for i in range(2))
    return apply("bitwise_or", low, apply("shift_left", high, literal(4, "i32")))


def _integer(call: Call, chosen: QuantFormat, at: At) -> Value:
    x, scale = call.operand("x"), call.operand("scale")
    group = _group(chosen, at)
    wide = "f64" if "f64" in (x.dtype, scale.dtype) else "f32"
    value = apply("round", apply("div", convert(x.at(at), wide), convert(scale.at(group), wide)))
    if call.has("zero_point"):
        value = apply("add", value, convert(call.operand("zero_point").at(group), wide))
    return apply("bounded", value, literal(chosen.low, "i32"), literal(chosen.high, "i32"), dtype="i32")


@defines("irc.dynamic_scale", kind="reduction", refuses=_why_not)
def dynamic_scale(call: Call, index: At) -> Value:
    """max |x| / largest integer over a group; 1 for a group of zeros."""
    chosen, x = _format(call), call.operand("x")
    wide = REGISTER[call.dtype]
    if chosen.per_tensor:
        axes = [(call.symbol(f"r{i}", size), size) for i, size in enumerate(x.shape)]
        at: At = tuple(symbol for symbol, _ in axes)
    else:
        size = x.shape[-1] if chosen.group_size is None else sympy.Integer(chosen.group_size)
        axes = [(call.symbol("r", size), size)]
        at = (*index[:-1], index[-1] * size + axes[0][0])
    largest = call.reduce("max", axes, apply("abs", convert(x.at(at), wide)))
    scale = apply("div", largest, literal(float(chosen.high), wide))
    return apply("where", apply("eq", scale, literal(0.0, wide), dtype="bool"), literal(1.0, wide), scale, dtype=wide)
