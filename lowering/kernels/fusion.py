"""Which values get memory, and which stores share a kernel.

1. From the outputs backwards: what is needed, and by whom. Views have no readers of their own: who reads a view
   reads what is under it.
2. A value gets memory when a template makes or reads it, when it is an output, when several read it and computing
   it again costs more than a load, or when it walks many elements and its reader would do so again and again.
   Everything else is computed inside its reader.
3. In the graph's order, each such value becomes a store. It joins an earlier kernel where its rows are that
   kernel's rows and nothing in between is in the way (producer–consumer, sibling and multi-output fusion).
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
from irc.lowering.kernels import ops as _ops  # registers the definitions
from irc.lowering.kernels.buffers import Buffer, row_major
from irc.lowering.kernels.definitions import Definer, convert, definition_of, settle
from irc.lowering.kernels.indexing import ZERO, index_symbol, reshape_index, simplify
from irc.lowering.kernels.kernel import Kernel, Origin
from irc.lowering.kernels.schedule import AxisRange, Item, build_epilogue, build_kernel
from irc.lowering.kernels.sites import LAYOUTS, Matcher, Memory, Site, TemplateCall, first_match
from irc.lowering.kernels.values import (
    Apply,
    Index,
    Literal,
    Load,
    Local,
    Reduce,
    Value,
    loads,
    reductions,
    rewrite,
    walk,
)

MAX_STORES = 8
MAX_OPERATIONS = 60
"""A value that is made of more graph nodes than this gets memory."""
_CHEAP = 3
_LOOK_BACK = 6
_WRITES = ("irc.cache_write", "irc.paged_cache_write")
assert _ops


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
    return _Scheduler(program, matchers).run()


@dataclass
class _Open:
    """A kernel that later stores may join."""

    position: int
    items: list[Item]
    outer: list[AxisRange]
    writes: set[Buffer]
    name: str


class _Scheduler:
    def __init__(self, program: Program, matchers: Sequence[Matcher]) -> None:
        self.program = program
        self.definer = Definer(program)
        self.matchers = matchers
        self.schedule = Schedule(program)
        self.sites: dict[fx.Node, Site] = {}
        self.readers: dict[fx.Node, list[fx.Node]] = {}
        self.pointers: set[fx.Node] = set()
        self.stored: set[fx.Node] = set()
        self.steps: list[_Open | TemplateCall] = []
        self.absorbed: dict[fx.Node, fx.Node] = {}
        self.arranged: dict[tuple[fx.Node, str], Memory] = {}  # copies in the layout that a template reads
        self.sizes: dict[fx.Node, int] = {}  # operations that a value without memory repeats in its readers
        self.heavy: set[fx.Node] = set()  # values without memory that walk many elements for one
        self._names: dict[str, int] = {}

    def run(self) -> Schedule:
        self._inputs_and_weights()
        self._demand()
        self._choose_stored()
        self._choose_epilogues()
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
        made = Buffer(name, self.definer.dtype(node), self.definer.shape(node), tuple(strides), kind, node.name)  # type: ignore[arg-type]
        self.schedule.buffers[name] = made
        self.definer.give_buffer(node, made)
        return made

    # ------------------------------------------------------------ 1. what is needed, by whom

    def _demand(self) -> None:
        needed = {n for n in self.program.outputs if isinstance(n, fx.Node)}
        self.pointers |= {n for n in needed if isinstance(n.meta.get(VAL), Tensor)}
        for node in reversed(self.program.graph.nodes):
            if node.op != "call_function" or node not in needed or not _is_tensor(node):
                continue
            site = first_match(self.matchers, self.definer, node)
            if site is not None:
                self.sites[node] = site
                used = [read for read, _ in site.reads]
                self.pointers |= {read for read, layout in site.reads if layout == "rows"}
            else:
                used = node.all_input_nodes
            for operand in used:
                needed.add(operand)
                readers = self.readers.setdefault(operand, [])
                if _is_view(node) and site is None and node not in self.pointers:
                    readers.extend(r for r in self.readers.get(node, []) if r not in readers)
                elif node not in readers:
                    readers.append(node)

    # ------------------------------------------------------------ 2. which values get memory

    def _choose_stored(self) -> None:
        needed = self._needed()
        for node in self.program.graph.nodes:
            if node.op != "call_function" or node not in needed or not _is_tensor(node):
                continue
            inlined = [operand for operand in node.all_input_nodes if operand in self.sizes]
            definition = definition_of(node)
            walks = definition is not None and definition.kind in ("reduction", "product")
            if walks or any(operand in self.heavy for operand in inlined):
                self.heavy.add(node)
            if self._wants_memory(node) or 1 + sum(self.sizes[o] for o in inlined) > MAX_OPERATIONS:
                self.stored.add(node)
                self.heavy.discard(node)
            else:
                self.sizes[node] = 1 + sum(self.sizes[o] for o in inlined)

    def _needed(self) -> set[fx.Node]:
        return set(self.readers) | {n for n in self.program.outputs if isinstance(n, fx.Node)}

    def _wants_memory(self, node: fx.Node) -> bool:
        if not isinstance(node.meta.get(VAL), Tensor):
            return False  # several results: each of them is a node of its own
        if node in self.sites or node in self.program.outputs or op_name(node) in _WRITES:
            return True
        readers = self.readers.get(node, [])
        definition = definition_of(node)
        if definition is None or definition.kind == "view":
            return False  # a view that a template reads gets memory when it turns out not to be dense
        if node in self.pointers or any(node in _bases(r, self.sites) for r in readers if r in self.sites):
            return True
        if node in self.heavy:
            return len(readers) > 1 or any(not self._may_hold_reduction(r) for r in readers)
        return len(readers) > 1 and not self._cheap(node)

    def _may_hold_reduction(self, reader: fx.Node) -> bool:
        definition = definition_of(reader)
        return definition is not None and definition.kind == "pointwise" and op_name(reader) not in _NOT_HOLDING

    def _cheap(self, node: fx.Node) -> bool:
        """Computing it again costs about as much as a load."""
        probe = Definer(self.program)
        for used in node.all_input_nodes:
            if isinstance(used.meta.get(VAL), Tensor):
                probe.give_buffer(used, Buffer(used.name, probe.dtype(used), probe.shape(used),
                                               row_major(probe.shape(used)), "temporary"))  # fmt: skip
        parts = list(walk(probe.value(node, self._axes(node, ".probe")[0])))
        work = [p for p in parts if isinstance(p, Apply)]
        return (
            len(work) <= _CHEAP
            and sum(isinstance(p, Load) for p in parts) <= 1
            and not any(isinstance(p, Reduce) or (isinstance(p, Apply) and p.op in _COSTLY) for p in parts)
        )

    def _axes(self, node: fx.Node, tag: str = "") -> tuple[tuple[sympy.Symbol, ...], tuple[AxisRange, ...]]:
        shape = self.definer.shape(node)
        # An axis of one element has no index.
        symbols = tuple(ZERO if size == 1 else index_symbol(f"{node.name}{tag}.{i}") for i, size in enumerate(shape))
        self.definer.ranges.update((s, size) for s, size in zip(symbols, shape, strict=True) if s != 0)
        return symbols, tuple(zip(symbols, shape, strict=True))

    # ------------------------------------------------------------ 3. stores and template calls

    def _store(self, node: fx.Node) -> None:
        site = self.sites.get(node)
        if site is not None:
            self._template(site)
        elif op_name(node) in _WRITES:
            self._cache_write(node)
        else:
            self._materialize(node)

    def _materialize(self, node: fx.Node, *, dense: bool = False) -> Buffer:
        """A store of a node's value; returns the buffer."""
        symbols, axes = self._axes(node)
        value = self.definer.defined(node, symbols)
        order = None
        if not (dense or node in self.pointers or node in self.program.outputs):
            order = self._order_for_readers(node) or _order_of_reads(value, symbols)
        shape = self.definer.shape(node)
        kind = "output" if node in self.program.outputs else "temporary"
        buffer = self._buffer(node, node.name, row_major(shape, order), kind)
        offset = simplify(buffer.offset(symbols), self.definer.ranges)
        if order is not None:
            axes = tuple(axes[i] for i in order)
        self._add(Item(buffer, _real(axes), Index(offset), value, origins=self._origins(node)))
        return buffer

    def _order_for_readers(self, node: fx.Node) -> tuple[int, ...] | None:
        """The layout that a template asks for that reads this node."""
        for reader in self.readers.get(node, []):
            for read, layout in self.sites[reader].reads if reader in self.sites else ():
                if read is node and layout in LAYOUTS:
                    return LAYOUTS[layout]
        return None

    def _cache_write(self, node: fx.Node) -> None:
        """A cache with new values: into the cache itself where nobody else reads it, else into a copy."""
        names = ("cache", "value", "positions" if op_name(node) == _WRITES[0] else "slots")
        cache, value, where = (node.args[i] if len(node.args) > i else node.kwargs[names[i]] for i in range(3))
        assert isinstance(cache, fx.Node)
        assert isinstance(value, fx.Node)
        assert isinstance(where, fx.Node)
        target = self._cache_memory(node, cache)
        symbols, axes = self._axes(value)
        paged = op_name(node) == _WRITES[1]
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
        symbols, axes = self._axes(node)
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
        if site.finish is None:
            buffer = self._buffer(result, result.name, row_major(shape, site.order), kind)
        else:
            symbols, axes = self._axes(result)
            value = self._finished(site, result, symbols)
            buffer = self._buffer(result, result.name, row_major(shape, None if kind == "output" else site.order), kind)
            offset = Index(simplify(buffer.offset(symbols), self.definer.ranges))
            axes = axes if site.order is None else tuple(axes[i] for i in site.order)
            item = Item(buffer, _real(axes), offset, settle(value, buffer.dtype), origins=origins)
            columns = [axis for axis in axes[len(axes) - site.columns :] if axis in item.axes]
            epilogue = build_epilogue(f"{name}_epilogue", item, columns, self.definer.ranges)
        self.steps.append(TemplateCall(name, site, reads, buffer, epilogue, origins))

    def _finished(self, site: Site, result: fx.Node, symbols: tuple[sympy.Expr, ...]) -> Value:
        """What becomes of the template's `Local("acc")` at an index of the result."""
        assert site.finish is not None
        node, shape = site.node, self.definer.shape(site.node)
        acc = Local("acc", "f64" if self.definer.dtype(node) == "f64" else "f32")
        if result is node:
            return site.finish(self.definer, acc, symbols)
        memory = Buffer(f"{node.name}.acc", self.definer.dtype(node), shape, row_major(shape), "temporary", node.name)
        self.definer.give_buffer(node, memory)
        value = self.definer.defined(result, symbols)
        at = tuple(reshape_index(symbols, self.definer.shape(result), shape, self.definer.ranges))
        finished = site.finish(self.definer, acc, at)
        return rewrite(value, lambda part: finished if isinstance(part, Load) and part.buffer is memory else None)

    def _choose_epilogues(self) -> None:
        """Let a template compute the elementwise value that alone reads its result, element for element."""
        for node, site in self.sites.items():
            readers = self.readers.get(node, [])
            if site.finish is None or len(readers) != 1 or node in self.program.outputs:
                continue
            last = readers[0]
            while last not in self.stored and len(self.readers.get(last, [])) == 1:
                last = self.readers[last][0]
            if last not in self.stored or last in self.sites or op_name(last) in _WRITES or last in self.absorbed:
                continue
            if self._fits_epilogue(node, last):
                self.absorbed[last] = node

    def _fits_epilogue(self, node: fx.Node, last: fx.Node) -> bool:
        shape, result = self.definer.shape(node), self.definer.shape(last)
        if sympy.expand(sympy.prod(shape) - sympy.prod(result)) != 0 or shape[-1] != result[-1]:
            return False
        site = self.sites[node]
        if (site.columns > 1 or site.order is not None) and shape != result:
            return False
        trial = Definer(self.program)
        trial.buffers, trial.ranges = dict(self.definer.buffers), self.definer.ranges
        for stored in self.stored - {last}:
            trial.give_buffer(stored, Buffer(stored.name, trial.dtype(stored), trial.shape(stored),
                                             row_major(trial.shape(stored)), "temporary"))  # fmt: skip
        symbols, _ = self._axes(last)
        value = trial.defined(last, symbols)
        if reductions(value) or sum(isinstance(p, Apply) for p in walk(value)) > 24:
            return False
        # Equal numbers of elements, so the result's position is that of the store.
        flat = Buffer("", "f32", result, row_major(result), "temporary").offset(symbols)
        offset = simplify(flat, trial.ranges)
        own = [load for load in loads(value) if load.buffer is trial.buffers[node]]
        ready = {b.name for b in trial.buffers.values() if b.kind in ("input", "weight")}
        order = {n: i for i, n in enumerate(self.program.graph.nodes)}
        for load in loads(value):
            made = next((n for n in self.stored if n.name == load.buffer.name), None)
            if load.buffer.name not in ready and (made is None or order[made] > order[node]):
                return False  # not computed yet when the template runs
        return bool(own) and all(sympy.expand(load.offset - offset) == 0 for load in own)

    def _pointer(self, node: fx.Node, layout: str) -> Memory:
        """Where a node's value lies; it gets memory of its own if it has none that fits."""
        symbols, _ = self._axes(node)
        found = self._in_memory(node, symbols, layout)
        if found is None and layout in LAYOUTS:
            return self._arranged(node, symbols, layout)
        if found is None:
            self._materialize(node, dense=True)
            found = self._in_memory(node, symbols, layout)
        assert found is not None
        return found

    def _arranged(self, node: fx.Node, symbols: tuple[sympy.Symbol, ...], layout: str) -> Memory:
        """A copy of a value in a layout, for all templates that want it."""
        if (node, layout) not in self.arranged:
            shape, order = self.definer.shape(node), LAYOUTS[layout]
            name, dtype = self._unique(f"{node.name}.{layout}"), self.definer.dtype(node)
            buffer = Buffer(name, dtype, shape, row_major(shape, order), "temporary", node.name)
            self.schedule.buffers[name] = buffer
            _, axes = self._axes(node)
            value = settle(self.definer.value(node, symbols), dtype)
            offset = Index(simplify(buffer.offset(symbols), self.definer.ranges))
            self._add(Item(buffer, _real(tuple(axes[i] for i in order)), offset, value, origins=self._origins(node)))
            self.arranged[node, layout] = Memory(buffer, shape, buffer.strides, ZERO)
        return self.arranged[node, layout]

    def _in_memory(self, node: fx.Node, symbols: tuple[sympy.Symbol, ...], layout: str) -> Memory | None:
        value = self.definer.value(node, symbols)
        if not isinstance(value, Load) or value.bindings or value.buffer.dtype != self.definer.dtype(node):
            return None
        free = [s for s in symbols if s != 0]
        start = value.offset.xreplace(dict.fromkeys(free, ZERO))
        strides = tuple(
            sympy.expand(value.offset.xreplace({s: sympy.Integer(int(s is one)) for s in free}) - start)
            for one in symbols
        )
        linear = start + sympy.Add(*(a * b for a, b in zip(symbols, strides, strict=True)))
        if sympy.expand(linear - value.offset) != 0:
            return None
        shape = self.definer.shape(node)
        dense = row_major(shape, LAYOUTS.get(layout))
        if layout == "rows" or layout in LAYOUTS:
            fits = all(size == 1 or sympy.expand(a - b) == 0 for size, a, b in zip(shape, strides, dense, strict=True))
        else:
            fits = shape[-1] == 1 or strides[-1] == 1
        return Memory(value.buffer, shape, strides, start) if fits else None

    # ------------------------------------------------------------ kernels

    def _add(self, item: Item) -> None:
        """Put a store into an open kernel, or a new one."""
        blockers: set[Buffer] = set()
        read = {load.buffer for load in loads(*item.values)}
        for step in reversed(self.steps[-_LOOK_BACK:]):
            if isinstance(step, TemplateCall):
                written, touched = {step.write}, {step.write, *(r.buffer for r in step.reads), *step.extra_reads}
            else:
                joined = self._joined(step, item) if len(step.items) < MAX_STORES else None
                if joined is not None:
                    step.items.append(joined[0])
                    step.outer = joined[1]
                    step.writes.add(item.buffer)
                    return
                written = step.writes
                touched = written | {load.buffer for i in step.items for load in loads(*i.values)}
            blockers |= written
            if read & blockers or item.buffer in touched:
                break
        name = self._unique(item.origins[0].node if item.origins else item.buffer.name)
        self.steps.append(_Open(len(self.steps), [item], list(item.outer_axes()), {item.buffer}, name))

    def _joined(self, step: _Open, item: Item) -> tuple[Item, list[AxisRange]] | None:
        """(the item over the kernel's own axes, the kernel's new outer axes), or None where it does not fit."""
        first = step.items[0]
        prefix = 0
        for (_, a), (_, b) in zip(first.axes, item.axes, strict=False):
            if sympy.expand(a - b) != 0:
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
        moved = item.renamed(mapping, self.definer.ranges)
        outer = list(first.axes[:depth])
        if not all(_row_local(load, i, outer, whole and not reducing) for i in step.items
                   for load in loads(*moved.values) if load.buffer is i.buffer):  # fmt: skip
            return None
        if (
            any(load.buffer is item.buffer for i in step.items for load in loads(*i.values))
            or item.buffer in step.writes
        ):
            return None
        return moved, outer

    def _kernel(self, step: _Open) -> Kernel:
        return build_kernel(step.name, step.items, step.outer, self.definer.ranges)

    def _origins(self, *nodes: fx.Node) -> tuple[Origin, ...]:
        """The nodes, with what was fused into them in front."""
        found: list[fx.Node] = []

        def visit(node: fx.Node, top: bool) -> None:
            if node.op != "call_function" or not _is_tensor(node) or node in found:
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
            if isinstance(output, fx.Node) and _is_tensor(output):
                self.schedule.outputs.append(self.definer.buffers[output])
            else:
                value = output.meta[VAL] if isinstance(output, fx.Node) else output
                self.schedule.outputs.append(self.program.expr(value))


# Elementwise operations that read an operand at several places, or only under a condition.
_NOT_HOLDING = ("irc.rope", "aten.cat", "aten.concat", "aten.stack", "aten.constant_pad_nd", "aten.pad")
_COSTLY = ("exp", "tanh", "erf", "log", "sigmoid", "sin", "cos", "pow", "sqrt", "rsqrt", "div")


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get(VAL), (Tensor, tuple, list))


def _is_view(node: fx.Node) -> bool:
    definition = definition_of(node)
    return definition is not None and definition.kind == "view"


def _bases(node: fx.Node, sites: dict[fx.Node, Site]) -> set[fx.Node]:
    """What a template reads as memory, and what is under it through views."""
    found: set[fx.Node] = set()
    for read, _ in sites[node].reads:
        found.add(read)
        while _is_view(read) and len(read.all_input_nodes) >= 1:
            read = read.all_input_nodes[0]
            found.add(read)
    return found


def _real(axes: tuple[AxisRange, ...]) -> tuple[AxisRange, ...]:
    """Axes of more than one element."""
    return tuple(axis for axis in axes if axis[1] != 1)


def _order_of_reads(value: Value, symbols: tuple[sympy.Symbol, ...]) -> tuple[int, ...] | None:
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
        probe = load.offset.xreplace({symbol: symbol + 8}) - load.offset
        at = sympy.expand(probe).xreplace({s: sympy.Integer(8) for s in probe.free_symbols})
        try:
            steps.append(float(at))
        except TypeError:
            return None
    order = sorted(range(len(symbols)), key=lambda i: -steps[i])
    return None if order == list(range(len(symbols))) else tuple(order)


def _row_local(load: Load, item: Item, outer: Sequence[AxisRange], same_element: bool) -> bool:
    """Whether a load of what the item stored stays in the row (or at the element) that is being computed."""
    if same_element:
        return sympy.expand(load.offset - item.offset.expr) == 0
    rows = {s for s, _ in outer}
    base = item.offset.expr.xreplace({s: sympy.Integer(0) for s, _ in item.axes if s not in rows})
    rest = sympy.expand(load.offset - base)
    return not rest.free_symbols & rows and not load.bindings
