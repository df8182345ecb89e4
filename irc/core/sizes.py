"""Nodes that compute sizes: from a sympy expression over named dimensions to size arithmetic in the graph."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor

from irc.core.dims import Dim, dim_symbol
from irc.core.errors import IrcError, nearest
from irc.core.program import VAL, Program, is_size

SizeValue = fx.Node | int | float | bool

# What each sympy function computes, as a function of Python numbers and symbolic sizes.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "Pow": operator.pow,
    "FloatPow": operator.pow,
    "PowByNatural": operator.pow,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "ToFloat": torch.sym_float,
    "TruncToInt": math.trunc,
    "FloorToInt": math.floor,
    "floor": math.floor,
    "CeilToInt": math.ceil,
    "ceiling": math.ceil,
    "RoundToInt": round,
    "OpaqueUnaryFn_sqrt": getattr(torch, "_sym_sqrt"),  # noqa: B009  (made at import time)
    "Where": torch.sym_ite,
    "Not": torch.sym_not,
    "Equality": operator.eq,
    "Unequality": operator.ne,
    "StrictLessThan": operator.lt,
    "LessThan": operator.le,
    "StrictGreaterThan": operator.gt,
    "GreaterThan": operator.ge,
    "Add": operator.add,
    "Mul": operator.mul,
    "And": operator.and_,
    "Or": operator.or_,
}
_FOLDED = ("Add", "Mul", "Max", "Min", "And", "Or")


def is_size_function(target: Any) -> bool:
    """Whether a call to `target` may compute a size: PyTorch's size queries and Python arithmetic."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name in ("aten::sym_size", "aten::sym_stride", "aten::sym_numel")
    return target in _SIZE_TARGETS


_SIZE_TARGETS = frozenset(_FUNCTIONS.values()) | {
    operator.sub, operator.neg, operator.pos, operator.abs, operator.getitem, torch.sym_int, torch.sym_sum,
    torch.sym_fresh_size,
}  # fmt: skip


def size_node(program: Program, size: sympy.Expr | torch.SymInt | int, *, before: fx.Node) -> fx.Node | int:
    """A node in front of `before` that computes a size; an int when the size is a number.

    `size`: a sympy expression over dimension names (`dim_symbol`), or a size out of some `meta["val"]`. Nodes
    that compute it already, in front of `before`, are used again.

    Raises:
        IrcError: the expression cannot be computed from the sizes of the program's inputs.
    """
    made = SizeBuilder(program, before).value(size)
    if isinstance(made, float):
        raise IrcError(f"{size} is not an integer")
    return made


class SizeBuilder:
    """Makes size nodes and remembers them.

    `before`: where nodes go (None: at the end of the graph). `reserved`: names that new nodes may not take.
    """

    def __init__(self, program: Program, before: fx.Node | None = None, reserved: set[str] | None = None) -> None:
        self.program = program
        self._before = before
        self._reserved = reserved
        self._count = 0
        self._known: dict[sympy.Expr, fx.Node] = {}
        for node in program.graph.nodes:
            if node is before:
                break
            if node.op in ("call_function", "placeholder") and is_size(node):
                self._known.setdefault(program.expr(node.meta[VAL]), node)

    def value(self, size: sympy.Expr | torch.SymInt | int) -> SizeValue:
        """A node for the size, or a number."""
        expr = size if isinstance(size, sympy.Basic) else self.program.expr(size)
        if expr.is_Integer or expr.is_Float or expr in (sympy.true, sympy.false):
            return _number(expr)
        known = self._known.get(expr)
        if known is not None:
            return known
        node = self._dimension(expr) if isinstance(expr, sympy.Symbol) else self._compute(expr)
        if isinstance(node, fx.Node):
            self._known[expr] = node
        return node

    def _compute(self, expr: sympy.Expr) -> SizeValue:
        kind = type(expr).__name__
        if kind not in _FUNCTIONS:
            raise IrcError(f"no operation computes the size {expr} ({kind})")
        arguments = [self.value(a) for a in self._ordered(expr)]
        if kind in _FOLDED:
            return functools.reduce(lambda a, b: self._call(kind, a, b), arguments)
        return self._call(kind, *arguments)

    @staticmethod
    def _ordered(expr: sympy.Expr) -> list[sympy.Expr]:
        # Sympy keeps arguments of commutative functions in an order of its own: make it reproducible.
        if isinstance(expr, sympy.Add):
            return list(expr.as_ordered_terms())
        if isinstance(expr, sympy.Mul):
            return list(expr.as_ordered_factors())
        if type(expr).__name__ in _FOLDED:
            return sorted(expr.args, key=str)
        return list(expr.args)

    def _call(self, kind: str, *arguments: SizeValue) -> SizeValue:
        function = _FUNCTIONS[kind]
        if not any(isinstance(a, fx.Node) for a in arguments):
            return function(*arguments)
        return self._insert(function, *arguments)

    def _dimension(self, symbol: sympy.Symbol) -> fx.Node:
        """The size of the first input whose shape gives the dimension: `D` itself, or `a*D + b`."""
        inverted: tuple[fx.Node, int, tuple[sympy.Expr, sympy.Expr]] | None = None
        for node in self.program.placeholders:
            value = node.meta.get(VAL)
            for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                expr = self.program.expr(size)
                if expr == symbol:
                    return self._insert(torch.ops.aten.sym_size.int, node, axis)
                line = _linear(expr, symbol) if inverted is None and expr.free_symbols == {symbol} else None
                if line is not None:
                    inverted = (node, axis, line)
        if inverted is None:
            names = ", ".join(str(dim_symbol(d)) for d in self.program.dims) or "none"
            raise IrcError(
                f"no input of program {self.program.name} has dimension {symbol} as a size (its dimensions: {names})"
            )
        node, axis, (slope, offset) = inverted
        made = self._insert(torch.ops.aten.sym_size.int, node, axis)
        if offset:
            made = self._insert(operator.add, made, -offset)
        return self._insert(operator.floordiv, made, slope) if slope != 1 else made

    def _insert(self, target: Callable[..., Any], *args: SizeValue) -> fx.Node:
        graph, name = self.program.graph, self._free_name()
        if self._before is None:
            node = graph.create_node("call_function", target, args, name=name)
        else:
            with graph.inserting_before(self._before):
                node = graph.create_node("call_function", target, args, name=name)
        self.program.infer_type(node)
        return node

    def _free_name(self) -> str | None:
        if self._reserved is None:
            return None
        while True:
            name = f"size_{self._count}"
            self._count += 1
            if name not in self._reserved:
                return name


def symbolic_size(expr: sympy.Expr | int, dims: Mapping[str, Dim]) -> Any:
    """A sympy expression over dimension names as a number or a symbolic size: the inverse of `Program.expr`."""
    if not isinstance(expr, sympy.Basic):
        return expr
    if expr.is_Integer or expr.is_Float or expr in (sympy.true, sympy.false):
        return _number(expr)
    if isinstance(expr, sympy.Symbol):
        if expr.name not in dims:
            raise IrcError(f"unknown dimension {expr.name!r}{nearest(expr.name, dims)}")
        return dims[expr.name].size
    kind = type(expr).__name__
    if kind not in _FUNCTIONS:
        raise IrcError(f"no operation computes the size {expr} ({kind})")
    arguments = [symbolic_size(a, dims) for a in SizeBuilder._ordered(expr)]
    return functools.reduce(_FUNCTIONS[kind], arguments) if kind in _FOLDED else _FUNCTIONS[kind](*arguments)


def _number(expr: sympy.Expr) -> int | float | bool:
    if expr in (sympy.true, sympy.false):
        return bool(expr)
    return int(expr) if expr.is_Integer else float(expr)


def _linear(expr: sympy.Expr, symbol: sympy.Symbol) -> tuple[int, int] | None:
    """(a, b) of `a*symbol + b` with whole a > 0, or None."""
    slope = expr.coeff(symbol, 1)
    offset = expr - slope * symbol
    if slope.is_Integer and slope > 0 and sympy.expand(offset).is_Integer:
        return int(slope), int(sympy.expand(offset))
    return None
