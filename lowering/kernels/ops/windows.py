"""Operations on windows that slide over an image: pooling and convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy

from irc.lowering.kernels.definitions import At, Call, apply, convert, defines, literal, settle
from irc.lowering.kernels.ops.reductions import Axes, count_of
from irc.lowering.kernels.values import Value


def window(call: Call, at: At, shape: At, taps: Sequence[Any], stride: Any, padding: Any, dilation: Any
           ) -> tuple[At, Axes, list[Value]]:  # fmt: skip
    """(position in the input with bound taps, the taps, conditions for the position to be inside)."""
    position, axes, inside = [], [], []
    for i, size in enumerate(taps):
        tap = call.symbol(f"t{i}", sympy.sympify(size))
        place = at[i] * stride[i] + tap * dilation[i] - padding[i]
        axes.append((tap, sympy.sympify(size)))
        position.append(place)
        number = call.definer.number(place)
        if padding[i] != 0:
            inside.append(apply("ge", number, literal(0), dtype="bool"))
        inside.append(apply("lt", number, call.definer.number(shape[i]), dtype="bool"))
    return tuple(position), axes, inside


def guarded(inside: Sequence[Value], value: Value, otherwise: Value) -> Value:
    """The value where all conditions hold; elsewhere it is not even looked at (its loads may lie outside)."""
    condition = None
    for one in inside:
        condition = one if condition is None else apply("logical_and", condition, one)
    return value if condition is None else apply("guard", condition, value, otherwise, dtype=value.dtype)


def pairs(value: Any, rank: int) -> list[int]:
    """A size for each spatial axis."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    return items * rank if len(items) == 1 else items


def _why_not_pool(call: Call) -> str | None:
    """Whether a last window that starts behind the image is dropped, depends on the size: no expression says it."""
    if not call.raw("ceil_mode"):
        return None
    taps = pairs(call.raw("kernel_size"), 1 if "1d" in str(call.node.target) else 2)
    stride = pairs(call.raw("stride") or taps, len(taps))
    padding = pairs(call.raw("padding"), len(taps))
    dilation = pairs(call.raw("dilation") if "dilation" in call._arguments else 1, len(taps))
    shape = call.operand("self").shape[-len(taps) :]
    axes = zip(shape, taps, stride, padding, dilation, strict=True)
    never_drops = all(size.is_Integer or s + p <= d * (k - 1) + 1 for size, k, s, p, d in axes)
    return None if never_drops else "ceil_mode with windows that may start behind an image of unknown size"


@defines("aten.max_pool2d", "aten.max_pool1d", kind="reduction", refuses=_why_not_pool)
def max_pool(call: Call, index: At) -> Value:
    """The largest element of each window; padding never wins."""
    x = call.operand("self")
    taps = pairs(call.raw("kernel_size"), 1 if "1d" in str(call.node.target) else 2)
    rank = len(taps)
    stride = pairs(call.raw("stride") or taps, rank)
    padding, dilation = (pairs(call.raw(n), rank) for n in ("padding", "dilation"))
    place, axes, inside = window(call, index[-rank:], x.shape[-rank:], taps, stride, padding, dilation)
    value = x.at((*index[:-rank], *place))
    return call.reduce("max", axes, guarded(inside, value, literal(-math.inf, call.dtype)))


@defines("aten.avg_pool2d", "aten.avg_pool1d", kind="reduction", refuses=_why_not_pool)
def avg_pool(call: Call, index: At) -> Value:
    """The mean of each window."""
    x = call.operand("self")
    window_sizes = pairs(call.raw("kernel_size"), 1 if "1d" in str(call.node.target) else 2)
    rank = len(window_sizes)
    shape = x.shape[-rank:]
    stride = pairs(call.raw("stride") or window_sizes, rank)
    padding = pairs(call.raw("padding"), rank)
    # A window starts in the image or in the padding before it: further taps lie behind the image in every window.
    taps = [min(k, int(size) + p) if size.is_Integer else k
            for k, size, p in zip(window_sizes, shape, padding, strict=True)]  # fmt: skip
    place, axes, inside = window(call, index[-rank:], shape, taps, stride, padding, [1] * rank)
    is_partial = any(padding) or bool(call.raw("ceil_mode"))
    value = guarded(inside if is_partial else [], x.at((*index[:-rank], *place)), literal(0.0, call.dtype))
    total = call.reduce("sum", axes, value)
    divisor = _divisor(call, index[-rank:], shape, window_sizes, stride, padding)
    return settle(apply("div", total, convert(divisor, total.dtype)), call.dtype)


def _divisor(
    call: Call, at: At, shape: At, window_sizes: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Value:
    """What a window's sum is divided by: its places, those in the padding too if they count.

    Places behind the padding, which only a window that `ceil_mode` adds can have, never count.
    """
    override = call._arguments.get("divisor_override")
    if override:
        return literal(float(override))
    counts_padding = bool(call.raw("count_include_pad"))
    whole, partial = 1, []
    for place, size, k, s, p in zip(at, shape, window_sizes, stride, padding, strict=True):
        if not call.raw("ceil_mode") and (counts_padding or p == 0):
            whole *= k
            continue
        start = place * s - p
        end = _extreme(call, "minimum", start + k, size + (p if counts_padding else 0))
        if not counts_padding and p:
            partial.append(apply("sub", end, _extreme(call, "maximum", start, sympy.Integer(0))))
        else:
            partial.append(apply("sub", end, call.definer.number(start)))
    places: Value = literal(whole)
    for extent in partial:
        places = apply("mul", places, extent)
    return places


def _extreme(call: Call, op: str, left: sympy.Expr, right: sympy.Expr) -> Value:
    """The `minimum` or `maximum` of two numbers that count places; one of them where it is known which."""
    more = sympy.expand(left - right)
    if more.is_Integer:
        return call.definer.number(left if (more < 0) == (op == "minimum") else right)
    return apply(op, call.definer.number(left), call.definer.number(right))


def _why_not_adaptive(call: Call) -> str | None:
    sizes = pairs(call.raw("output_size"), 1)
    shape = call.operand("self").shape[-len(sizes) :]
    whole = all(s.is_Integer and s % int(o) == 0 for s, o in zip(shape, sizes, strict=False) if o != 1)
    return None if whole else "windows of unequal size"


@defines("aten.adaptive_avg_pool2d", "aten.adaptive_avg_pool1d", kind="reduction", refuses=_why_not_adaptive)
def adaptive_avg_pool(call: Call, index: At) -> Value:
    """The mean of equal windows that cover the input."""
    x = call.operand("self")
    sizes = pairs(call.raw("output_size"), 1 if "1d" in str(call.node.target) else 2)
    rank = len(sizes)
    taps = [size / int(out) for size, out in zip(x.shape[-rank:], sizes, strict=True)]
    axes = [(call.symbol(f"t{i}", tap), tap) for i, tap in enumerate(taps)]
    place = [i * tap + symbol for i, tap, (symbol, _) in zip(index[-rank:], taps, axes, strict=True)]
    total = call.reduce("sum", axes, x.at((*index[:-rank], *place)))
    return settle(apply("div", total, count_of(call, axes, total.dtype)), call.dtype)


def _why_not_conv(call: Call) -> str | None:
    if call._arguments.get("transposed"):
        return "transposed"
    return "a padding mode by name" if isinstance(call.raw("padding"), str) else None


@defines("aten.conv1d", "aten.conv2d", "aten.convolution", "irc.conv_activation", kind="product", refuses=_why_not_conv)
def convolution(call: Call, index: At) -> Value:
    """Σ over input channels of a group and taps, plus bias, and an activation."""
    from torch.utils._sympy.functions import FloorDiv

    from irc.lowering.kernels.ops.pointwise import activation

    x, weight = call.operand("x" if "x" in call._arguments else "input"), call.operand("weight")
    taps = weight.shape[2:]
    rank, groups = len(taps), int(call.raw("groups"))
    stride, padding, dilation = (pairs(call.raw(n), rank) for n in ("stride", "padding", "dilation"))
    place, axes, inside = window(call, index[2:], x.shape[2:], taps, stride, padding, dilation)
    channel = call.symbol("c", weight.shape[1])
    source = channel if groups == 1 else FloorDiv(index[1], weight.shape[0] / groups) * weight.shape[1] + channel
    wide = "f64" if call.dtype == "f64" else "f32"
    left = guarded(inside if any(padding) else [], convert(x.at((index[0], source, *place)), wide), literal(0.0, wide))
    right = convert(weight.at((index[1], channel, *(symbol for symbol, _ in axes))), wide)
    value = call.reduce("sum", [(channel, weight.shape[1]), *axes], apply("mul", left, right))
    if call.has("bias"):
        value = apply("add", value, convert(call.operand("bias").at((index[1],)), wide))
    value = settle(value, call.dtype)
    if "activation" in call._arguments:
        value = settle(activation(call.raw("activation"), value), call.dtype)
    return value
