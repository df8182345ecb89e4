"""Index arithmetic over sympy: division and remainder resolved where ranges allow, and the maps of reshapes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

Ranges = Mapping[sympy.Symbol, sympy.Expr]
"""Index symbol → extent: the symbol runs over 0 … extent - 1."""

Extents = frozenset[tuple[sympy.Symbol, sympy.Expr]]
"""The same as a key: of the symbols that matter."""

# sympy remembers the last thousand results of each function, less than a layer of a model needs.
remembered = functools.lru_cache(maxsize=1 << 14)

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


def index_symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


def replaced(expr: sympy.Expr, mapping: Mapping[sympy.Symbol, sympy.Expr], ranges: Ranges) -> sympy.Expr:
    """The expression over other symbols, simplified."""
    return simplify(exchanged(expr, frozenset(mapping.items())), ranges)


@remembered
def exchanged(expr: sympy.Expr, pairs: frozenset[tuple[sympy.Symbol, sympy.Expr]]) -> sympy.Expr:
    """The expression with the first of each pair exchanged for the second."""
    return expr.xreplace(dict(pairs))


@remembered
def equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two expressions are the same once they are expanded."""
    return bool(a == b or sympy.expand(a - b) == 0)


def _extents(exprs: Sequence[sympy.Expr], ranges: Ranges) -> Extents:
    symbols = frozenset[sympy.Symbol]().union(*(expr.free_symbols for expr in exprs))
    return frozenset((symbol, ranges[symbol]) for symbol in symbols if symbol in ranges)


def floor_div(x: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """x // divisor, for x ≥ 0."""
    if divisor == 1:
        return x
    quotient, rest = _split(x, divisor)
    if rest == 0:
        return quotient
    if below(rest, divisor, ranges):
        return quotient
    return quotient + FloorDiv(rest, divisor)


def modulo(x: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """x mod divisor, for x ≥ 0."""
    if divisor == 1:
        return ZERO
    _, rest = _split(x, divisor)
    return rest if rest == 0 or below(rest, divisor, ranges) else Mod(rest, divisor)


def simplify(expr: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """Expanded, with every division and remainder resolved that the ranges decide, and k·(x//k) + x mod k = x."""
    if expr.is_Symbol or expr.is_Integer:
        return expr
    return _simplified(expr, _extents((expr,), ranges))


@remembered
def _simplified(expr: sympy.Expr, extents: Extents) -> sympy.Expr:
    ranges = dict(extents)
    if expr.has(FloorDiv, Mod):
        replaced = {}
        for part in sorted(expr.atoms(FloorDiv, Mod), key=lambda p: p.count_ops()):
            function = floor_div if isinstance(part, FloorDiv) else modulo
            replaced[part] = function(simplify(part.args[0], ranges), simplify(part.args[1], ranges), ranges)
        expr = expr.xreplace({old: new for old, new in replaced.items() if old != new})
    expr = sympy.expand(expr)
    return _joined(expr) if expr.has(Mod) and expr.has(FloorDiv) else expr


def below(x: sympy.Expr, bound: sympy.Expr, ranges: Ranges) -> bool:
    """True where 0 ≤ x < bound is certain (x without negative terms)."""
    largest = upper_bound(x, ranges)
    if largest is None:
        return False
    gap = sympy.expand(bound - 1 - largest)
    return bool(gap.is_nonnegative)


def upper_bound(x: sympy.Expr, ranges: Ranges) -> sympy.Expr | None:
    """Largest value over all indices, or None where it is not known; needs nonnegative terms."""
    if x.is_Integer:
        return x if x >= 0 else None
    if x.is_Symbol:
        return ranges[x] - 1 if x in ranges else (None if x.is_positive is None else x)
    if isinstance(x, Mod):
        return x.args[1] - 1
    parts = [upper_bound(a, ranges) for a in x.args] if isinstance(x, (sympy.Add, sympy.Mul)) else []
    if isinstance(x, FloorDiv):
        inner = upper_bound(x.args[0], ranges)
        return None if inner is None else FloorDiv(inner, x.args[1])
    if not parts or any(p is None for p in parts):
        return None
    return sympy.expand(type(x)(*parts))


def _split(x: sympy.Expr, divisor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(q, r) with x = q·divisor + r, r holding the terms that the divisor does not divide as they stand."""
    quotient: list[sympy.Expr] = []
    rest: list[sympy.Expr] = []
    for term in sympy.Add.make_args(sympy.expand(x)):
        divided = _divided(term, divisor)
        (rest if divided is None else quotient).append(term if divided is None else divided)
    return sympy.Add(*quotient), sympy.Add(*rest)


def _divided(term: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    coefficient, factors = term.as_coeff_Mul()
    by, by_factors = divisor.as_coeff_Mul()
    if not by.is_Integer or coefficient % by:
        return None
    needed = list(sympy.Mul.make_args(by_factors)) if by_factors != 1 else []
    have = list(sympy.Mul.make_args(factors)) if factors != 1 else []
    for factor in needed:
        if factor not in have:
            return None
        have.remove(factor)
    return sympy.Mul(coefficient // by, *have)


def _joined(expr: sympy.Expr) -> sympy.Expr:
    """c·k·(x // k) + c·(x mod k) → c·x."""
    terms = list(sympy.Add.make_args(expr))
    changed = True
    while changed:
        changed = False
        for term in terms:
            found = next((f for f in sympy.Mul.make_args(term) if isinstance(f, Mod)), None)
            if found is None:
                continue
            factor = term / found
            partner = sympy.expand(factor * found.args[1] * FloorDiv(*found.args))
            if partner in terms and partner != term:
                terms.remove(term)
                terms.remove(partner)
                terms.extend(sympy.Add.make_args(sympy.expand(factor * found.args[0])))
                changed = True
                break
    return sympy.Add(*terms)


def unflatten(flat: sympy.Expr, shape: Sequence[sympy.Expr], ranges: Ranges) -> list[sympy.Expr]:
    """Index over a row-major shape of the element at a flat position."""
    index: list[sympy.Expr] = []
    for size in reversed(shape[1:]):
        index.append(modulo(flat, size, ranges))
        flat = floor_div(flat, size, ranges)
    return [*([flat] if shape else []), *reversed(index)]


def flatten(index: Sequence[sympy.Expr], shape: Sequence[sympy.Expr]) -> sympy.Expr:
    """Flat position of an index over a row-major shape."""
    flat: sympy.Expr = ZERO
    for i, size in zip(index, shape, strict=True):
        flat = flat * size + i
    return sympy.expand(flat)


def reshape_index(
    index: Sequence[sympy.Expr], new: Sequence[sympy.Expr], old: Sequence[sympy.Expr], ranges: Ranges
) -> list[sympy.Expr]:
    """Index over `old` of the element that a reshape to `new` shows at `index`.

    Runs of axes with equal products are mapped on their own, so that what a reshape leaves alone stays simple.
    """
    return list(_reshaped(tuple(index), tuple(new), tuple(old), _extents(index, ranges)))


@remembered
def _reshaped(
    index: tuple[sympy.Expr, ...], new: tuple[sympy.Expr, ...], old: tuple[sympy.Expr, ...], extents: Extents
) -> tuple[sympy.Expr, ...]:
    ranges = dict(extents)
    result: list[sympy.Expr] = []
    start_new = start_old = 0
    while start_new < len(new) or start_old < len(old):
        stop_new, stop_old = _next_run(new, old, start_new, start_old)
        inner = flatten(index[start_new:stop_new], new[start_new:stop_new])
        result += unflatten(inner, old[start_old:stop_old], ranges)
        start_new, start_old = stop_new, stop_old
    return tuple(result)


def _next_run(new: Sequence[sympy.Expr], old: Sequence[sympy.Expr], i: int, j: int) -> tuple[int, int]:
    """The shortest runs from i and j on with equal numbers of elements."""
    for length in range(1, len(new) - i + len(old) - j + 1):
        for in_new in range(max(0, length - (len(old) - j)), min(length, len(new) - i) + 1):
            stop_new, stop_old = i + in_new, j + length - in_new
            a, b = sympy.prod(new[i:stop_new]), sympy.prod(old[j:stop_old])
            rest = (stop_new == len(new)) == (stop_old == len(old)) or a == b == 1
            if sympy.expand(a - b) == 0 and rest:
                return stop_new, stop_old
    return len(new), len(old)
