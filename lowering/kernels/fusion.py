"""A program as a sequence of kernels and template calls.

`stored.py` decides which values get memory and `epilogues.py` what templates compute on their results; here, in the
graph's order, each such value becomes a store, which joins an earlier kernel where `joining.py` finds that it fits
(producer–consumer, sibling and multi-output fusion).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy
import torch.fx as fx
from torch import Tensor

from irc.core.program import VAL, Program
from irc.core.provenance import location, module_path
from irc.core.target import op_name
from irc.lowering.kernels.alike import Names, NamesMeet
from irc.lowering.kernels.buffers import Buffer, row_major
from irc.lowering.kernels.definitions import Definer, convert, settle
from irc.lowering.kernels.epilogues import choose_epilogues, finished
from irc.lowering.kernels.indexing import ZERO, simplify
from irc.lowering.kernels.joining import MAX_STORES, OpenKernel, joined
from irc.lowering.kernels.kernel import Kernel, Origin
from irc.lowering.kernels.placement import in_memory, layout_of_readers, order_of_reads
from irc.lowering.kernels.schedule import AxisRange, Item, build_epilogue, build_kernel
from irc.lowering.kernels.sites import LAYOUTS, Matcher, Memory, Site, TemplateCall
from irc.lowering.kernels.stored import WRITES, Demand, is_tensor
from irc.lowering.kernels.values import Apply, Index, Literal, Value, loads

_LOOK_BACK = 6


@dataclass
class Schedule:
    """A program as a sequence of kernels and template calls.

    Attributes:
        steps: in the order in which they run.
        buffers: every buffer by name.
        outputs: for each output of the program: the buffer that holds it, or a size.
        in_place: output index → input index, where the output is written into the input's memory.
    """

    program: Program
    steps: list[Kernel | TemplateCall] = field(default_factory=list)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    outputs: list[Buffer | sympy.Expr] = field(default_factory=list)
    in_place: dict[int, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(str(step) if isinstance(step, Kernel) else _call_text(step) for step in self.steps)


def _call_text(call: TemplateCall) -> str:
    reads = ", ".join(memory.buffer.name for memory in call.reads)
    fused = "" if call.epilogue is None else " with epilogue"
    return f"template {call.name} {call.site.kind}({reads}) -> {call.write.name}{fused}  {call.site.problem}"


def make_schedule(program: Program, matchers: Sequence[Matcher] = ()) -> Schedule:
    """Kernels and template calls for a program whose constants are folded."""
    try:
        return _Scheduler(program, matchers, Names.of(program)).run()
    except NamesMeet:
        return _Scheduler(program, matchers, Names()).run()


class _Scheduler:
    def __init__(self, program: Program, matchers: Sequence[Matcher], names: Names) -> None:
        self.program = program
        self.definer = Definer(program, names)
        self.matchers = matchers
        self.schedule = Schedule(program)
        self.steps: list[OpenKernel | TemplateCall] = []
        self.arranged: dict[tuple[fx.Node, str], Memory] = {}  # copies in the layout that a template reads
        self._names: dict[str, int] = {}

    def run(self) -> Schedule:
        self._inputs_and_weights()
        demand = Demand(self.program, self.definer, self.matchers)
        self.sites, self.stored, self.pointers = demand.sites, demand.stored, demand.pointers
        self.readers = demand.readers
        self.absorbed = choose_epilogues(demand)
        for node in self.program.graph.nodes:
            if node in self.stored and node not in self.absorbed:
                self._store(node)
        self._outputs()
        for step in self.steps:
            made = step if isinstance(step, TemplateCall) else self._kernel(step)
            self.schedule.steps.append(made)
        return self.schedule

    # ------------------------------------------------------------ memory that is there from the start

    def _inputs_and_weights(self) -> None:
        for node in self.program.graph.nodes:
            if node.op in ("placeholder", "get_attr") and isinstance(node.meta.get(VAL), Tensor):
                shape = self.definer.shape(node)
                kind = "input" if node.op == "placeholder" else "weight"
                name = str(node.target) if kind == "weight" else node.name
                if kind == "weight" and name in self.schedule.buffers:
                    self.definer.give_buffer(node, self.schedule.buffers[name])
                    continue
                self._buffer(node, name, row_major(shape), kind)

    def _buffer(self, node: fx.Node, name: str, strides: Sequence[sympy.Expr], kind: str) -> Buffer:
        made = Buffer(name, self.definer.dtype(node), self.definer.shape(node), tuple(strides), kind, node.name)
        self.schedule.buffers[name] = made
        self.definer.give_buffer(node, made)
        return made

    # ------------------------------------------------------------ stores and template calls

    def _store(self, node: fx.Node) -> None:
        site = self.sites.get(node)
        if site is not None:
            self._template(site)
        elif op_name(node) in WRITES:
            self._cache_write(node)
        else:
            self._materialize(node)

    def _materialize(self, node: fx.Node, *, dense: bool = False) -> Buffer:
        """A store of a node's value; returns the buffer."""
        symbols, axes = self.definer.axes(node)
        value = self.definer.defined(node, symbols)
        order = None
        if not (dense or node in self.pointers or node in self.program.outputs):
            order = layout_of_readers(node, self.readers, self.sites) or order_of_reads(value, symbols)
        shape = self.definer.shape(node)
        kind = "output" if node in self.program.outputs else "temporary"
        buffer = self._buffer(node, node.name, row_major(shape, order), kind)
        offset = simplify(buffer.offset(symbols), self.definer.ranges)
        if order is not None:
            axes = tuple(axes[i] for i in order)
        self._add(Item(buffer, _real(axes), Index(offset), value, origins=self._origins(node)))
        return buffer

    def _cache_write(self, node: fx.Node) -> None:
        """A cache with new values: into the cache itself where nobody else reads it, else into a copy."""
        names = ("cache", "value", "positions" if op_name(node) == WRITES[0] else "slots")
        cache, value, where = (node.args[i] if len(node.args) > i else node.kwargs[names[i]] for i in range(3))
        assert isinstance(cache, fx.Node)
        assert isinstance(value, fx.Node)
        assert isinstance(where, fx.Node)
        target = self._cache_memory(node, cache)
        symbols, axes = self.definer.axes(value)
        paged = op_name(node) == WRITES[1]
        at = symbols[:1] if paged else (symbols[0], symbols[2])
        slot = convert(self.definer.value(where, at), "i64")
        index, when = self._cache_place(slot, symbols, target, paged)
        offset = simplify(target.offset(index), self.definer.ranges)
        item = Item(
            target, _real(axes if paged else (axes[0], axes[2], axes[1], axes[3])),
            Index(offset, self.definer.bindings(offset)), settle(self.definer.value(value, symbols), target.dtype),
            when=when, origins=self._origins(node),
        )  # fmt: skip
        self.definer.give_buffer(node, target)
        self._add(item)

    def _cache_place(
        self, slot: Value, symbols: tuple[sympy.Symbol, ...], target: Buffer, paged: bool
    ) -> tuple[tuple[sympy.Expr, ...], Value | None]:
        """(index into the cache, condition) of the element of the new values at `symbols`."""
        from torch.utils._sympy.functions import FloorDiv, Mod

        if not paged:
            position = self.definer.gathered(slot, target.shape[2])
            return (symbols[0], symbols[1], position, symbols[3]), None
        page = target.shape[1]
        flat = self.definer.gathered(slot, target.shape[0] * page)
        when = Apply("ge", (slot, Literal(0, "i64")), "bool")
        return (FloorDiv(flat, page), Mod(flat, page), symbols[1], symbols[2]), when

    def _cache_memory(self, node: fx.Node, cache: fx.Node) -> Buffer:
        outputs = self.program.outputs
        for output, source in self.program.aliases.items():
            owned = outputs[output] is node and self.program.placeholders[source] is cache
            if owned and set(cache.users) == {node}:
                self.schedule.in_place[output] = source
                return self.definer.buffers[cache]
        symbols, axes = self.definer.axes(node)
        value = self.definer.value(cache, symbols)
        kind = "output" if node in outputs else "temporary"
        buffer = self._buffer(node, node.name, row_major(self.definer.shape(node)), kind)
        offset = simplify(buffer.offset(symbols), self.definer.ranges)
        self._add(Item(buffer, _real(axes), Index(offset), value, origins=self._origins(node)))
        return buffer

    def _template(self, site: Site) -> None:
        reads = tuple(self._pointer(node, layout) for node, layout in site.reads)
        node, name = site.node, self._unique(f"{site.kind}_{site.node.name}")
        result = next((last for last, made in self.absorbed.items() if made is node), node)
        origins = self._origins(*dict.fromkeys((node, result)))
        kind = "output" if result in self.program.outputs else "temporary"
        shape = self.definer.shape(result)
        epilogue = None
        laid = row_major(shape, None if kind == "output" else site.order)  # who gets an output expects it row by row
        if site.finish is None:
            buffer = self._buffer(result, result.name, laid, kind)
        else:
            symbols, axes = self.definer.axes(result)
            value = finished(self.definer, site, result, symbols)
            buffer = self._buffer(result, result.name, laid, kind)
            offset = Index(simplify(buffer.offset(symbols), self.definer.ranges))
            axes = axes if site.order is None else tuple(axes[i] for i in site.order)
            item = Item(buffer, _real(axes), offset, settle(value, buffer.dtype), origins=origins)
            self._meet(item)
            columns = [axis for axis in axes[len(axes) - site.columns :] if axis in item.axes]
            epilogue = build_epilogue(f"{name}_epilogue", item, columns, self.definer.ranges)
        self.steps.append(TemplateCall(name, site, reads, buffer, epilogue, origins))

    def _pointer(self, node: fx.Node, layout: str) -> Memory:
        """Where a node's value lies; it gets memory of its own if it has none that fits."""
        symbols, _ = self.definer.axes(node)
        found = in_memory(self.definer, node, symbols, layout)
        if found is None and layout in LAYOUTS:
            return self._arranged(node, symbols, layout)
        if found is None:
            self._materialize(node, dense=True)
            found = in_memory(self.definer, node, symbols, layout)
        assert found is not None
        return found

    def _arranged(self, node: fx.Node, symbols: tuple[sympy.Symbol, ...], layout: str) -> Memory:
        """A copy of a value in a layout, for all templates that want it."""
        if (node, layout) not in self.arranged:
            shape, order = self.definer.shape(node), LAYOUTS[layout]
            name, dtype = self._unique(f"{node.name}.{layout}"), self.definer.dtype(node)
            buffer = Buffer(name, dtype, shape, row_major(shape, order), "temporary", node.name)
            self.schedule.buffers[name] = buffer
            _, axes = self.definer.axes(node)
            value = settle(self.definer.value(node, symbols), dtype)
            offset = Index(simplify(buffer.offset(symbols), self.definer.ranges))
            self._add(Item(buffer, _real(tuple(axes[i] for i in order)), offset, value, origins=self._origins(node)))
            self.arranged[node, layout] = Memory(buffer, shape, buffer.strides, ZERO)
        return self.arranged[node, layout]

    # ------------------------------------------------------------ kernels

    def _add(self, item: Item) -> None:
        """Put a store into an open kernel, or a new one."""
        self._meet(item)
        blockers: set[Buffer] = set()
        read = {load.buffer for load in loads(*item.values)}
        for step in reversed(self.steps[-_LOOK_BACK:]):
            if isinstance(step, TemplateCall):
                written, touched = {step.write}, {step.write, *(r.buffer for r in step.reads), *step.extra_reads}
            else:
                self._meet(*step.items, item)
                found = joined(step, item, self.definer.ranges) if len(step.items) < MAX_STORES else None
                if found is not None:
                    step.items.append(found[0])
                    step.outer = found[1]
                    step.writes.add(item.buffer)
                    return
                written = step.writes
                touched = written | {load.buffer for i in step.items for load in loads(*i.values)}
            blockers |= written
            if read & blockers or item.buffer in touched:
                break
        name = self._unique(item.origins[0].node if item.origins else item.buffer.name)
        self.steps.append(OpenKernel(len(self.steps), [item], list(item.outer_axes()), {item.buffer}, name))

    def _meet(self, *items: Item) -> None:
        self.definer.names.meet(origin.node for item in items for origin in item.origins)

    def _kernel(self, step: OpenKernel) -> Kernel:
        return build_kernel(step.name, step.items, step.outer, self.definer.ranges)

    def _origins(self, *nodes: fx.Node) -> tuple[Origin, ...]:
        """The nodes, with what was fused into them in front."""
        found: list[fx.Node] = []

        def visit(node: fx.Node, top: bool) -> None:
            if node.op != "call_function" or not is_tensor(node) or node in found:
                return
            if not top and (node in self.definer.buffers or node in self.stored):
                return
            for operand in node.all_input_nodes:
                visit(operand, False)
            found.append(node)

        for node in nodes:
            visit(node, True)
        return tuple(Origin(n.name, op_name(n), module_path(n), location(n)) for n in found)

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}_{count}" if count else name

    def _outputs(self) -> None:
        for output in self.program.outputs:
            if isinstance(output, fx.Node) and is_tensor(output):
                self.schedule.outputs.append(self.definer.buffers[output])
            else:
                value = output.meta[VAL] if isinstance(output, fx.Node) else output
                self.schedule.outputs.append(self.program.expr(value))


def _real(axes: tuple[AxisRange, ...]) -> tuple[AxisRange, ...]:
    """Axes of more than one element."""
    return tuple(axis for axis in axes if axis[1] != 1)
