"""Operations that walk many elements for one: sums and extrema, normalizations, softmax."""

from __future__ import annotations

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


def count_of(call: Call, axes: Axes, dtype: str) -> Value:
    """How many elements the axes walk."""
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
            value = apply("div", value, count_of(call, axes, dtype))
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


_MOST_RANKED = 512


def _why_not_ranked(call: Call) -> str | None:
    x = call.operand("self")
    size = x.shape[call.axis("dim", len(x.shape))] if x.shape else None
    small = size is not None and size.is_Integer and size <= _MOST_RANKED
    return None if small else f"the largest of more than {_MOST_RANKED} elements, or of a number that is not known"


@defines("aten.topk", kind="reduction", refuses=_why_not_ranked)
def topk(call: Call, index: At) -> Value:
    """(the largest or smallest k, their positions) along an axis, as of a mixture's experts.

    By rank: the element that as many others stand before as its place says, with n² comparisons. NaN is the largest.
    """
    x = call.operand("self")
    axis = call.axis("dim", len(x.shape))
    size = x.shape[axis]
    i, k = call.symbol("i", size), call.symbol("k", size)
    own, other = (x.at((*index[:axis], at, *index[axis + 1 :])) for at in (i, k))
    first, second = (own, other) if call.raw("largest") else (other, own)
    before, equal = apply("lt", first, second, dtype="bool"), apply("eq", own, other, dtype="bool")
    if own.dtype in ("f32", "f64"):
        nans = [apply("isnan", value, dtype="bool") for value in (first, second)]
        only = apply("logical_and", nans[1], apply("logical_not", nans[0], dtype="bool"), dtype="bool")
        before = apply("logical_or", before, only, dtype="bool")
        equal = apply("logical_or", equal, apply("logical_and", *nans, dtype="bool"), dtype="bool")
    earlier = apply("lt", call.definer.number(k), call.definer.number(i), dtype="bool")
    tied = apply("where", earlier, equal, literal(False, "bool"), dtype="bool")
    before = apply("logical_or", before, tied, dtype="bool")
    rank = call.reduce("sum", [(k, size)], convert(before, "i64"))
    chosen = apply("eq", rank, call.definer.number(index[axis]), dtype="bool")
    value = convert(call.definer.number(i), "i64") if call.output == 1 else own
    kept = apply("where", chosen, value, literal(0, value.dtype), dtype=value.dtype)
    return call.reduce("sum", [(i, size)], kept)


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
    divisor = apply("sub", count_of(call, axes, dtype), literal(float(correction), dtype))
    value = apply("div", total, divisor)
    return settle(apply("sqrt", value) if "std" in str(call.node.target) else value, call.dtype)


def _squares(call: Call, x: Value, axes: Axes) -> Value:
    """Sum of squared distances to the mean."""
    mean = apply("div", call.reduce("sum", axes, x), count_of(call, axes, x.dtype))
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
    mean = apply("div", call.reduce("sum", axes, apply("mul", inner, inner)), count_of(call, axes, wide))
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
    inner, count = convert(x.at(full), wide), count_of(call, axes, wide)
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
