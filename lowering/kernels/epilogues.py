"""Epilogues: elementwise values that a template computes on its result while it is in the cache."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch.fx as fx

from irc.core.target import op_name
from irc.lowering.kernels.buffers import Buffer, row_major
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.indexing import equal, reshape_index, simplify
from irc.lowering.kernels.sites import Site
from irc.lowering.kernels.stored import WRITES, Demand
from irc.lowering.kernels.values import Apply, Load, Local, Value, loads, reductions, rewrite, walk

MAX_OPERATIONS = 24
"""An epilogue of more operations is a kernel of its own."""


def finished(definer: Definer, site: Site, result: fx.Node, symbols: tuple[sympy.Expr, ...]) -> Value:
    """What becomes of the template's `Local("acc")` at an index of the result."""
    assert site.finish is not None
    node, shape = site.node, definer.shape(site.node)
    acc = Local("acc", "f64" if definer.dtype(node) == "f64" else "f32")
    if result is node:
        return site.finish(definer, acc, symbols)
    memory = Buffer(f"{node.name}.acc", definer.dtype(node), shape, row_major(shape), "temporary", node.name)
    definer.give_buffer(node, memory)
    value = definer.defined(result, symbols)
    at = tuple(reshape_index(symbols, definer.shape(result), shape, definer.ranges))
    own = site.finish(definer, acc, at)
    return rewrite(value, lambda part: own if isinstance(part, Load) and part.buffer is memory else None)


def choose_epilogues(demand: Demand) -> dict[fx.Node, fx.Node]:
    """Value → the template that computes it: the elementwise value that alone reads its result, element for element."""
    absorbed: dict[fx.Node, fx.Node] = {}
    trial = _Trial.of(demand)
    for node, site in demand.sites.items():
        readers = demand.readers.get(node, [])
        if site.finish is None or len(readers) != 1 or node in demand.program.outputs:
            continue
        last = readers[0]
        while last not in demand.stored and len(demand.readers.get(last, [])) == 1:
            last = demand.readers[last][0]
        if last not in demand.stored or last in demand.sites or op_name(last) in WRITES or last in absorbed:
            continue
        if _fits(demand, trial, node, last):
            absorbed[last] = node
    return absorbed


@dataclass(frozen=True)
class _Trial:
    """A definer in which every stored value has memory, and when each of them is made."""

    definer: Definer
    order: dict[fx.Node, int]
    made_by: dict[str, fx.Node]
    ready: set[str]

    @staticmethod
    def of(demand: Demand) -> _Trial:
        trial = Definer(demand.program)
        trial.ranges = demand.definer.ranges
        trial.buffers = dict(demand.definer.buffers)
        ready = {buffer.name for buffer in trial.buffers.values() if buffer.kind in ("input", "weight")}
        for node in demand.stored:
            shape = trial.shape(node)
            trial.buffers[node] = Buffer(node.name, trial.dtype(node), shape, row_major(shape), "temporary")
        order = {node: i for i, node in enumerate(demand.program.graph.nodes)}
        return _Trial(trial, order, {node.name: node for node in demand.stored}, ready)


def _fits(demand: Demand, trial: _Trial, node: fx.Node, last: fx.Node) -> bool:
    definer = demand.definer
    shape, result = definer.shape(node), definer.shape(last)
    if not equal(sympy.prod(shape), sympy.prod(result)) or shape[-1] != result[-1]:
        return False
    site = demand.sites[node]
    if (site.columns > 1 or site.order is not None) and shape != result:
        return False
    symbols, _ = definer.axes(last)
    value = trial.definer.defined(last, symbols)
    if reductions(value) or sum(isinstance(p, Apply) for p in walk(value)) > MAX_OPERATIONS:
        return False
    # Equal numbers of elements, so the result's position is that of the store.
    flat = Buffer("", "f32", result, row_major(result), "temporary").offset(symbols)
    offset = simplify(flat, definer.ranges)
    own = [load for load in loads(value) if load.buffer is trial.definer.buffers[node]]
    for load in loads(value):
        made = trial.made_by.get(load.buffer.name)
        if load.buffer.name not in trial.ready and (made is None or trial.order[made] > trial.order[node]):
            return False  # not computed yet when the template runs
    return bool(own) and all(equal(load.offset, offset) for load in own)
