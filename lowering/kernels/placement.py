"""Whether a value lies in memory as a template wants to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch.fx as fx

from irc.lowering.kernels.buffers import row_major
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.indexing import ZERO, equal, remembered
from irc.lowering.kernels.sites import LAYOUTS, Memory, Site
from irc.lowering.kernels.values import Load, Value, loads


def in_memory(definer: Definer, node: fx.Node, symbols: tuple[sympy.Expr, ...], layout: str) -> Memory | None:
    """Where a node's value lies if it is in memory with a layout (see `Site.reads`), else None."""
    value = definer.value(node, symbols)
    if not isinstance(value, Load) or value.bindings or value.buffer.dtype != definer.dtype(node):
        return None
    linear = _linear(value.offset, symbols)
    if linear is None:
        return None
    start, strides = linear
    shape = definer.shape(node)
    dense = row_major(shape, LAYOUTS.get(layout))
    if layout == "rows" or layout in LAYOUTS:
        fits = all(size == 1 or equal(a, b) for size, a, b in zip(shape, strides, dense, strict=True))
    else:
        fits = shape[-1] == 1 or strides[-1] == 1
    return Memory(value.buffer, shape, strides, start) if fits else None


@remembered
def _linear(
    offset: sympy.Expr, symbols: tuple[sympy.Expr, ...]
) -> tuple[sympy.Expr, tuple[sympy.Expr, ...]] | None:  # fmt: skip
    """(start, strides) with offset = start + Σ symbol · stride, or None where it is nothing of the kind."""
    free = [s for s in symbols if s != 0]
    start = offset.xreplace(dict.fromkeys(free, ZERO))
    strides = tuple(
        sympy.expand(offset.xreplace({s: sympy.Integer(int(s is one)) for s in free}) - start) for one in symbols
    )
    linear = start + sympy.Add(*(a * b for a, b in zip(symbols, strides, strict=True)))
    return (start, strides) if equal(linear, offset) else None


def order_of_reads(value: Value, symbols: tuple[sympy.Symbol, ...]) -> tuple[int, ...] | None:
    """Axes from slowest to fastest as the largest operand has them in memory; None for their own order."""
    free = {s for s in symbols if s != 0}
    candidates = [load for load in loads(value) if free <= load.symbols and not load.bindings]
    if not candidates:
        return None
    load = candidates[0]
    steps = []
    for symbol in symbols:
        if symbol == 0:
            steps.append(0.0)
            continue
        try:
            steps.append(float(_moved(load.offset, symbol)))
        except TypeError:
            return None
    order = sorted(range(len(symbols)), key=lambda i: -steps[i])
    return None if order == list(range(len(symbols))) else tuple(order)


@remembered
def _moved(offset: sympy.Expr, symbol: sympy.Symbol) -> sympy.Expr:
    """How far an offset moves when the symbol does by eight, with sizes of eight."""
    probe = offset.xreplace({symbol: symbol + 8}) - offset
    return sympy.expand(probe).xreplace({s: sympy.Integer(8) for s in probe.free_symbols})


def layout_of_readers(
    node: fx.Node, readers: Mapping[fx.Node, Sequence[fx.Node]], sites: Mapping[fx.Node, Site]
) -> tuple[int, ...] | None:
    """Axes from slowest to fastest as a template asks for them that reads the node; None: none does."""
    for reader in readers.get(node, ()):
        for read, layout in sites[reader].reads if reader in sites else ():
            if read is node and layout in LAYOUTS:
                return LAYOUTS[layout]
    return None
