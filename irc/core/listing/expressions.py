"""Size expressions as text: `2*S + 1`, `S // 4`, `max(S, 8)`.

Grammar, loosest first: `or`, `and`, `not`, comparisons, `+ -`, `* / // %`, unary `-`, `**`, then names, numbers,
calls (`max min float trunc floor ceil round sqrt where`) and parentheses. `//` and `%` are Python's.
"""

from __future__ import annotations

import sympy

from irc.core.errors import IrcError

OR, AND, NOT, COMPARE, ADD, MUL, UNARY, POWER, ATOM = range(9)

_BINARY = {
    "FloorDiv": ("//", MUL),
    "CleanDiv": ("//", MUL),
    "Mod": ("%", MUL),
    "PythonMod": ("%", MUL),
    "IntTrueDiv": ("/", MUL),
    "FloatTrueDiv": ("/", MUL),
    "FloatPow": ("**", POWER),
    "PowByNatural": ("**", POWER),
    "Pow": ("**", POWER),
    "Equality": ("==", COMPARE),
    "Unequality": ("!=", COMPARE),
    "StrictLessThan": ("<", COMPARE),
    "LessThan": ("<=", COMPARE),
    "StrictGreaterThan": (">", COMPARE),
    "GreaterThan": (">=", COMPARE),
}
_CALLS = {
    "Max": "max",
    "Min": "min",
    "ToFloat": "float",
    "TruncToInt": "trunc",
    "FloorToInt": "floor",
    "floor": "floor",
    "CeilToInt": "ceil",
    "ceiling": "ceil",
    "RoundToInt": "round",
    "OpaqueUnaryFn_sqrt": "sqrt",
    "Where": "where",
}


def expr_text(expr: sympy.Basic) -> str:
    """A sympy size expression in the text form's grammar; equal expressions give equal text.

    Raises:
        IrcError: the expression has a function that the text form lacks.
    """
    return _print(expr)[0]


def _print(expr: sympy.Basic) -> tuple[str, int]:
    """Text, and how tightly its outermost operator binds."""
    if isinstance(expr, sympy.Symbol):
        return expr.name, ATOM
    if isinstance(expr, sympy.Integer):
        return str(int(expr)), ATOM if expr >= 0 else UNARY
    if isinstance(expr, sympy.Float):
        return repr(float(expr)), ATOM if expr >= 0 else UNARY
    if expr in (sympy.true, sympy.false):
        return str(bool(expr)), ATOM
    if isinstance(expr, sympy.Add):
        return _sum(expr), ADD
    if isinstance(expr, sympy.Mul):
        return _product(expr)
    kind = type(expr).__name__
    if kind in _BINARY and len(expr.args) == 2:
        symbol, level = _BINARY[kind]
        left, right = expr.args
        above = level + 1
        return f"{_at(left, above if level in (COMPARE, POWER) else level)} {symbol} {_at(right, above)}", level
    if kind in _CALLS:
        # Max and Min keep a set of arguments: sort them, so that equal expressions print alike.
        arguments = [expr_text(a) for a in expr.args]
        return f"{_CALLS[kind]}({', '.join(sorted(arguments) if kind in ('Max', 'Min') else arguments)})", ATOM
    if isinstance(expr, (sympy.And, sympy.Or)):
        word, level = ("and", AND) if isinstance(expr, sympy.And) else ("or", OR)
        return f" {word} ".join(sorted(_at(a, level + 1) for a in expr.args)), level
    if isinstance(expr, sympy.Not):
        return f"not {_at(expr.args[0], NOT)}", NOT
    raise IrcError(f"the size expression {expr} has no text form ({kind})")


def _at(expr: sympy.Basic, level: int) -> str:
    text, own = _print(expr)
    return text if own >= level else f"({text})"


def _sum(expr: sympy.Add) -> str:
    text = ""
    for term in expr.as_ordered_terms():
        coefficient = term.as_coeff_Mul()[0]
        if text and coefficient.is_negative:
            text += f" - {_at(-term, MUL)}"
        else:
            text += (" + " if text else "") + _at(term, MUL)
    return text


def _product(expr: sympy.Mul) -> tuple[str, int]:
    coefficient, rest = expr.as_coeff_Mul()
    if coefficient == -1:
        return f"-{_at(rest, POWER if not isinstance(rest, sympy.Mul) else MUL)}", MUL
    factors = list(rest.as_ordered_factors())
    if coefficient != 1:
        factors.insert(0, coefficient)
    texts = [_at(factors[0], MUL), *(_at(f, UNARY) for f in factors[1:])]
    return "*".join(texts), MUL
