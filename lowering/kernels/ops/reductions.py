"""Operations that walk many elements for one: sums and extrema, normalizations, softmax, pooling, products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy

from irc.lowering.kernels.definitions import At, Call, Operand, apply, convert, defines, literal, settle
from irc.lowering.kernels.values import REGISTER, Value

Axes = list[tuple[sympy.Symbol, sympy.Expr]]


def _dims(given: Any, rank: int) -> list[int]:
    if given is None or given == []:
        return list(range(rank))
    return sorted({int(d) % max(rank, 1) for d in (given if isinstance(given, (list, tuple)) else [given])})


def _walk(call: Call, x: Operand, dims: Sequence[int], kept: At, keepdim: bool) -> tuple[At, Axes]:
    """(index of x with bound symbols at `dims`, those symbols with their extents)."""
    rest, full, axes = list(kept), [], []
    for axis, size in enumerate(x.shape):
        if axis in dims:
            symbol = call.symbol(f"r{axis}", size)
            axes.append((symbol, size))
            full.append(symbol)
            if keepdim:
                rest.pop(0)
        else:
            full.append(rest.pop(0))
    return tuple(full), axes


def _count(call: Call, axes: Axes, dtype: str) -> Value:
    return convert(call.definer.number(sympy.prod([size for _, size in axes])), dtype)


def _reduction(names: Sequence[str], op: str) -> None:
    def define(call: Call, index: At) -> Value:
        x = call.operand("self")
        dims = _dims(call._arguments.get("dim"), len(x.shape))
        full, axes = _walk(call, x, dims, index, bool(call._arguments.get("keepdim")))
        dtype = "bool" if op in ("any", "all") else REGISTER[call.dtype]
        body = convert(x.at(full), dtype)
        if not axes:
            return settle(body, call.dtype)
        value = call.reduce("sum" if op == "mean" else op, axes, body)
        if op == "mean":
            value = apply("div", value, _count(call, axes, dtype))
        return settle(value, call.dtype)

    defines(*names, kind="reduction")(define)


_reduction(("aten.sum", "aten.sum.dim_IntList"), "sum")
_reduction(("aten.mean", "aten.mean.dim"), "mean")
_reduction(("aten.prod", "aten.prod.dim_int"), "prod")
_reduction(("aten.amax", "aten.max"), "max")
_reduction(("aten.amin", "aten.min"), "min")
_reduction(("aten.any", "aten.any.dim", "aten.any.dims"), "any")
_reduction(("aten.all", "aten.all.dim", "aten.all.dims"), "all")


@defines("aten.max.dim", "aten.min.dim", kind="reduction")
def extremum(call: Call, index: At) -> Value:
    """(largest or smallest element, its position) along an axis."""
    op = "max" if "max" in str(call.node.target) else "min"
    return _along(call, index, f"arg{op}" if call.output == 1 else op)


@defines("aten.argmax", "aten.argmin", kind="reduction")
def arg_extremum(call: Call, index: At) -> Value:
    """The position of the largest or smallest element, the first of equals."""
    return _along(call, index, "argmax" if "argmax" in str(call.node.target) else "argmin")


def _along(call: Call, index: At, op: str) -> Value:
    x = call.operand("self")
    dims = _dims(call._arguments.get("dim"), len(x.shape))
    full, axes = _walk(call, x, dims, index, bool(call._arguments.get("keepdim")))
    return call.reduce(op, axes, x.at(full))


@defines("aten.var.correction", "aten.var.dim", "aten.std.correction", kind="reduction")
def variance(call: Call, index: At) -> Value:
    """Mean squared distance to the mean, over n - correction."""
    x, dtype = call.operand("self"), REGISTER[call.dtype]
    dims = _dims(call._arguments.get("dim"), len(x.shape))
    full, axes = _walk(call, x, dims, index, bool(call._arguments.get("keepdim")))
    correction = call._arguments.get("correction")
    if correction is None:
        correction = int(call._arguments.get("unbiased", True))
    total = _squares(call, convert(x.at(full), dtype), axes)
    divisor = apply("sub", _count(call, axes, dtype), literal(float(correction), dtype))
    value = apply("div", total, divisor)
    return settle(apply("sqrt", value) if "std" in str(call.node.target) else value, call.dtype)


def _squares(call: Call, x: Value, axes: Axes) -> Value:
    """Sum of squared distances to the mean."""
    mean = apply("div", call.reduce("sum", axes, x), _count(call, axes, x.dtype))
    distance = apply("sub", x, mean)
    return call.reduce("sum", axes, apply("mul", distance, distance))


# ---------------------------------------------------------------- normalization


@defines("irc.rms_norm", kind="reduction")
def rms_norm(call: Call, index: At) -> Value:
    """x / sqrt(mean(x²) + eps) · weight."""
    x = call.operand("x")
    wide = "f64" if x.dtype == "f64" else "f32"
    full, axes = _walk(call, x, [len(index) - 1], index[:-1], False)
    inner = convert(x.at(full), wide)
    mean = apply("div", call.reduce("sum", axes, apply("mul", inner, inner)), _count(call, axes, wide))
    root = apply("rsqrt", apply("add", mean, literal(float(call.raw("eps")), wide)))
    normed = apply("mul", convert(x.at(index), wide), root)
    if not call.has("weight"):
        return settle(normed, call.dtype)
    if not call.raw("weight_in_f32"):
        normed = settle(normed, x.dtype)
    weight = convert(call.operand("weight").at(index[-1:]), normed.dtype)
    return settle(apply("mul", normed, weight), call.dtype)


def _normalized(call: Call, x: Operand, index: At, full: At, axes: Axes, eps: float) -> Value:
    """(x - mean) / sqrt(variance + eps) over `axes`, in a wide type."""
    wide = "f64" if x.dtype == "f64" else "f32"
    inner, count = convert(x.at(full), wide), _count(call, axes, wide)
    mean = apply("div", call.reduce("sum", axes, inner), count)
    spread = apply("div", _squares(call, inner, axes), count)
    root = apply("rsqrt", apply("add", spread, literal(eps, wide)))
    return apply("mul", apply("sub", convert(x.at(index), wide), mean), root)


def _affine(call: Call, value: Value, weight_at: At, weight: str = "weight", bias: str = "bias") -> Value:
    if call.has(weight):
        value = apply("mul", value, convert(call.operand(weight).at(weight_at), value.dtype))
    if call.has(bias):
        value = apply("add", value, convert(call.operand(bias).at(weight_at), value.dtype))
    return settle(value, call.dtype)


@defines("aten.layer_norm", kind="reduction")
def layer_norm(call: Call, index: At) -> Value:
    """Normalized over the last axes, scaled and shifted."""
    x, rank = call.operand("input"), len(call.raw("normalized_shape"))
    outer = len(index) - rank
    full, axes = _walk(call, x, list(range(outer, len(index))), index[:outer], False)
    value = _normalized(call, x, index, full, axes, float(call.raw("eps")))
    return _affine(call, value, index[outer:])


@defines("aten.group_norm", kind="reduction")
def group_norm(call: Call, index: At) -> Value:
    """Normalized over groups of channels and all positions."""
    from torch.utils._sympy.functions import FloorDiv

    x, groups = call.operand("input"), int(call.raw("num_groups"))
    per_group = x.shape[1] / groups
    inner = call.symbol("c", per_group)
    places = [(call.symbol(f"p{i}", size), size) for i, size in enumerate(x.shape[2:])]
    first = FloorDiv(index[1], per_group) * per_group
    full = (index[0], first + inner, *(symbol for symbol, _ in places))
    value = _normalized(call, x, index, full, [(inner, per_group), *places], float(call.raw("eps")))
    return _affine(call, value, (index[1],))


@defines("aten.batch_norm", "aten._native_batch_norm_legit_no_training", kind="pointwise",
         refuses=lambda c: "training" if c._arguments.get("training") else None)  # fmt: skip
def batch_norm(call: Call, index: At) -> Value:
    """(x - running mean) / sqrt(running variance + eps), scaled and shifted."""
    x = convert(call.operand("input").at(index), "f64" if call.dtype == "f64" else "f32")
    at = (index[1],)
    mean, spread = (convert(call.operand(f"running_{n}").at(at), x.dtype) for n in ("mean", "var"))
    root = apply("rsqrt", apply("add", spread, literal(float(call.raw("eps")), x.dtype)))
    return _affine(call, apply("mul", apply("sub", x, mean), root), at)


@defines("aten.softmax.int", "aten._softmax", "aten.log_softmax.int", "aten._log_softmax", kind="reduction")
def softmax(call: Call, index: At) -> Value:
    """exp(x - max) / sum(exp(x - max)) along an axis, or its logarithm."""
    x, axis = call.operand("self"), call.axis("dim", len(index))
    wide = "f64" if x.dtype == "f64" else "f32"
    if not index:
        return literal(0.0 if "log" in str(call.node.target) else 1.0, call.dtype)
    full, axes = _walk(call, x, [axis], index[:axis] + index[axis + 1 :], False)
    top = call.reduce("max", axes, convert(x.at(full), wide))
    total = call.reduce("sum", axes, apply("exp", apply("sub", convert(x.at(full), wide), top)))
    own = apply("sub", convert(x.at(index), wide), top)
    if "log" in str(call.node.target):
        return settle(apply("sub", own, apply("log", total)), call.dtype)
    return settle(apply("div", apply("exp", own), total), call.dtype)


@defines("aten.cumsum", kind="reduction")
def cumsum(call: Call, index: At) -> Value:
    """Sum of the elements up to and including this one along an axis."""
    x, axis = call.operand("self"), call.axis("dim", len(index))
    full, axes = _walk(call, x, [axis], index[:axis] + index[axis + 1 :], False)
    stop = apply("add", call.definer.number(index[axis]), literal(1))
    return settle(call.reduce("sum", axes, convert(x.at(full), REGISTER[call.dtype]), stop), call.dtype)


# ---------------------------------------------------------------- products


def product(call: Call, left: Operand, left_at: At, right: Operand, right_at: At, axes: Axes) -> Value:
    """Σ left · right, accumulated in a wide type."""
    wide = REGISTER[left.dtype] if REGISTER[left.dtype] != "bool" else "i64"
    terms = apply("mul", convert(left.at(left_at), wide), convert(right.at(right_at), wide))
    return call.reduce("sum", axes, terms)


@defines("aten.linear", "irc.linear_activation", kind="product")
def linear(call: Call, index: At) -> Value:
    """x · weightᵀ + bias, and an activation."""
    from irc.lowering.kernels.ops.pointwise import activation

    names = ("input", "weight") if "input" in call._arguments else ("x", "weight")
    x, weight = (call.operand(name) for name in names)
    k = call.symbol("k", x.shape[-1])
    value = product(call, x, (*index[:-1], k), weight, (index[-1], k), [(k, x.shape[-1])])
    if call.has("bias"):
        value = apply("add", value, convert(call.operand("bias").at(index[-1:]), value.dtype))
    value = settle(value, call.dtype)
    if "activation" in call._arguments:
        value = settle(activation(call.raw("activation"), value), call.dtype)
    return value


@defines("aten.matmul", "aten.mm", "aten.bmm", kind="product")
def matmul(call: Call, index: At) -> Value:
    """Matrix product of the last two axes, the others broadcast."""
    left, right = (call.operand(n) for n in (("self", "other") if "other" in call._arguments else ("self", "mat2")))
    size = left.shape[-1]
    k = call.symbol("k", size)
    outer = index[: len(index) - (len(left.shape) > 1) - (len(right.shape) > 1)]
    row = index[len(outer) : len(outer) + 1] if len(left.shape) > 1 else ()
    column = index[-1:] if len(right.shape) > 1 else ()

    def batch(x: Operand) -> At:
        own = x.shape[:-2]
        taken = outer[len(outer) - len(own) :]
        return tuple(sympy.Integer(0) if s == 1 else i for i, s in zip(taken, own, strict=True))

    left_at, right_at = (*batch(left), *row, k), (*batch(right), k, *column)
    return settle(product(call, left, left_at, right, right_at, [(k, size)]), call.dtype)


@defines(
    "aten.addmm", kind="product", refuses=lambda c: None if (c.raw("beta"), c.raw("alpha")) == (1, 1) else "factors"
)
def addmm(call: Call, index: At) -> Value:
    """self + mat1 · mat2."""
    left, right = call.operand("mat1"), call.operand("mat2")
    k = call.symbol("k", left.shape[-1])
    value = product(call, left, (index[0], k), right, (k, index[1]), [(k, left.shape[-1])])
    return settle(apply("add", value, convert(call.operand("self").spread(index), value.dtype)), call.dtype)


# ---------------------------------------------------------------- windows


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


@defines("aten.max_pool2d", "aten.max_pool1d", kind="reduction")
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


@defines("aten.avg_pool2d", "aten.avg_pool1d", kind="reduction", refuses=lambda c: (
    "ceil_mode, divisor_override, or padding that does not count"
    if c.raw("ceil_mode") or c._arguments.get("divisor_override")
    or (not c.raw("count_include_pad") and any(pairs(c.raw("padding"), 1))) else None))  # fmt: skip
def avg_pool(call: Call, index: At) -> Value:
    """The mean of each window."""
    x = call.operand("self")
    taps = pairs(call.raw("kernel_size"), 1 if "1d" in str(call.node.target) else 2)
    rank = len(taps)
    stride = pairs(call.raw("stride") or taps, rank)
    padding = pairs(call.raw("padding"), rank)
    place, axes, inside = window(call, index[-rank:], x.shape[-rank:], taps, stride, padding, [1] * rank)
    value = guarded(inside if any(padding) else [], x.at((*index[:-rank], *place)), literal(0.0, call.dtype))
    total = call.reduce("sum", axes, value)
    return settle(apply("div", total, literal(float(math.prod(taps)), total.dtype)), call.dtype)


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
    return settle(apply("div", total, _count(call, axes, total.dtype)), call.dtype)


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
