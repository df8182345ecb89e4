"""Arithmetic on sizes as it is read: on numbers Python's, on symbols by the functions of PyTorch's symbolic sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
from torch.utils._sympy.functions import (
    CeilToInt,
    FloatTrueDiv,
    FloorDiv,
    FloorToInt,
    IntTrueDiv,
    Max,
    Min,
    OpaqueUnaryFn_sqrt,
    PythonMod,
    RoundToInt,
    ToFloat,
    TruncToInt,
    Where,
)  # fmt: skip

COMPARISONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "<": (operator.lt, sympy.StrictLessThan),
    "<=": (operator.le, sympy.LessThan),
    ">": (operator.gt, sympy.StrictGreaterThan),
    ">=": (operator.ge, sympy.GreaterThan),
    "==": (operator.eq, sympy.Equality),
    "!=": (operator.ne, sympy.Unequality),
}
CALLS: dict[str, tuple[int, Callable[..., Any]]] = {
    "max": (2, Max), "min": (2, Min), "float": (1, ToFloat), "trunc": (1, TruncToInt), "floor": (1, FloorToInt),
    "ceil": (1, CeilToInt), "round": (1, RoundToInt), "sqrt": (1, OpaqueUnaryFn_sqrt), "where": (3, Where),
}  # fmt: skip


def is_symbolic(*values: Any) -> bool:
    return any(isinstance(v, sympy.Basic) for v in values)


def times(sign: str, a: Any, b: Any) -> Any:
    """`a * b`, `a // b`, `a / b` or `a % b`, by the functions that PyTorch's symbolic sizes are made of."""
    if sign == "*":
        return a * b
    if not is_symbolic(a, b):
        return {"//": operator.floordiv, "/": operator.truediv, "%": operator.mod}[sign](a, b)
    a, b = sympy.sympify(a), sympy.sympify(b)
    if sign == "//":
        return FloorDiv(a, b)
    if sign == "%":
        return PythonMod(a, b)
    return IntTrueDiv(a, b) if a.is_integer and b.is_integer else FloatTrueDiv(a, b)
