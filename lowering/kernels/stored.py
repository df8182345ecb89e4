"""Which values get memory.

1. From the outputs backwards: what is needed, and by whom. Views have no readers of their own: who reads a view
   reads what is under it.
2. A value gets memory when a template makes or reads it, when it is an output, when several read it and computing
   it again costs more than a load, when it walks many elements and its reader would do so again and again, or when
   one template leaves it in 8 bits for a sum with another one's result. Everything else is computed inside its reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.fx as fx
from torch import Tensor

from irc.core.program import VAL, Program
from irc.core.target import op_name
from irc.lowering.kernels import ops as _ops  # registers the definitions
from irc.lowering.kernels.buffers import Buffer, row_major
from irc.lowering.kernels.definitions import Definer, definition_of
from irc.lowering.kernels.sites import Matcher, Site, first_match
from irc.lowering.kernels.values import Apply, Load, Reduce, walk

MAX_OPERATIONS = 60
"""A value that is made of more graph nodes than this gets memory."""
WRITES = ("irc.cache_write", "irc.paged_cache_write")
_CHEAP = 3
# Elementwise operations that read an operand at several places, or only under a condition.
_NOT_HOLDING = ("irc.rope", "aten.cat", "aten.concat", "aten.stack", "aten.constant_pad_nd", "aten.pad")
_COSTLY = ("exp", "tanh", "erf", "log", "sigmoid", "sin", "cos", "pow", "sqrt", "rsqrt", "div")
assert _ops


@dataclass
class Demand:
    """Who needs which value, and which values get memory.

    Attributes:
        sites: node → the template that computes it.
        readers: node → the nodes that read it, through views.
        pointers: nodes that must be dense in memory.
        stored: nodes that get memory.
    """

    program: Program
    definer: Definer
    matchers: Sequence[Matcher]
    sites: dict[fx.Node, Site] = field(default_factory=dict)
    readers: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    pointers: set[fx.Node] = field(default_factory=set)
    stored: set[fx.Node] = field(default_factory=set)
    _sizes: dict[fx.Node, int] = field(default_factory=dict)  # operations that readers repeat
    _heavy: set[fx.Node] = field(default_factory=set)  # values without memory that walk many elements for one

    def __post_init__(self) -> None:
        self._demand()
        self._choose_stored()

    def _demand(self) -> None:
        needed = {n for n in self.program.outputs if isinstance(n, fx.Node)}
        self.pointers |= {n for n in needed if isinstance(n.meta.get(VAL), Tensor)}
        for node in reversed(self.program.graph.nodes):
            if node.op != "call_function" or node not in needed or not is_tensor(node):
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
                if is_view(node) and site is None and node not in self.pointers:
                    readers.extend(r for r in self.readers.get(node, []) if r not in readers)
                elif node not in readers:
                    readers.append(node)

    def _choose_stored(self) -> None:
        needed = self._needed()
        for node in self.program.graph.nodes:
            if node.op != "call_function" or node not in needed or not is_tensor(node):
                continue
            inlined = [operand for operand in node.all_input_nodes if operand in self._sizes]
            definition = definition_of(node)
            walks = definition is not None and definition.kind in ("reduction", "product")
            if walks or any(operand in self._heavy for operand in inlined):
                self._heavy.add(node)
            if self._wants_memory(node) or 1 + sum(self._sizes[o] for o in inlined) > MAX_OPERATIONS:
                self.stored.add(node)
                self._heavy.discard(node)
            else:
                self._sizes[node] = 1 + sum(self._sizes[o] for o in inlined)

    def _needed(self) -> set[fx.Node]:
        return set(self.readers) | {n for n in self.program.outputs if isinstance(n, fx.Node)}

    def _wants_memory(self, node: fx.Node) -> bool:
        if not isinstance(node.meta.get(VAL), Tensor):
            return False  # several results: each of them is a node of its own
        if node in self.sites or node in self.program.outputs or op_name(node) in WRITES:
            return True
        readers = self.readers.get(node, [])
        definition = definition_of(node)
        if definition is None or definition.kind == "view":
            return False  # a view that a template reads gets memory when it turns out not to be dense
        if node in self.pointers or any(node in _bases(r, self.sites) for r in readers if r in self.sites):
            return True
        if self._joins_templates(node):
            return True
        if node in self._heavy:
            return len(readers) > 1 or any(not self._may_hold_reduction(r) for r in readers)
        return len(readers) > 1 and not self._cheap(node)

    def _joins_templates(self, node: fx.Node) -> bool:
        """A template's result that is quantized, and dequantized beside another template's result.

        Both could be done where it is read; but so its own epilogue writes small numbers.
        """
        if op_name(node) != "irc.quantize" or not self._made_by_template(node.all_input_nodes[0]):
            return False
        return any(
            self._made_by_template(operand)
            for restored in self.readers.get(node, [])
            if op_name(restored) == "irc.dequantize"
            for reader in self.readers.get(restored, [])
            if self._may_hold_reduction(reader)
            for operand in reader.all_input_nodes
            if operand is not restored
        )

    def _made_by_template(self, node: fx.Node) -> bool:
        """Elementwise from the result of a template."""
        if node in self.sites:
            return True
        definition = definition_of(node)
        pointwise = definition is not None and definition.kind == "pointwise" and node not in self.stored
        return pointwise and any(self._made_by_template(operand) for operand in node.all_input_nodes)

    def _may_hold_reduction(self, reader: fx.Node) -> bool:
        definition = definition_of(reader)
        return definition is not None and definition.kind == "pointwise" and op_name(reader) not in _NOT_HOLDING

    def _cheap(self, node: fx.Node) -> bool:
        """Computing it again costs about as much as a load."""
        probe = Definer(self.program)
        waiting = list(node.all_input_nodes)
        while waiting:
            used = waiting.pop()
            if not is_tensor(used):
                continue
            if used.op == "call_function" and used not in self.stored:
                waiting += used.all_input_nodes  # computed again with it
            else:
                probe.give_buffer(used, Buffer(used.name, probe.dtype(used), probe.shape(used),
                                               row_major(probe.shape(used)), "temporary"))  # fmt: skip
        parts = list(walk(probe.value(node, self.definer.axes(node, ".probe")[0])))
        work = [p for p in parts if isinstance(p, Apply)]
        return (
            len(work) <= _CHEAP
            and sum(isinstance(p, Load) for p in parts) <= 1
            and not any(isinstance(p, Reduce) or (isinstance(p, Apply) and p.op in _COSTLY) for p in parts)
        )


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get(VAL), (Tensor, tuple, list))


def is_view(node: fx.Node) -> bool:
    definition = definition_of(node)
    return definition is not None and definition.kind == "view"


def _bases(node: fx.Node, sites: dict[fx.Node, Site]) -> set[fx.Node]:
    """What a template reads as memory, and what is under it through views."""
    found: set[fx.Node] = set()
    for read, _ in sites[node].reads:
        found.add(read)
        while is_view(read) and len(read.all_input_nodes) >= 1:
            read = read.all_input_nodes[0]
            found.add(read)
    return found
