"""Values and index expressions as C++ text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import sympy

from irc.core.errors import TargetError
from irc.lowering.kernels.values import Apply, Literal

REGISTER_TYPES = {"f64": "double", "f32": "float", "i64": "int64_t", "i32": "int32_t", "bool": "bool"}
STORAGE_TYPES = {
    "f64": "double", "f32": "float", "bf16": "irc::bf16", "f16": "irc::f16", "f8e4m3": "irc::f8e4m3",
    "f8e5m2": "irc::f8e5m2", "i64": "int64_t", "i32": "int32_t", "i16": "int16_t", "i8": "int8_t", "u8": "uint8_t",
    "bool": "bool",
}  # fmt: skip

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "logical_and": "&", "logical_or": "|", "logical_xor": "!=", "bitwise_and": "&", "bitwise_or": "|",
    "bitwise_xor": "^", "shift_left": "<<", "shift_right": ">>",
}  # fmt: skip
_CALLS = {
    "abs": "irc::scalar::absolute", "sign": "irc::scalar::sign", "exp": "irc::scalar::exp", "tanh": "irc::scalar::tanh",
    "sigmoid": "irc::scalar::sigmoid", "erf": "irc::scalar::erf", "rsqrt": "irc::scalar::rsqrt", "sqrt": "std::sqrt",
    "exp2": "std::exp2", "expm1": "std::expm1", "log": "std::log", "log2": "std::log2", "log10": "std::log10",
    "log1p": "std::log1p", "sin": "std::sin", "cos": "std::cos", "tan": "std::tan", "atan": "std::atan",
    "sinh": "std::sinh", "cosh": "std::cosh", "atan2": "std::atan2", "floor": "std::floor", "ceil": "std::ceil",
    "trunc": "std::trunc", "round": "irc::scalar::round_even", "maximum": "irc::scalar::maximum",
    "minimum": "irc::scalar::minimum", "remainder": "irc::scalar::remainder", "fmod": "irc::scalar::fmod",
    "pow": "irc::scalar::power", "floor_div": "irc::scalar::floor_div", "trunc_div": "irc::scalar::trunc_div",
    "isnan": "std::isnan", "isinf": "std::isinf",
}  # fmt: skip
_INTEGERS = ("i64", "i32", "bool")


def known_operation(op: str) -> bool:
    """Whether `Apply` of this operation can be printed."""
    return op in _INFIX or op in _CALLS or op in _SPECIAL or op.startswith("round.")


def literal_text(value: Literal) -> str:
    if value.dtype == "bool":
        return "true" if value.value else "false"
    if value.dtype in ("i64", "i32"):
        whole = int(value.value)
        if whole == -(1 << 63):
            return "INT64_MIN"
        return f"int64_t({whole})" if value.dtype == "i64" else str(whole)
    number, kind = float(value.value), REGISTER_TYPES[value.dtype]
    if math.isinf(number) or math.isnan(number):
        limits = f"std::numeric_limits<{kind}>::"
        text = limits + ("quiet_NaN()" if math.isnan(number) else "infinity()")
        return f"-{text}" if number < 0 else text
    return f"{number!r}f" if value.dtype == "f32" else repr(number)


def apply_text(value: Apply, args: list[str]) -> str:
    """An operation on printed arguments."""
    op = value.op
    if op in _SPECIAL:
        return _SPECIAL[op](value, args)
    if op.startswith("round."):
        storage = STORAGE_TYPES[op.removeprefix("round.")]
        return f"irc::scalar::rounded<{storage}>({args[0]})"
    if op in _INFIX:
        text = f"({args[0]} {_INFIX[op]} {args[1]})"
        # C++ computes truth values as int.
        narrow = value.dtype == "bool" and op in (
            "logical_and",
            "logical_or",
            "bitwise_and",
            "bitwise_or",
            "bitwise_xor",
        )
        return f"bool{text}" if narrow else text
    if op in _CALLS:
        return f"{_CALLS[op]}({', '.join(args)})"
    raise TargetError(f"the C++ printer has no operation {op!r}")


def _convert(value: Apply, args: list[str]) -> str:
    source, wanted = value.args[0].dtype, REGISTER_TYPES[value.dtype]
    if value.dtype == "bool":
        return f"({args[0]} != 0)"
    if source in ("f32", "f64") and value.dtype in ("i64", "i32"):
        return f"irc::scalar::whole<{wanted}>({args[0]})"
    return f"{wanted}({args[0]})"


def _select(value: Apply, args: list[str]) -> str:
    return f"({args[0]} ? {args[1]} : {args[2]})"


_SPECIAL: Mapping[str, Callable[[Apply, list[str]], str]] = {
    "bounded": lambda value, args: f"irc::scalar::bounded({', '.join(args)})",
    "convert": _convert,
    "where": _select,
    "guard": _select,
    "neg": lambda value, args: f"(-{args[0]})",
    "relu": lambda value, args: f"irc::scalar::maximum({args[0]}, {REGISTER_TYPES[value.dtype]}(0))",
    "square": lambda value, args: f"({args[0]} * {args[0]})",
    "reciprocal": lambda value, args: f"(1 / {args[0]})",
    "logical_not": lambda value, args: f"(!{args[0]})" if value.args[0].dtype == "bool" else f"({args[0]} == 0)",
    "bitwise_not": lambda value, args: f"(!{args[0]})" if value.dtype == "bool" else f"(~{args[0]})",
}


# ---------------------------------------------------------------- index expressions


def size_text(expr: sympy.Expr, names: Mapping[sympy.Symbol, str]) -> str:
    """A sympy expression over integers as C++; `names` says what each symbol is called."""
    return _size(sympy.sympify(expr), names)


def _size(expr: sympy.Expr, names: Mapping[sympy.Symbol, str]) -> str:
    if expr.is_Symbol:
        return names.get(expr, expr.name)
    if expr.is_Integer:
        return str(int(expr))
    if expr in (sympy.true, sympy.false):
        return str(expr).lower()
    kind = type(expr).__name__
    if expr.is_Float or expr.is_Rational:
        return repr(float(expr))
    args = [_size(a, names) for a in _ordered(expr)]
    if kind in _EXPRESSIONS:
        return _EXPRESSIONS[kind](args)
    raise TargetError(f"the C++ printer has no size expression {kind} ({expr})")


def _ordered(expr: sympy.Expr) -> list[sympy.Expr]:
    if isinstance(expr, sympy.Add):
        return list(expr.as_ordered_terms())
    if isinstance(expr, sympy.Mul):
        return list(expr.as_ordered_factors())
    return list(expr.args)


def _folded(function: str) -> Callable[[list[str]], str]:
    def text(args: list[str]) -> str:
        result = args[0]
        for other in args[1:]:
            result = f"{function}(int64_t({result}), int64_t({other}))"
        return result

    return text


_EXPRESSIONS: Mapping[str, Callable[[list[str]], str]] = {
    "Add": lambda a: "(" + " + ".join(a).replace("+ -", "- ") + ")",
    "Mul": lambda a: "(" + " * ".join(f"({x})" if x.startswith("-") else x for x in a) + ")",
    "FloorDiv": lambda a: f"({a[0]} / {a[1]})",
    "CleanDiv": lambda a: f"({a[0]} / {a[1]})",
    "Mod": lambda a: f"({a[0]} % {a[1]})",
    "PythonMod": lambda a: f"irc::scalar::remainder(int64_t({a[0]}), int64_t({a[1]}))",
    "Max": _folded("irc::max_of"),
    "Min": _folded("irc::min_of"),
    "Pow": lambda a: f"irc::scalar::power(int64_t({a[0]}), int64_t({a[1]}))",
    "PowByNatural": lambda a: f"irc::scalar::power(int64_t({a[0]}), int64_t({a[1]}))",
    "ToFloat": lambda a: f"double({a[0]})",
    "IntTrueDiv": lambda a: f"(double({a[0]}) / double({a[1]}))",
    "FloatTrueDiv": lambda a: f"({a[0]} / {a[1]})",
    "TruncToInt": lambda a: f"int64_t({a[0]})",
    "FloorToInt": lambda a: f"int64_t(std::floor({a[0]}))",
    "CeilToInt": lambda a: f"int64_t(std::ceil({a[0]}))",
    "RoundToInt": lambda a: f"int64_t(std::nearbyint({a[0]}))",
    "OpaqueUnaryFn_sqrt": lambda a: f"std::sqrt(double({a[0]}))",
}
