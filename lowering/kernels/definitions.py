"""What each graph node's value is, element by element: definitions of operations, composed by index.

An operation is defined by a function from an output index to a `Value` (`@defines`, in `ops/`). Asking a node for
its value at an index either gives a load, where the node has a buffer, or what its operation computes there,
which asks its operands in turn. So fusion is nothing but the decision which nodes get buffers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
import torch.fx as fx
from torch import Tensor

from irc.core.dims import Size
from irc.core.errors import TargetError
from irc.core.program import VAL, Program, dtype_name
from irc.core.target import op_name
from irc.lowering.kernels.alike import Names
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.indexing import ZERO, below, index_symbol, simplify
from irc.lowering.kernels.values import REGISTER, Apply, Bindings, Index, Literal, Load, Reduce, Value

At = tuple[sympy.Expr, ...]
Define = Callable[["Call", At], Value]
_DEFINITIONS: dict[str, Definition] = {}


@dataclass(frozen=True)
class Definition:
    """How an operation is computed element by element.

    Attributes:
        define: (call, output index) → value.
        kind: `view` shows elements of its operand elsewhere and costs nothing; `pointwise` costs little;
            `reduction` walks many elements for one.
        refuses: why a node cannot be computed this way, or None.
    """

    define: Define
    kind: str
    refuses: Callable[[Call], str | None] = lambda call: None


def defines(*names: str, kind: str, refuses: Callable[[Call], str | None] | None = None) -> Callable[[Define], Define]:
    """Decorator on a function of (call, index): registers it for operations named as in dumps (`aten.add.Tensor`)."""

    def register(define: Define) -> Define:
        for name in names:
            if name in _DEFINITIONS:
                raise ValueError(f"{name} is defined twice")
            _DEFINITIONS[name] = Definition(define, kind, refuses or (lambda call: None))
        return define

    return register


def definition_of(node: fx.Node) -> Definition | None:
    """The definition of a node's operation, or None."""
    if node.target is operator.getitem:
        source = node.args[0]
        return _DEFINITIONS.get(op_name(source)) if isinstance(source, fx.Node) else None
    return _DEFINITIONS.get(op_name(node)) if node.op == "call_function" else None


@dataclass(frozen=True)
class Operand:
    """An argument as definitions see it: type, shape, and a value for each index."""

    dtype: str
    shape: At
    at: Callable[[At], Value]
    node: fx.Node | None = None

    def spread(self, index: At) -> Value:
        """The value at an index of a shape that this operand is broadcast to."""
        own = index[len(index) - len(self.shape) :]
        return self.at(tuple(ZERO if size == 1 else i for i, size in zip(own, self.shape, strict=True)))


class Definer:
    """Values of a program's nodes.

    `buffers` says which nodes have memory; all others are computed where they are used. Index symbols are named after
    nodes, by `names` (default: their own).
    """

    def __init__(self, program: Program, names: Names | None = None) -> None:
        self.program = program
        self.names = names or Names()
        self.buffers: dict[fx.Node, Buffer] = {}
        self.ranges: dict[sympy.Symbol, sympy.Expr] = {}
        self._values: dict[fx.Node, dict[At, Value]] = {}
        self._gathered: dict[Value, sympy.Symbol] = {}
        self._sources: dict[sympy.Symbol, Value] = {}

    def give_buffer(self, node: fx.Node, buffer: Buffer) -> None:
        """From now on the node's value is read from memory."""
        self.buffers[node] = buffer
        self._values.pop(node, None)

    def shape(self, node: fx.Node) -> At:
        return self.program.shape_expr(node)

    def dtype(self, node: fx.Node) -> str:
        return dtype_name(node.meta[VAL].dtype)

    def axes(self, node: fx.Node, tag: str = "") -> tuple[At, tuple[tuple[sympy.Symbol, sympy.Expr], ...]]:
        """(an index of symbols over the node's shape, (symbol, extent) of each axis)."""
        shape = self.shape(node)
        # An axis of one element has no index.
        name = self.names.of_node(node) + tag
        symbols = tuple(ZERO if size == 1 else index_symbol(f"{name}.{i}") for i, size in enumerate(shape))
        self.ranges.update((s, size) for s, size in zip(symbols, shape, strict=True) if s != 0)
        return symbols, tuple(zip(symbols, shape, strict=True))

    def value(self, node: fx.Node, index: At) -> Value:
        """The node's value at an index; sizes are values without index."""
        known = self._values.setdefault(node, {})
        found = known.get(index)
        if found is None:
            found = known[index] = self._make(node, index)
        return found

    def defined(self, node: fx.Node, index: At) -> Value:
        """The value as the node's operation computes it, whether or not the node has a buffer."""
        definition = definition_of(node)
        if definition is None:
            raise TargetError(f"no definition of {op_name(node)} ({node.name})")
        return definition.define(Call(self, node), index)

    def _make(self, node: fx.Node, index: At) -> Value:
        size = node.meta.get(VAL)
        if not isinstance(size, Tensor) and not isinstance(size, (tuple, list)):
            return self.number(self.program.expr(cast(Size, size)))  # a node is a tensor, several, or a size
        if node in self.buffers:
            return self.load(self.buffers[node], index)
        return self.defined(node, index)

    def load(self, buffer: Buffer, index: At) -> Value:
        offset = simplify(buffer.offset(index), self.ranges)
        return Load(buffer, offset, self.bindings(offset))

    def number(self, expr: sympy.Expr) -> Value:
        """A size or index as a value."""
        if expr.is_Integer:
            return Literal(int(expr), "i64")
        if expr.is_Float or expr.is_Rational:
            return Literal(float(expr), "f64")
        expr = simplify(expr, self.ranges)
        return Literal(int(expr), "i64") if expr.is_Integer else Index(expr, self.bindings(expr))

    # ------------------------------------------------------------ indices that are read from memory

    def gathered(self, value: Value, extent: sympy.Expr) -> sympy.Expr:
        """A value as an index into an axis of that extent."""
        if isinstance(value, Index):
            return value.expr
        if isinstance(value, Literal):
            return sympy.Integer(int(value.value))
        if value not in self._gathered:
            symbol = index_symbol(f"at{len(self._gathered)}")
            self._gathered[value] = symbol
            self._sources[symbol] = value
            self.ranges[symbol] = extent
        return self._gathered[value]

    def bindings(self, expr: sympy.Expr) -> Bindings:
        """Where the gathered indices in an expression come from."""
        found = [symbol for symbol in expr.free_symbols if symbol in self._sources]
        return tuple((symbol, self._sources[symbol]) for symbol in sorted(found, key=lambda s: s.name))


class Call:
    """A node being defined: its arguments by name, as operands, sizes and constants."""

    def __init__(self, definer: Definer, node: fx.Node) -> None:
        self.definer = definer
        self.output: int | None = None
        if node.target is operator.getitem:
            source, output = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(output, int)
            self.output, self.result, node = output, node, source
        else:
            self.result = node
        self.node = node
        self._arguments = _arguments(node)

    @property
    def ranges(self) -> dict[sympy.Symbol, sympy.Expr]:
        return self.definer.ranges

    @property
    def dtype(self) -> str:
        """Storage type of the result."""
        return self.definer.dtype(self.result)

    @property
    def shape(self) -> At:
        return self.definer.shape(self.result)

    def raw(self, name: str) -> Any:
        """An argument as it stands in the graph (default filled in); sizes as sympy expressions."""
        return self._sizes(self._arguments[name])

    def has(self, name: str) -> bool:
        return self._arguments.get(name) is not None

    def operand(self, name: str) -> Operand:
        return self.as_operand(self._arguments[name])

    def operands(self, name: str) -> list[Operand]:
        return [self.as_operand(item) for item in self._arguments[name]]

    def as_operand(self, value: Any) -> Operand:
        """A node, size or number as an operand."""
        definer = self.definer
        if isinstance(value, fx.Node) and isinstance(value.meta.get(VAL), Tensor):
            node = value
            return Operand(definer.dtype(node), definer.shape(node), lambda at: definer.value(node, at), node)
        found = self._sizes(value)
        if isinstance(found, bool):
            return Operand("bool", (), lambda at: Literal(found, "bool"))
        if isinstance(found, (int, float)):
            return Operand("i64" if isinstance(found, int) else "f64", (), lambda at: literal(found))
        return Operand("i64", (), lambda at: definer.number(found))

    def _sizes(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            known = value.meta.get(VAL)
            if isinstance(known, (Tensor, tuple, list)):
                return value
            return self.definer.program.expr(cast(Size, known))  # a node is a tensor, several, or a size
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return self.definer.program.expr(value)
        if isinstance(value, (list, tuple)):
            return [self._sizes(item) for item in value]
        return value

    def axis(self, name: str, rank: int) -> int:
        """A `dim` argument, counted from the front."""
        return int(self.raw(name)) % max(rank, 1)

    def symbol(self, name: str, extent: sympy.Expr) -> sympy.Symbol:
        """A bound index of this node, running over `extent`."""
        symbol = index_symbol(f"{self.definer.names.of_node(self.node)}_{name}")
        self.ranges[symbol] = sympy.sympify(extent)
        return symbol

    def reduce(
        self, op: str, axes: Sequence[tuple[sympy.Symbol, sympy.Expr]], body: Value, stop: Value | None = None
    ) -> Value:
        dtype = "i64" if op in ("argmax", "argmin") else body.dtype
        return Reduce(op, tuple((s, sympy.sympify(e)) for s, e in axes), body, dtype, stop)

    def within(self, expr: sympy.Expr, extent: sympy.Expr) -> bool:
        return below(expr, sympy.sympify(extent), self.ranges)


def _arguments(node: fx.Node) -> dict[str, Any]:
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    filled = {a.name: a.default_value if a.has_default_value() else None for a in schema}
    filled.update({a.name: value for a, value in zip(schema, node.args, strict=False)})
    filled.update(node.kwargs)
    return filled


def literal(value: float | int | bool, dtype: str | None = None) -> Literal:
    """A number, in the register type of a storage type."""
    kind = (
        REGISTER[dtype] if dtype else "bool" if isinstance(value, bool) else "i64" if isinstance(value, int) else "f64"
    )
    if kind == "bool":
        return Literal(bool(value), kind)
    return Literal(int(value), kind) if kind in ("i64", "i32") else Literal(float(value), kind)


def convert(value: Value, dtype: str) -> Value:
    """A value in another register type."""
    if value.dtype == dtype:
        return value
    if isinstance(value, Literal):
        return literal(value.value, dtype)
    return Apply("convert", (value,), dtype)


def settle(value: Value, storage: str) -> Value:
    """A value as it reads back after being stored as `storage`: rounded or wrapped."""
    kept = convert(value, REGISTER[storage])
    if REGISTER[storage] == storage or (isinstance(kept, Load) and kept.buffer.dtype == storage):
        return kept
    rounding = f"round.{storage}"
    return kept if isinstance(kept, Apply) and kept.op == rounding else Apply(rounding, (kept,), kept.dtype)


def apply(op: str, *args: Value, dtype: str | None = None) -> Value:
    """An operation on values of one register type (that of the first, if none is given)."""
    return Apply(op, args, dtype or args[0].dtype)
