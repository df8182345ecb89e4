"""Operations that compute an element from the elements at the same place: a table, and a few functions."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch.fx as fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as KIND
from torch._prims_common import elementwise_dtypes
from torch.utils._sympy.functions import FloorDiv, Mod

from irc.core.program import VAL, dtype_name
from irc.lowering.kernels.definitions import At, Call, apply, convert, defines, literal, settle
from irc.lowering.kernels.indexing import remembered
from irc.lowering.kernels.values import REGISTER, Value

# aten name → (operation, argument names, whether integers become floats, whether the result is a truth value)
_FLOAT, _SAME, _TRUTH = "float", "same", "truth"
_UNARY = {
    "abs": _SAME, "neg": _SAME, "sign": _SAME, "exp": _FLOAT, "exp2": _FLOAT, "expm1": _FLOAT, "log": _FLOAT,
    "log2": _FLOAT, "log10": _FLOAT, "log1p": _FLOAT, "sqrt": _FLOAT, "rsqrt": _FLOAT, "sin": _FLOAT, "cos": _FLOAT,
    "tan": _FLOAT, "tanh": _FLOAT, "sigmoid": _FLOAT, "erf": _FLOAT, "floor": _SAME, "ceil": _SAME, "round": _SAME,
    "trunc": _SAME, "reciprocal": _FLOAT, "relu": _SAME, "square": _SAME, "logical_not": _TRUTH, "isnan": _TRUTH,
    "isinf": _TRUTH, "bitwise_not": _SAME, "atan": _FLOAT, "sinh": _FLOAT, "cosh": _FLOAT,
}  # fmt: skip
_BINARY = {
    "maximum": _SAME, "minimum": _SAME, "remainder": _SAME, "fmod": _SAME, "pow": _SAME, "eq": _TRUTH, "ne": _TRUTH,
    "lt": _TRUTH, "le": _TRUTH, "gt": _TRUTH, "ge": _TRUTH, "logical_and": _TRUTH, "logical_or": _TRUTH,
    "logical_xor": _TRUTH, "bitwise_and": _SAME, "bitwise_or": _SAME, "bitwise_xor": _SAME, "atan2": _FLOAT,
    "mul": _SAME,
}  # fmt: skip
_KINDS = {_FLOAT: KIND.INT_TO_FLOAT, _SAME: KIND.DEFAULT, _TRUTH: KIND.ALWAYS_BOOL}
_INTEGER_UNARY = ("floor", "ceil", "round", "trunc")


def compute_type(*values: Any, kind: str = _SAME) -> str:
    """The register type that operands are computed in, by PyTorch's promotion."""
    seen = [v.meta[VAL] if isinstance(v, fx.Node) else v for v in values]
    compute, _ = elementwise_dtypes(*seen, type_promotion_kind=_KINDS[kind])
    return REGISTER[dtype_name(compute)]


def _raw(call: Call, *names: str) -> list[Any]:
    return [call._arguments[name] for name in names]


def gather(call: Call, index: At, *names: str, kind: str = _SAME) -> list[Value]:
    """Operands at an output index, in their common type."""
    dtype = compute_type(*_raw(call, *names), kind=kind)
    return [convert(call.operand(name).spread(index), dtype) for name in names]


def _unary(name: str, kind: str) -> None:
    def define(call: Call, index: At) -> Value:
        (x,) = gather(call, index, "self", kind=kind)
        if name in _INTEGER_UNARY and x.dtype in ("i64", "i32"):
            return x
        return settle(apply(name, x, dtype="bool" if kind == _TRUTH else None), call.dtype)

    defines(f"aten.{name}", kind="pointwise")(define)


def _binary(name: str, kind: str) -> None:
    def define(call: Call, index: At) -> Value:
        a, b = gather(call, index, "self", "other" if call.has("other") else "exponent", kind=kind)
        if name == "pow" and a.dtype in ("f32", "f64"):
            return settle(_power(a, b), call.dtype)
        return settle(apply(name, a, b, dtype="bool" if kind == _TRUTH else None), call.dtype)

    suffixes = (".Tensor_Tensor", ".Tensor_Scalar", ".Scalar") if name == "pow" else ("", ".Tensor", ".Scalar")
    defines(*(f"aten.{name}{suffix}" for suffix in suffixes), kind="pointwise")(define)


def _power(a: Value, b: Value) -> Value:
    exponent = getattr(b, "value", None)
    if exponent == 2:
        return apply("mul", a, a)
    if exponent == 3:
        return apply("mul", apply("mul", a, a), a)
    if exponent == 0.5:
        return apply("sqrt", a)
    if exponent == -0.5:
        return apply("rsqrt", a)
    return apply("pow", a, b)


for _name, _kind in _UNARY.items():
    _unary(_name, _kind)
for _name, _kind in _BINARY.items():
    _binary(_name, _kind)


@defines(
    "aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.rsub.Scalar", kind="pointwise"
)
def add(call: Call, index: At) -> Value:
    """self ± alpha · other."""
    name = call.node.target._schema.name.partition("::")[2]
    a, b = gather(call, index, "self", "other")
    if call.raw("alpha") != 1:
        factor = convert(call.operand("alpha").at(()), b.dtype)
        b = apply("mul", b, factor)
    if name == "rsub":
        a, b = b, a
    op = "add" if name == "add" else "sub"
    if a.dtype == "bool":
        op = "logical_or"
    return settle(apply(op, a, b), call.dtype)


@defines("aten.div.Tensor", "aten.div.Scalar", "aten.div.Tensor_mode", "aten.div.Scalar_mode", kind="pointwise")
def div(call: Call, index: At) -> Value:
    """self / other, rounded as `rounding_mode` says."""
    mode = call.raw("rounding_mode") if "rounding_mode" in call._arguments else None
    a, b = gather(call, index, "self", "other", kind=_FLOAT if mode is None else _SAME)
    op = {None: "div", "floor": "floor_div", "trunc": "trunc_div"}[mode]
    return settle(apply(op, a, b), call.dtype)


@defines("aten.floor_divide", "aten.floor_divide.Scalar", kind="pointwise")
def floor_divide(call: Call, index: At) -> Value:
    """floor(self / other)."""
    return settle(apply("floor_div", *gather(call, index, "self", "other")), call.dtype)


@defines("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar", kind="pointwise")
def where(call: Call, index: At) -> Value:
    """condition ? self : other."""
    keep = convert(call.operand("condition").spread(index), "bool")
    a, b = gather(call, index, "self", "other")
    return settle(apply("where", keep, a, b, dtype=a.dtype), call.dtype)


@defines("aten.masked_fill.Scalar", "aten.masked_fill.Tensor", kind="pointwise")
def masked_fill(call: Call, index: At) -> Value:
    """mask ? value : self."""
    x, mask = call.operand("self").spread(index), call.operand("mask").spread(index)
    value = convert(call.operand("value").spread(index), x.dtype)
    return settle(apply("where", convert(mask, "bool"), value, x, dtype=x.dtype), call.dtype)


@defines("aten.clamp", "aten.clamp.Tensor", "aten.clamp_min", "aten.clamp_max", "aten.hardtanh", kind="pointwise")
def clamp(call: Call, index: At) -> Value:
    """min(max(self, low), high); NaN stays."""
    low, high = ("min_val", "max_val") if "min_val" in call._arguments else ("min", "max")
    x = convert(call.operand("self").spread(index), REGISTER[call.dtype])
    for name, op in ((low, "maximum"), (high, "minimum")):
        if call.has(name):
            x = apply(op, x, convert(call.operand(name).spread(index), x.dtype))
    return settle(x, call.dtype)


@defines("aten.min.other", "aten.max.other", kind="pointwise")
def extremum(call: Call, index: At) -> Value:
    """The smaller or larger of two."""
    op = "minimum" if "min" in call.node.target._schema.name else "maximum"
    return settle(apply(op, *gather(call, index, "self", "other")), call.dtype)


@defines("aten.__and__.Tensor", "aten.__or__.Tensor", "aten.__xor__.Tensor", kind="pointwise")
def bits(call: Call, index: At) -> Value:
    """Bit by bit; truth values are one bit."""
    op = call.node.target._schema.name.partition("::")[2].strip("_")
    return settle(apply(f"bitwise_{op}", *gather(call, index, "self", "other")), call.dtype)


@defines(
    "aten._to_copy", "aten.to.dtype", "aten.to.device", "aten.type_as", "prims.convert_element_type", kind="pointwise"
)
def to(call: Call, index: At) -> Value:
    """self in another type."""
    first = next(iter(call._arguments))
    return settle(call.operand(first).at(index), call.dtype)


# ---------------------------------------------------------------- activations


def activation(name: str, x: Value, slope: float = 0.01) -> Value:
    """An activation by its name in `irc.core.ops.fused.ACTIVATIONS`, computed in x's type."""

    def number(value: float) -> Value:
        return literal(value, x.dtype)

    def mul(a: Value, b: Value) -> Value:
        return apply("mul", a, b)

    def hard(y: Value) -> Value:
        shifted = apply("add", y, number(3.0))
        return mul(apply("minimum", apply("maximum", shifted, number(0.0)), number(6.0)), number(1 / 6))

    if name == "silu":
        return mul(x, apply("sigmoid", x))
    if name == "gelu":
        inner = apply("add", number(1.0), apply("erf", mul(x, number(math.sqrt(0.5)))))
        return mul(mul(x, number(0.5)), inner)
    if name == "gelu_tanh":
        cubic = apply("add", x, mul(number(0.044715), mul(mul(x, x), x)))
        inner = apply("tanh", mul(number(math.sqrt(2 / math.pi)), cubic))
        return mul(mul(number(0.5), x), apply("add", number(1.0), inner))
    if name == "quick_gelu":
        return mul(x, apply("sigmoid", mul(number(1.702), x)))
    if name == "relu6":
        return apply("minimum", apply("maximum", x, number(0.0)), number(6.0))
    if name == "leaky_relu":
        return apply("where", apply("gt", x, number(0.0), dtype="bool"), x, mul(x, number(slope)), dtype=x.dtype)
    if name == "hardswish":
        return mul(x, hard(x))
    if name == "hardsigmoid":
        return hard(x)
    if name == "softplus":
        large = apply("gt", x, number(20.0), dtype="bool")
        return apply("where", large, x, apply("log1p", apply("exp", x)), dtype=x.dtype)
    if name == "mish":
        return mul(x, apply("tanh", activation("softplus", x)))
    return apply(name, x)  # relu, tanh, sigmoid


def _activation(aten: str, name: str) -> None:
    def define(call: Call, index: At) -> Value:
        (x,) = gather(call, index, "self")
        chosen = "gelu_tanh" if aten == "gelu" and call.raw("approximate") == "tanh" else name
        slope = float(call.raw("negative_slope")) if aten == "leaky_relu" else 0.01
        return settle(activation(chosen, x, slope), call.dtype)

    defines(f"aten.{aten}", kind="pointwise")(define)


for _name in ("silu", "gelu", "relu6", "leaky_relu", "hardswish", "hardsigmoid", "mish"):
    _activation(_name, _name)


@defines("aten.softplus", kind="pointwise", refuses=lambda c: None if (c.raw("beta"), c.raw("threshold")) == (1, 20)
         else "beta and threshold other than 1 and 20")  # fmt: skip
def softplus(call: Call, index: At) -> Value:
    """log(1 + exp(self))."""
    return settle(activation("softplus", gather(call, index, "self")[0]), call.dtype)


@defines("aten.elu", kind="pointwise", refuses=lambda c: None if c.raw("input_scale") == 1 else "an input_scale")
def elu(call: Call, index: At) -> Value:
    """scale · (x > 0 ? x : alpha · (exp(x) - 1))."""
    (x,) = gather(call, index, "self")
    scale, alpha = literal(float(call.raw("scale")), x.dtype), literal(float(call.raw("alpha")), x.dtype)
    low = apply("mul", alpha, apply("expm1", x))
    chosen = apply("where", apply("gt", x, literal(0.0, x.dtype), dtype="bool"), x, low, dtype=x.dtype)
    return settle(apply("mul", chosen, scale), call.dtype)


@defines("irc.glu", kind="pointwise")
def glu(call: Call, index: At) -> Value:
    """activation(gate) · up, the activation rounded to gate's type as PyTorch does."""
    gate, up = call.operand("gate"), call.operand("up")
    active = settle(activation(call.raw("activation"), gate.spread(index)), gate.dtype)
    dtype = REGISTER[call.dtype]
    return settle(apply("mul", convert(active, dtype), convert(up.spread(index), dtype)), call.dtype)


@defines("irc.rope", kind="pointwise")
def rope(call: Call, index: At) -> Value:
    """Pairs of channels rotated; channels behind the rotary ones pass through."""
    x, cos, sin = (call.operand(name) for name in ("x", "cos", "sin"))
    half = cos.shape[-1]
    channel, dtype = index[-1], REGISTER[call.dtype]
    partner, angle_index, member = _rotary_pair(channel, half, bool(call.raw("interleaved")))
    first = apply("eq", call.definer.number(member), literal(0), dtype="bool")
    partner_at, angle = (*index[:-1], partner), (*index[:-1], angle_index)
    own, other = convert(x.at(index), dtype), convert(x.at(partner_at), dtype)
    c, s = convert(cos.spread(angle), dtype), convert(sin.spread(angle), dtype)
    product = settle(apply("mul", other, s), call.dtype)
    turned = settle(apply("mul", own, c), call.dtype)
    rotated = apply("where", first, apply("sub", turned, product), apply("add", turned, product), dtype=dtype)
    if x.shape[-1] != 2 * half:
        inside = apply("lt", call.definer.number(channel), call.definer.number(2 * half), dtype="bool")
        rotated = apply("where", inside, rotated, own, dtype=dtype)
    return settle(rotated, call.dtype)


@remembered
def _rotary_pair(channel: sympy.Expr, half: sympy.Expr, interleaved: bool) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr]:
    """(the other channel of the pair, the pair, which of the two this is); within bounds for channels that pass."""
    if interleaved:
        pair, member = FloorDiv(channel, 2), Mod(channel, 2)
        return 2 * pair + Mod(channel + 1, 2), pair, member
    pair, member = Mod(channel, half), FloorDiv(channel, half)
    return Mod(member + 1, 2) * half + pair, pair, member


@defines("aten.outer", kind="pointwise")
def outer(call: Call, index: At) -> Value:
    """self[i] · vec2[j]."""
    dtype = REGISTER[call.dtype]
    a, b = call.operand("self").at(index[:1]), call.operand("vec2").at(index[1:])
    return settle(apply("mul", convert(a, dtype), convert(b, dtype)), call.dtype)
