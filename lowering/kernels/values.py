"""Scalar expressions: what a kernel computes for one element. No loops here, and nothing of any language.

A value is an immutable tree over loads, numbers, indices and operations. A `Reduce` binds index symbols of its
own; where its loop is placed is decided when a kernel is scheduled (`irc.lowering.kernels.schedule`).

Register types are `f32 f64 i64 i32 bool`. Narrower storage types exist only in loads and stores: a value that
passes through bf16 in the program is rounded by an explicit `round.bf16`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import sympy

from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.indexing import replaced

REGISTER = {
    "f64": "f64", "f32": "f32", "bf16": "f32", "f16": "f32", "f8e4m3": "f32", "f8e5m2": "f32",
    "i64": "i64", "i32": "i32", "i16": "i32", "i8": "i32", "u8": "i32", "bool": "bool",
}  # fmt: skip
"""Storage type → the type that holds it in a register."""

Bindings = tuple[tuple[sympy.Symbol, "Value"], ...]
_NONE: frozenset[sympy.Symbol] = frozenset()


class Value:
    """Base of all scalar expressions.

    Attributes:
        dtype: register type.
        symbols: free index symbols, those of gathered indices included.
    """

    dtype: str
    symbols: frozenset[sympy.Symbol]
    _hash: int

    def __hash__(self) -> int:
        return self._hash

    def operands(self) -> tuple[Value, ...]:
        """Values that this one is computed from."""
        return ()


def _seal(value: Value, symbols: Iterable[sympy.Symbol], *key: object) -> None:
    """Hashes are computed once: trees share much, and are compared often."""
    object.__setattr__(value, "symbols", frozenset(symbols))
    object.__setattr__(value, "_hash", hash((type(value).__name__, *key)))


@dataclass(frozen=True, eq=True)
class Literal(Value):
    """A number."""

    value: int | float | bool
    dtype: str
    symbols: frozenset[sympy.Symbol] = field(default=_NONE, init=False, compare=False, repr=False)
    _hash: int = field(default=0, init=False, compare=False, repr=False)
    __hash__ = Value.__hash__

    def __post_init__(self) -> None:
        _seal(self, (), repr(self.value), self.dtype)

    def __eq__(self, other: object) -> bool:  # 0.0 and -0.0 differ, NaN equals itself
        return isinstance(other, Literal) and (repr(self.value), self.dtype) == (repr(other.value), other.dtype)


@dataclass(frozen=True, eq=True)
class Index(Value):
    """An index expression as a number (i64)."""

    expr: sympy.Expr
    bindings: Bindings = ()
    dtype: str = "i64"
    symbols: frozenset[sympy.Symbol] = field(default=_NONE, init=False, compare=False, repr=False)
    _hash: int = field(default=0, init=False, compare=False, repr=False)
    __hash__ = Value.__hash__

    def __post_init__(self) -> None:
        _seal(self, _free(self.expr, self.bindings), self.expr)

    def operands(self) -> tuple[Value, ...]:
        return tuple(value for _, value in self.bindings)


@dataclass(frozen=True, eq=True)
class Load(Value):
    """An element of a buffer: `buffer[offset]`, offset in elements. `dtype` is the register type."""

    buffer: Buffer
    offset: sympy.Expr
    bindings: Bindings = ()
    dtype: str = ""
    symbols: frozenset[sympy.Symbol] = field(default=_NONE, init=False, compare=False, repr=False)
    _hash: int = field(default=0, init=False, compare=False, repr=False)
    __hash__ = Value.__hash__

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", REGISTER[self.buffer.dtype])
        _seal(self, _free(self.offset, self.bindings), self.buffer.name, self.offset)

    def operands(self) -> tuple[Value, ...]:
        return tuple(value for _, value in self.bindings)


@dataclass(frozen=True, eq=True)
class Apply(Value):
    """An operation of `irc.lowering.kernels.operations` on values."""

    op: str
    args: tuple[Value, ...]
    dtype: str
    symbols: frozenset[sympy.Symbol] = field(default=_NONE, init=False, compare=False, repr=False)
    _hash: int = field(default=0, init=False, compare=False, repr=False)
    __hash__ = Value.__hash__

    def __post_init__(self) -> None:
        _seal(self, frozenset().union(*(a.symbols for a in self.args)), self.op, self.dtype, self.args)

    def operands(self) -> tuple[Value, ...]:
        return self.args


@dataclass(frozen=True, eq=True)
class Local(Value):
    """A value that an earlier statement computed: a finished reduction, or a template's accumulator."""

    name: str
    dtype: str
    symbols: frozenset[sympy.Symbol] = field(default=_NONE, init=False, compare=False, repr=False)
    _hash: int = field(default=0, init=False, compare=False, repr=False)
    __hash__ = Value.__hash__

    def __post_init__(self) -> None:
        _seal(self, (), self.name, self.dtype)


@dataclass(frozen=True, eq=True)
class Reduce(Value):
    """`op` over all points of `axes` of `body`.

    Attributes:
        op: a key of `REDUCTIONS`.
        axes: (symbol, extent), outermost first.
        stop: the first axis runs to min(extent, stop) only.
    """

    op: str
    axes: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    body: Value
    dtype: str
    stop: Value | None = None
    symbols: frozenset[sympy.Symbol] = field(default=_NONE, init=False, compare=False, repr=False)
    _hash: int = field(default=0, init=False, compare=False, repr=False)
    __hash__ = Value.__hash__

    def __post_init__(self) -> None:
        own = {symbol for symbol, _ in self.axes}
        free = self.body.symbols - own
        if self.stop is not None:
            free |= self.stop.symbols
        _seal(self, free, self.op, self.axes, self.body, self.stop)

    def operands(self) -> tuple[Value, ...]:
        return (self.body,) if self.stop is None else (self.body, self.stop)


REDUCTIONS: dict[str, float | int | bool] = {
    "sum": 0, "prod": 1, "max": float("-inf"), "min": float("inf"), "any": False, "all": True,
    "argmax": float("-inf"), "argmin": float("inf"),
}  # fmt: skip
"""Reduction → what an empty one gives (before conversion to the accumulator's type). max and min keep NaN."""


def _free(expr: sympy.Expr, bindings: Bindings) -> frozenset[sympy.Symbol]:
    bound = {symbol for symbol, _ in bindings}
    return (frozenset(expr.free_symbols) - bound).union(*(value.symbols for _, value in bindings))


def walk(*roots: Value) -> Iterable[Value]:
    """Every distinct value below the roots, operands first."""
    seen: set[Value] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        value, done = stack.pop()
        if done:
            yield value
            continue
        if value in seen:
            continue
        seen.add(value)
        stack.append((value, True))
        stack.extend((operand, False) for operand in reversed(value.operands()))


def loads(*roots: Value) -> list[Load]:
    """Every distinct load below the roots."""
    return [value for value in walk(*roots) if isinstance(value, Load)]


def reductions(*roots: Value) -> list[Reduce]:
    """Every distinct reduction below the roots, inner ones first."""
    return [value for value in walk(*roots) if isinstance(value, Reduce)]


def rewrite(value: Value, change: Callable[[Value], Value | None], memo: dict[Value, Value] | None = None) -> Value:
    """The tree with parts exchanged: where `change` gives a value, that takes the part's place as it is."""
    known: dict[Value, Value] = {} if memo is None else memo

    def visit(part: Value) -> Value:
        found = known.get(part)
        if found is None:
            found = change(part)
            if found is None:
                found = _rebuilt(part, visit)
            known[part] = found
        return found

    return visit(value)


def substitute(value: Value, mapping: Mapping[sympy.Symbol, sympy.Expr], ranges: Mapping) -> Value:
    """The tree with index symbols replaced in every index expression."""

    def change(part: Value) -> Value | None:
        if not part.symbols.intersection(mapping):
            return part
        if isinstance(part, Load):
            offset = replaced(part.offset, mapping, ranges)
            return Load(part.buffer, offset, _bound(part.bindings))
        if isinstance(part, Index):
            return Index(replaced(part.expr, mapping, ranges), _bound(part.bindings))
        return None

    memo: dict[Value, Value] = {}

    def _bound(bindings: Bindings) -> Bindings:
        return tuple((symbol, rewrite(inner, change, memo)) for symbol, inner in bindings)

    return rewrite(value, change, memo)


def _rebuilt(part: Value, visit: Callable[[Value], Value]) -> Value:
    if isinstance(part, Apply):
        args = tuple(visit(a) for a in part.args)
        return part if all(a is b for a, b in zip(args, part.args, strict=True)) else Apply(part.op, args, part.dtype)
    if isinstance(part, Reduce):
        body, stop = visit(part.body), None if part.stop is None else visit(part.stop)
        same = body is part.body and stop is part.stop
        return part if same else Reduce(part.op, part.axes, body, part.dtype, stop)
    if isinstance(part, (Load, Index)) and part.bindings:
        bindings = tuple((symbol, visit(inner)) for symbol, inner in part.bindings)
        if all(a[1] is b[1] for a, b in zip(bindings, part.bindings, strict=True)):
            return part
        return Load(part.buffer, part.offset, bindings) if isinstance(part, Load) else Index(part.expr, bindings)
    return part
