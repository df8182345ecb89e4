"""Some rows of a size-only table, without the rest: how wide masks are probed cheaply.

A mask over a 32k window has 10^9 entries; telling its kind takes a few dozen of its rows. Rows are
taken at the last axis but one and pushed backwards through element-wise and broadcasting
operations down to the one-dimensional position ranges, which are evaluated whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import IrcError
from irc.core.operands import apply_op, input_node, list_argument
from irc.core.program import VAL, Program, is_size
from irc.core.slices import evaluate_size

aten = torch.ops.aten
MAX_ELEMENTS = 1 << 25

# Element-wise with broadcasting, but not tagged `pointwise` by PyTorch.
_MORE_POINTWISE = frozenset({
    aten.__and__.Tensor, aten.__and__.Scalar, aten.__or__.Tensor, aten.__or__.Scalar, aten.__xor__.Tensor,
    aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar, aten.masked_fill.Tensor,
    aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.floor_divide.default,
    aten.contiguous.default, aten.alias.default,
})  # fmt: skip
_TRIANGLES = {aten.tril.default: torch.le, aten.triu.default: torch.ge}
_SIZE_ARGUMENT = {
    aten.ones.default: 0, aten.zeros.default: 0, aten.full.default: 0,
    aten.expand.default: 1,
}  # fmt: skip
# These read the shape of their first argument, never its values.
_FILLED: dict[Any, float | None] = {
    aten.ones_like.default: 1, aten.zeros_like.default: 0, aten.full_like.default: None,
    aten.new_ones.default: 1, aten.new_zeros.default: 0, aten.new_full.default: None,
}  # fmt: skip


def value_dependent(program: Program) -> set[fx.Node]:
    """As `data_dependent`, but zeros and ones in the shape of some data depend on no data."""
    tainted = set(program.placeholders)
    for node in program.graph.nodes:
        if node.op == "call_function" and not is_size(node) and any(i in tainted for i in inputs_by_value(node)):
            tainted.add(node)
    return tainted


def inputs_by_value(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values, not only whose shapes, the node reads."""
    if node.target in _FILLED:
        return [used for used in node.all_input_nodes if used is not node.args[0]]
    return node.all_input_nodes


def is_pointwise(target: Any) -> bool:
    """True for an operation that computes each element from the elements of its inputs at that place."""
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or target in _MORE_POINTWISE
    )


class RowEvaluator:
    """Evaluates size-only nodes of a program at given sizes, whole or some rows of them.

    Raises:
        IrcError: a node depends on data, or does not fit the memory bound.
    """

    def __init__(self, program: Program, sizes: Mapping[str, int]) -> None:
        self._program = program
        self._sizes = sizes
        self._whole: dict[fx.Node, Any] = {}
        self._some: dict[tuple[fx.Node, tuple[int, ...]], Tensor] = {}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape that the node's type promises at these sizes."""
        return tuple(evaluate_size(self._program, size, self._sizes) for size in node.meta[VAL].shape)

    def whole(self, node: fx.Node) -> Any:
        """The node's value."""
        if node in self._whole:
            return self._whole[node]
        if is_size(node):
            value = evaluate_size(self._program, node.meta[VAL], self._sizes)
        elif node.op == "get_attr":
            value = self._program.weight(node)
        elif node.op != "call_function":
            raise IrcError(f"the value of {node.name} is not known before the program runs")
        else:
            self._check_memory(node)
            if node.target in _FILLED:
                return self._filled(node, self.shape(node))
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.whole)
            value = apply_op(node, *args, **kwargs)
            self._check_shape(node, value)
        self._whole[node] = value
        return value

    def rows(self, node: fx.Node, rows: Sequence[int]) -> Tensor:
        """The given rows of the node's value along its last axis but one (all of it if that has size 1)."""
        shape = self.shape(node)
        if len(shape) < 2 or shape[-2] == 1:
            return self.whole(node)
        key = (node, tuple(rows))
        if key not in self._some:
            self._some[key] = self._rows(node, list(rows), shape)
        return self._some[key]

    def _rows(self, node: fx.Node, rows: list[int], shape: tuple[int, ...]) -> Tensor:
        target: Any = node.target
        arguments: Any = node.args
        if node.op == "call_function" and node not in self._whole:
            if is_pointwise(target):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._operand(n, rows))
                return target(*args, **kwargs)
            if target in _FILLED:
                return self._filled(node, (*shape[:-2], len(rows), shape[-1]))
            if target in _SIZE_ARGUMENT:
                return self._resized(node, rows, shape)
            if target in _TRIANGLES:
                return self._triangle(node, rows, shape)
            if target is aten.index.Tensor and _indexes_every_axis(node):
                return target(self.whole(arguments[0]), [self.rows(index, rows) for index in arguments[1]])
            if target is aten.unsqueeze.default and arguments[1] % len(shape) <= len(shape) - 3:
                return self.rows(arguments[0], rows).unsqueeze(arguments[1] % len(shape))
        return self.whole(node).index_select(-2, torch.tensor(rows))

    def _operand(self, node: fx.Node, rows: list[int]) -> Any:
        return self.whole(node) if is_size(node) else self.rows(node, rows)

    def _resized(self, node: fx.Node, rows: list[int], shape: tuple[int, ...]) -> Tensor:
        """The same creation or expansion, for as many rows as are wanted."""
        target: Any = node.target
        position = _SIZE_ARGUMENT[target]
        size = [*shape[:-2], len(rows), shape[-1]]
        if position == 0:
            return target(size, *self._values(node.args[1:]), **self._values(node.kwargs))
        source: Any = node.args[0]
        value = self.rows(source, rows) if target is aten.expand.default else self.whole(source)
        return target(value, size, *self._values(node.args[2:]), **self._values(node.kwargs))

    def _filled(self, node: fx.Node, shape: tuple[int, ...]) -> Tensor:
        """A constant in the shape of another tensor, whose values are not needed."""
        fill = _FILLED[node.target]
        if fill is None:
            fill = self._values(node.args[2 if node.target is aten.new_full.default else 1])
        return torch.full(shape, fill, dtype=node.meta[VAL].dtype)

    def _triangle(self, node: fx.Node, rows: list[int], shape: tuple[int, ...]) -> Tensor:
        """Rows of tril and triu: column - row ≤ (≥) diagonal."""
        arguments: Any = self._values(node.args[1:])
        diagonal: Any = arguments[0] if arguments else node.kwargs.get("diagonal", 0)
        offset = torch.arange(shape[-1]) - torch.tensor(rows).unsqueeze(-1)
        source: Any = node.args[0]
        inner = self.rows(source, rows)
        target: Any = node.target
        keep = _TRIANGLES[target](offset, diagonal)
        return torch.where(keep, inner, torch.zeros((), dtype=inner.dtype))

    def _values(self, arguments: Any) -> Any:
        return fx.map_arg(arguments, self.whole)

    def _check_memory(self, node: fx.Node) -> None:
        value = node.meta.get(VAL)
        if isinstance(value, Tensor):
            count = 1
            for size in self.shape(node):
                count *= max(size, 1)
            if count > MAX_ELEMENTS:
                raise IrcError(f"{node.name} has {count} elements at sizes {dict(self._sizes)}: too many to evaluate")

    def _check_shape(self, node: fx.Node, value: Any) -> None:
        # Slicing a fixed table beyond its end gives less than the type says: such sizes are not legal.
        expected = node.meta.get(VAL)
        if isinstance(value, Tensor) and isinstance(expected, Tensor) and tuple(value.shape) != self.shape(node):
            raise IrcError(
                f"{node.name} has shape {list(value.shape)}, not {list(self.shape(node))}, at {dict(self._sizes)}"
            )


def _indexes_every_axis(node: fx.Node) -> bool:
    indices = list_argument(node, 1)
    return len(indices) == input_node(node).meta[VAL].ndim and all(
        isinstance(index, fx.Node) and index.meta[VAL].dtype != torch.bool for index in indices
    )
