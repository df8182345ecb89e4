"""Values and index expressions as Triton text."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping

import sympy

from irc.core.errors import TargetError
from irc.lowering.kernels.values import Apply, Index, Literal

REGISTER_TYPES = {"f64": "tl.float64", "f32": "tl.float32", "i64": "tl.int64", "i32": "tl.int32", "bool": "tl.int1"}
STORAGE_TYPES = {
    **REGISTER_TYPES, "bf16": "tl.bfloat16", "f16": "tl.float16", "i16": "tl.int16", "i8": "tl.int8", "u8": "tl.uint8",
}  # fmt: skip
"""Types that kernels read and write. 8-bit floats are missing: Triton saturates where PyTorch gives NaN."""

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "logical_and": "&", "logical_or": "|", "logical_xor": "^", "bitwise_and": "&", "bitwise_or": "|",
    "bitwise_xor": "^", "shift_left": "<<", "shift_right": ">>",
}  # fmt: skip
_TRUTHS = ("logical_and", "logical_or", "logical_xor")
_CALLS = {
    "abs": "tl.abs", "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "log2": "tl.log2", "sin": "tl.sin",
    "cos": "tl.cos", "erf": "tl.erf", "floor": "tl.floor", "ceil": "tl.ceil", "rsqrt": "library.rsqrt",
    "sign": "library.sign", "tanh": "library.tanh", "sigmoid": "library.sigmoid", "expm1": "library.expm1",
    "log1p": "library.log1p", "log10": "library.log10", "tan": "library.tan", "sinh": "library.sinh",
    "cosh": "library.cosh", "trunc": "library.trunc", "round": "library.round_even", "isnan": "library.isnan",
    "isinf": "library.isinf", "atan": "library.atan", "atan2": "library.atan2", "maximum": "library.maximum",
    "minimum": "library.minimum",
}  # fmt: skip
# Operations that integers compute in another way than floats.
_BY_KIND = {
    "floor_div": ("library.floor_div_floats", "library.floor_div"),
    "trunc_div": ("library.trunc_div_floats", "library.trunc_div"),
    "remainder": ("library.remainder_floats", "library.remainder"), "fmod": ("library.fmod",
    "library.fmod_of_integers"),
    "pow": ("library.power", "library.power_of_integers"),
}  # fmt: skip
_FLOATS = ("f32", "f64")


def known_operation(op: str) -> bool:
    """Whether `Apply` of this operation can be printed."""
    known = op in _INFIX or op in _CALLS or op in _BY_KIND or op in _SPECIAL
    return known or op == "guard" or (op.startswith("round.") and op.removeprefix("round.") in STORAGE_TYPES)


def literal_text(value: Literal) -> str:
    """A number; where the type of an expression hangs on it alone, see `typed`."""
    if value.dtype == "bool":
        return "True" if value.value else "False"
    if value.dtype in ("i64", "i32"):
        return str(int(value.value))
    number = float(value.value)
    if math.isinf(number) or math.isnan(number):
        return f'float("{number}")'
    return repr(number)


def operand_text(value: Literal) -> str:
    """A number as an operand: a Python float becomes f32 in Triton where f32 has it in its range, and else f64."""
    number = float(value.value)
    if value.dtype == "f64" and math.isfinite(number) and number != _in_f32(number):
        return typed(value)
    small = 0 < abs(number) < 2**-126
    if value.dtype == "f32" and (small or (math.isinf(_in_f32(number)) and math.isfinite(number))):
        return typed(value)
    return literal_text(value)


def _in_f32(number: float) -> float:
    return ctypes.c_float(number).value


def typed(value: Literal) -> str:
    """A number as a tensor of its type."""
    return f"tl.full((), {literal_text(value)}, {REGISTER_TYPES[value.dtype]})"


def apply_text(value: Apply, args: list[str]) -> str:
    """An operation on printed arguments (`guard` is the scope's business: it masks loads)."""
    op = value.op
    if value.args and all(isinstance(a, Literal) for a in value.args if a.dtype != "bool"):
        args = [typed(a) if isinstance(a, Literal) else text for a, text in zip(value.args, args, strict=True)]
    if op in _SPECIAL:
        return _SPECIAL[op](value, args)
    if op == "round.bf16":
        return f"library.round_bf16({args[0]})"
    if op.startswith("round."):
        storage = STORAGE_TYPES[op.removeprefix("round.")]
        return f"{args[0]}.to({storage}).to({REGISTER_TYPES[value.dtype]})"
    if op in _TRUTHS:
        args = [t if a.dtype == "bool" else f"({t} != 0)" for a, t in zip(value.args, args, strict=True)]
    if op in _INFIX:
        return f"({args[0]} {_INFIX[op]} {args[1]})"
    if op in _CALLS:
        return f"{_CALLS[op]}({', '.join(args)})"
    if op in _BY_KIND:
        floats, integers = _BY_KIND[op]
        args = [typed(a) if isinstance(a, Literal) else text for a, text in zip(value.args, args, strict=True)]
        return f"{floats if value.args[0].dtype in _FLOATS else integers}({', '.join(args)})"
    raise TargetError(f"the Triton printer has no operation {op!r}")


def _convert(value: Apply, args: list[str]) -> str:
    if value.dtype == "bool":
        return f"({args[0]} != 0)"
    return f"tl.cast({args[0]}, {REGISTER_TYPES[value.dtype]})"


def _divide(value: Apply, args: list[str]) -> str:
    """Rounded once: where values are quantized, ties matter."""
    return f"tl.div_rn({args[0]}, {args[1]})" if value.dtype == "f32" else f"({args[0]} / {args[1]})"


def _where(value: Apply, args: list[str]) -> str:
    return f"tl.where({', '.join(args)})"


_SPECIAL: Mapping[str, Callable[[Apply, list[str]], str]] = {
    "bounded": lambda value, args: f"library.bounded({', '.join(args)})",
    "convert": _convert,
    "div": _divide,
    "where": _where,
    "sqrt": lambda value, args: f"{'tl.sqrt_rn' if value.dtype == 'f32' else 'tl.sqrt'}({args[0]})",
    "neg": lambda value, args: f"(-{args[0]})",
    "relu": lambda value, args: f"library.maximum({args[0]}, 0)",
    "square": lambda value, args: f"({args[0]} * {args[0]})",
    "reciprocal": lambda value, args: _divide(value, ["1.0", args[0]]),
    "logical_not": lambda value, args: f"({args[0]} == 0)",
    "bitwise_not": lambda value, args: f"({args[0]} == 0)" if value.dtype == "bool" else f"(~{args[0]})",
}


# ---------------------------------------------------------------- index expressions


def index_text(value: Index, names: Mapping[sympy.Symbol, str]) -> str:
    """An index as a number of 64 bits."""
    return f"tl.cast({size_text(value.expr, names)}, tl.int64)"


def size_text(expr: sympy.Expr, names: Mapping[sympy.Symbol, str]) -> str:
    """A sympy expression over integers as Python text that kernels and the step may hold."""
    return _size(sympy.sympify(expr), names)


def _size(expr: sympy.Expr, names: Mapping[sympy.Symbol, str]) -> str:
    if expr.is_Symbol:
        return names.get(expr, expr.name)
    if expr.is_Integer:
        return str(int(expr))
    if expr in (sympy.true, sympy.false):
        return str(expr)
    kind = type(expr).__name__
    if expr.is_Float or expr.is_Rational:
        return repr(float(expr))
    args = [_size(a, names) for a in _ordered(expr)]
    if kind in ("Pow", "PowByNatural") and expr.args[1].is_Integer and expr.args[1] > 0:
        return f"({' * '.join([args[0]] * int(expr.args[1]))})"
    if kind in _EXPRESSIONS:
        return _EXPRESSIONS[kind](args)
    raise TargetError(f"the Triton printer has no size expression {kind} ({expr})")


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
            result = f"{function}({result}, {other})"
        return result

    return text


# Quotients and remainders are of numbers that are not negative, where Python's and Triton's agree.
_EXPRESSIONS: Mapping[str, Callable[[list[str]], str]] = {
    "Add": lambda a: "(" + " + ".join(a).replace("+ -", "- ") + ")",
    "Mul": lambda a: "(" + " * ".join(f"({x})" if x.startswith("-") else x for x in a) + ")",
    "FloorDiv": lambda a: f"({a[0]} // {a[1]})",
    "CleanDiv": lambda a: f"({a[0]} // {a[1]})",
    "Mod": lambda a: f"({a[0]} % {a[1]})",
    "PythonMod": lambda a: f"library.remainder({a[0]}, {a[1]})",
    "Max": _folded("library.larger"),
    "Min": _folded("library.smaller"),
    "ToFloat": lambda a: f"tl.cast({a[0]}, tl.float64)",
    "IntTrueDiv": lambda a: f"(tl.cast({a[0]}, tl.float64) / {a[1]})",
    "FloatTrueDiv": lambda a: f"({a[0]} / {a[1]})",
    "TruncToInt": lambda a: f"tl.cast({a[0]}, tl.int64)",
    "FloorToInt": lambda a: f"tl.cast(tl.floor({a[0]}), tl.int64)",
    "CeilToInt": lambda a: f"tl.cast(tl.ceil({a[0]}), tl.int64)",
    "OpaqueUnaryFn_sqrt": lambda a: f"tl.sqrt(tl.cast({a[0]}, tl.float64))",
}
