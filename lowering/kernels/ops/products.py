"""Matrix products."""

from __future__ import annotations

import sympy

from irc.lowering.kernels.definitions import At, Call, Operand, apply, convert, defines, settle
from irc.lowering.kernels.ops.reductions import Axes
from irc.lowering.kernels.values import REGISTER, Value


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
