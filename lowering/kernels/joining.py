"""Which stores share a kernel: those whose rows are the same rows, with nothing in between that is in the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.indexing import Ranges, equal
from irc.lowering.kernels.schedule import AxisRange, Item
from irc.lowering.kernels.values import Load, loads, reductions

MAX_STORES = 8


@dataclass
class OpenKernel:
    """A kernel that later stores may join.

    Attributes:
        items: its stores, in order.
        outer: axes that enclose all of them.
        writes: buffers that it writes.
    """

    position: int
    items: list[Item]
    outer: list[AxisRange]
    writes: set[Buffer]
    name: str


def joined(step: OpenKernel, item: Item, ranges: Ranges) -> tuple[Item, list[AxisRange]] | None:
    """(the item over the kernel's own axes, the kernel's new outer axes), or None where it does not fit."""
    first = step.items[0]
    prefix = 0
    for (_, a), (_, b) in zip(first.axes, item.axes, strict=False):
        if not equal(a, b):
            break
        prefix += 1
    reducing = [i for i in (*step.items, item) if reductions(*i.values)]
    if reducing:
        depth = max(len(i.reduced_over()) for i in reducing)
        if any(i.reduced_over() != {s for s, _ in i.axes[: len(i.reduced_over())]} for i in reducing):
            return None
    elif len(first.axes) == len(item.axes) == prefix:
        depth = prefix - 1 if prefix else 0
    else:
        depth = min(prefix, *(len(i.axes) - 1 for i in (*step.items, item)))
    if depth > prefix or (reducing and depth == 0):
        return None
    whole = len(first.axes) == len(item.axes) == prefix
    inner = [size for i in (*step.items, item) for _, size in i.axes[depth:]]
    if not whole and (depth < 1 or not all(size.is_Integer for size in inner)):
        return None
    shared = prefix if whole else depth
    mapping = {b: a for (a, _), (b, _) in zip(first.axes[:shared], item.axes[:shared], strict=True)}
    moved = item.renamed(mapping, ranges)
    outer = list(first.axes[:depth])
    if not all(_row_local(load, i, outer, whole and not reducing) for i in step.items
               for load in loads(*moved.values) if load.buffer is i.buffer):  # fmt: skip
        return None
    if any(load.buffer is item.buffer for i in step.items for load in loads(*i.values)) or item.buffer in step.writes:
        return None
    return moved, outer


def _row_local(load: Load, item: Item, outer: Sequence[AxisRange], same_element: bool) -> bool:
    """Whether a load of what the item stored stays in the row (or at the element) that is being computed."""
    if same_element:
        return equal(load.offset, item.offset.expr)
    rows = {s for s, _ in outer}
    base = item.offset.expr.xreplace({s: sympy.Integer(0) for s, _ in item.axes if s not in rows})
    rest = sympy.expand(load.offset - base)
    return not rest.free_symbols & rows and not load.bindings
