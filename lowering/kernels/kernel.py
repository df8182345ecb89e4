"""Kernels as data: loops, statements and what they came from; printable, and free of any language.

kernel add_rms_norm over (b in B parallel, s in S parallel)
  for e in 256 vector:
    x[256·S·b + 256·s + e] = add(y[…], z[…])
  sum0 = sum
  for r in 256 vector: …
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal as Choice

import sympy

from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.values import Apply, Index, Literal, Load, Local, Reduce, Value, loads

Kind = Choice["serial", "parallel", "vector"]


@dataclass(frozen=True)
class Axis:
    """A loop's index.

    Attributes:
        extent: the index runs over 0 … extent - 1.
        stop: further bound known only at run time.
        kind: `parallel` axes may run in any order on several threads, `vector` axes in lanes.
        tile: iterations that a thread takes at least (None: a printer's choice).
    """

    symbol: sympy.Symbol
    extent: sympy.Expr
    kind: Kind = "serial"
    stop: Value | None = None
    tile: int | None = None

    def __str__(self) -> str:
        kind = "" if self.kind == "serial" else f" {self.kind}"
        tile = f" tile {self.tile}" if self.tile else ""
        stop = f" until {value_text(self.stop)}" if self.stop is not None else ""
        return f"{self.symbol} in {self.extent}{stop}{kind}{tile}"


@dataclass(frozen=True)
class Start:
    """A reduction's accumulator, at its neutral element."""

    name: str
    op: str
    dtype: str

    def lines(self) -> Iterator[str]:
        yield f"{self.name}: {self.dtype} = {self.op} of nothing"


@dataclass(frozen=True)
class Combine:
    """Take a value into an accumulator; `position`: of the element, for argmax and argmin."""

    name: str
    op: str
    value: Value
    position: Value | None = None

    def lines(self) -> Iterator[str]:
        yield f"{self.name} = {self.op}({self.name}, {value_text(self.value)})"


@dataclass(frozen=True)
class Store:
    """`buffer[offset] = value`, where `when` holds."""

    buffer: Buffer
    offset: Index
    value: Value
    when: Value | None = None

    def lines(self) -> Iterator[str]:
        condition = "" if self.when is None else f" if {value_text(self.when)}"
        yield f"{self.buffer.name}[{value_text(self.offset)}] = {value_text(self.value)}{condition}"


@dataclass(frozen=True)
class Loop:
    """Statements for each value of an axis."""

    axis: Axis
    body: tuple[Statement, ...]

    def lines(self) -> Iterator[str]:
        yield f"for {self.axis}:"
        for statement in self.body:
            yield from (f"  {line}" for line in statement.lines())


Statement = Start | Combine | Store | Loop


@dataclass(frozen=True)
class Origin:
    """A graph node that a kernel computes: its name, operation, module path and the user's line."""

    node: str
    op: str
    module: str
    location: str

    def __str__(self) -> str:
        place = " ".join(part for part in (self.module, self.location) if part)
        return f"{self.node} = {self.op}" + (f"  # {place}" if place else "")


@dataclass(frozen=True)
class Kernel:
    """A loop nest: `outer` axes around `body`.

    Attributes:
        name: readable and unique in a program.
        outer: axes that enclose everything, outermost first.
        origins: the nodes that it computes, in order.
    """

    name: str
    outer: tuple[Axis, ...]
    body: tuple[Statement, ...]
    origins: tuple[Origin, ...] = ()

    def stores(self) -> list[Store]:
        return [s for s in statements(self.body) if isinstance(s, Store)]

    @property
    def writes(self) -> list[Buffer]:
        """Buffers that are written, in order."""
        return list(dict.fromkeys(store.buffer for store in self.stores()))

    @property
    def reads(self) -> list[Buffer]:
        """Buffers that are read, in order; what the kernel itself wrote before included."""
        return list(dict.fromkeys(load.buffer for load in loads(*values_of(self))))

    @property
    def sizes(self) -> list[sympy.Symbol]:
        """Named dimensions that the kernel needs, sorted."""
        return sorted(_free_sizes(self), key=lambda s: s.name)

    def lines(self) -> Iterator[str]:
        yield f"kernel {self.name} over ({', '.join(map(str, self.outer))})"
        yield from (f"  # {origin}" for origin in self.origins)
        for statement in self.body:
            yield from (f"  {line}" for line in statement.lines())

    def __str__(self) -> str:
        return "\n".join(self.lines())


def statements(body: tuple[Statement, ...]) -> Iterator[Statement]:
    """All statements, loops before what they hold."""
    for statement in body:
        yield statement
        if isinstance(statement, Loop):
            yield from statements(statement.body)


def axes_of(kernel: Kernel) -> list[Axis]:
    """All axes, the outer ones first."""
    return [*kernel.outer, *(s.axis for s in statements(kernel.body) if isinstance(s, Loop))]


def values_of(kernel: Kernel) -> list[Value]:
    """Every value that a statement holds."""
    found: list[Value | None] = [axis.stop for axis in axes_of(kernel)]
    for statement in statements(kernel.body):
        if isinstance(statement, Store):
            found += [statement.offset, statement.value, statement.when]
        elif isinstance(statement, Combine):
            found += [statement.value, statement.position]
    return [value for value in found if value is not None]


def _free_sizes(kernel: Kernel) -> set[sympy.Symbol]:
    axes = axes_of(kernel)
    free: set[sympy.Symbol] = set().union(*(axis.extent.free_symbols for axis in axes))
    free |= set().union(*(value.symbols for value in values_of(kernel)))
    return free - {axis.symbol for axis in axes}


def with_body(loop: Loop, body: tuple[Statement, ...]) -> Loop:
    return replace(loop, body=body)


def value_text(value: Value) -> str:
    """A value as one line."""
    if isinstance(value, Literal):
        return repr(value.value)
    if isinstance(value, Local):
        return value.name
    if isinstance(value, Load):
        return f"{value.buffer.name}[{_index_text(value.offset, value)}]"
    if isinstance(value, Index):
        return _index_text(value.expr, value)
    if isinstance(value, Apply):
        name = f"{value.op}.{value.dtype}" if value.op == "convert" else value.op
        return f"{name}({', '.join(value_text(a) for a in value.args)})"
    assert isinstance(value, Reduce)
    axes = ", ".join(f"{symbol} in {extent}" for symbol, extent in value.axes)
    return f"{value.op}[{axes}]({value_text(value.body)})"


def _index_text(expr: sympy.Expr, value: Load | Index) -> str:
    text = str(expr)
    bound = ", ".join(f"{symbol} = {value_text(inner)}" for symbol, inner in value.bindings)
    return f"{text} where {bound}" if bound else text
