"""Rotary tables that hold every angle twice: the proof that they do, and the table without the copies.

A table [..., 2R] is *doubled* when its halves are equal (half-split), or its neighbours (interleaved).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import IrcError
from irc.core.program import VAL, Program, is_size
from irc.core.rewrite.calls import call_of, cast_input
from irc.core.slices import data_dependent, evaluate_at, integer_constants

_POINTWISE = {
    "aten::cos", "aten::sin", "aten::neg", "aten::mul", "aten::add", "aten::sub", "aten::div", "aten::clone",
    "aten::contiguous", "aten::alias", "aten::detach",
}  # fmt: skip
_ROW_OPS = {"aten::unsqueeze", "aten::squeeze", "aten::select", "aten::slice", "aten::index_select"}


class RotaryTables:
    """Proofs and narrow forms of one program's tables, each found once."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._narrow: dict[tuple[fx.Node, bool], fx.Node] = {}
        self._data: set[fx.Node] | None = None

    # ---------------------------------------------------------------- proof

    def why_not_doubled(self, table: fx.Node, *, interleaved: bool) -> str | None:
        """None when the table is proved to be doubled, else what stands against it."""
        if self._by_structure(table, interleaved):
            return None
        what = "neighbouring columns" if interleaved else "both halves"
        if self._data is None:
            self._data = data_dependent(self._program)
        if table in self._data:
            return f"cannot prove that {what} of {table.name} are equal: it depends on data"
        return None if self._by_value(table, interleaved) else f"{what} of {table.name} differ"

    def _by_structure(self, node: Any, interleaved: bool) -> bool:
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get(VAL), Tensor):
            return True
        if _same_in_all_columns(node):
            return True
        if self._doubling(node, interleaved) is not None:
            return True
        inner = _columnwise_inputs(node)
        return inner is not None and all(self._by_structure(i, interleaved) for i in inner)

    def _doubling(self, node: fx.Node, interleaved: bool) -> fx.Node | None:
        """The narrow table that this node itself doubles."""
        call = call_of(node)
        if call is None:
            return None
        arguments, last = call.arguments, node.meta[VAL].ndim - 1
        if call.name == "aten::cat" and not interleaved and len(arguments["tensors"]) == 2:
            first, second = arguments["tensors"]
            return first if first is second and arguments["dim"] == last else None
        if call.name == "aten::repeat_interleave" and interleaved and arguments.get("repeats") == 2:
            source = arguments["self"]
            return source if arguments["dim"] in (last, -1) else None
        return self._stacked(node, interleaved)

    def _stacked(self, node: fx.Node, interleaved: bool) -> fx.Node | None:
        """flatten(stack([f, f])): interleaved when the new dimension is the last, half-split when before it."""
        call = call_of(node)
        if call is None or call.name not in ("aten::flatten", "aten::view"):
            return None
        stack = call.arguments["self"]
        inner = call_of(stack) if isinstance(stack, fx.Node) else None
        if inner is None or inner.name != "aten::stack" or len(inner.arguments["tensors"]) != 2:
            return None
        shape, flat = self._program.shape_expr(stack), self._program.shape_expr(node)
        if flat != (*shape[:-2], shape[-2] * shape[-1]):
            return None
        first, second = inner.arguments["tensors"]
        wanted = len(shape) - (1 if interleaved else 2)
        return first if first is second and inner.arguments["dim"] == wanted else None

    def _by_value(self, table: fx.Node, interleaved: bool) -> bool:
        """Evaluate the table at two settings of the dimensions, beyond the literals in its computation."""
        names = list(self._program.dims)
        largest = max([n for n in integer_constants([table]) if n < 1 << 14], default=1)
        for size in (3, min(largest, 4096) + 5):
            sizes = {name: size + 2 * position for position, name in enumerate(names)}
            try:
                value = evaluate_at(self._program, [table], sizes)[0]
            except (IrcError, RuntimeError, IndexError):
                return False  # these sizes cannot be evaluated (a table that ends): not proved
            pairs = value.unflatten(-1, (-1, 2)) if interleaved else value.unflatten(-1, (2, -1)).transpose(-1, -2)
            if not torch.equal(pairs[..., 0], pairs[..., 1]):
                return False
        return True

    # ---------------------------------------------------------------- narrow form

    def narrowed(self, narrow_slice: fx.Node) -> fx.Node | None:
        """A node that computes `slice(table)` without the doubled table, where its structure allows."""
        call = call_of(narrow_slice)
        if call is None or call.name != "aten::slice" or call.arguments["dim"] != narrow_slice.meta[VAL].ndim - 1:
            return None
        table, step = call.arguments["self"], call.arguments["step"]
        if call.arguments["start"] != 0 or table.meta[VAL].shape[-1] != 2 * narrow_slice.meta[VAL].shape[-1]:
            return None
        interleaved = step == 2
        return self._narrow_form(table, interleaved) if self._by_structure(table, interleaved) else None

    def _narrow_form(self, node: Any, interleaved: bool) -> Any:
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get(VAL), Tensor) or _same_in_all_columns(node):
            return node
        key = (node, interleaved)
        if key not in self._narrow:
            source = self._doubling(node, interleaved)
            self._narrow[key] = source if source is not None else self._rebuild(node, interleaved)
        return self._narrow[key]

    def _rebuild(self, node: fx.Node, interleaved: bool) -> fx.Node:
        inner = _columnwise_inputs(node)
        assert inner is not None
        replaced = {i: self._narrow_form(i, interleaved) for i in inner}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: replaced.get(n, n))
        return self._program.insert(node.target, *args, before=node.next, name=f"{node.name}_narrow", **kwargs)


def _same_in_all_columns(node: fx.Node) -> bool:
    value = node.meta[VAL]
    return value.ndim == 0 or (isinstance(value.shape[-1], int) and value.shape[-1] == 1)


def _columnwise_inputs(node: fx.Node) -> list[fx.Node] | None:
    """Inputs that carry the columns through an op working on each column alike; None for other ops."""
    call = call_of(node)
    if call is None:
        return None
    tensors = [i for i in node.all_input_nodes if isinstance(i.meta.get(VAL), Tensor) and not is_size(i)]
    last, arguments = node.meta[VAL].ndim - 1, call.arguments
    if call.name in _POINTWISE or cast_input(node) is not None:
        return tensors
    source = tensors[0] if tensors else None
    if source is None or source.meta[VAL].shape[-1:] != node.meta[VAL].shape[-1:]:
        return None
    last_in = source.meta[VAL].ndim - 1
    if call.name in _ROW_OPS:
        dim = arguments["dim"]
        return [source] if dim not in (last if call.name == "aten::unsqueeze" else last_in, -1) else None
    if call.name == "aten::expand":
        return [source]  # its last size was compared above
    if call.name == "aten::transpose":
        return [source] if last_in not in (arguments["dim0"], arguments["dim1"]) else None
    if call.name == "aten::permute":
        return [source] if arguments["dims"][-1] in (last_in, -1) else None
    if call.name == "aten::index":
        indices = list(arguments["indices"])
        return [arguments["self"]] if len(indices) <= last_in else None
    if call.name == "aten::embedding":
        return [arguments["weight"]]
    return None
