"""Sizes of a program as Python text."""

from __future__ import annotations

from typing import Any

import sympy

from irc.core.errors import TargetError


def python_size(expr: Any) -> str:
    """A size as a Python expression over dimension names."""
    expr = sympy.sympify(expr)
    kind = type(expr).__name__
    if expr.is_Symbol or expr.is_Integer or expr.is_Float:
        return str(expr)
    args = [python_size(a) for a in expr.args]
    if kind in ("Add", "Mul"):
        return "(" + {"Add": " + ", "Mul": " * "}[kind].join(args) + ")"
    if kind in ("FloorDiv", "CleanDiv", "Mod", "PythonMod"):
        return f"({args[0]} {'%' if 'Mod' in kind else '//'} {args[1]})"
    if kind in ("Max", "Min"):
        return f"{kind.lower()}({', '.join(args)})"
    if kind in ("Pow", "PowByNatural"):
        return f"({args[0]} ** {args[1]})"
    raise TargetError(f"a size {expr} cannot be written down")
