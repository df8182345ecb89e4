"""Run many batches through a program side by side: every batch passes an operation before any reaches the next.

That is how layers are calibrated one after the other: when a layer is reached, the inputs of all batches are there,
computed by the layers before it *as they have become by then*. Only values that are still needed are kept, so memory
holds the widest point between two layers, for all batches, and not the whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor

from irc.core.operands import input_node
from irc.core.program import Program, is_size

Values = Callable[[fx.Node], Sequence[Any]]
Visitor = Callable[[fx.Node, Values], None]


_HALVES = (torch.bfloat16, torch.float16)


class Lockstep:
    """One side-by-side run.

    Args:
        program: what runs; its graph is not changed.
        batches: flat inputs of each batch.
    """

    def __init__(self, program: Program, batches: Sequence[Sequence[Any]]) -> None:
        self._program, self._batches = program, batches
        self._values: dict[fx.Node, list[Any]] = {}
        self._replaced: dict[fx.Node, Tensor] = {}

    def replace(self, weight: fx.Node, value: Tensor) -> None:
        """From now on `weight` (a node that is the same for all batches) has this value."""
        self._replaced[weight] = value
        if weight in self._values:
            self._values[weight] = [value] * len(self._batches)

    def run(self, visit: Visitor, at: Iterable[fx.Node]) -> None:
        """Call `visit(node, values)` before each of the given nodes runs; ends behind the last of them.

        `values(operand)` gives the operand's value in every batch; what does not depend on the inputs is the same
        object in all of them. The visitor may `replace` weights: the node itself then runs with the new ones.
        """
        wanted = set(at)
        order = list(self._program.graph.nodes)
        last = max((i for i, node in enumerate(order) if node in wanted), default=-1)
        order = self._needed(order[: last + 1], wanted)
        last_use = {used: node for node in order for used in node.all_input_nodes}
        placeholders = {node: i for i, node in enumerate(self._program.placeholders)}
        with torch.no_grad():
            for node in order:
                if node in wanted:
                    visit(node, self._values.__getitem__)
                if node is order[-1]:
                    break
                self._values[node] = self._evaluate(node, placeholders)
                for used in {*node.all_input_nodes, node}:
                    if last_use.get(used, node) is node and used in self._values:
                        del self._values[used]
                        self._replaced.pop(used, None)
        self._values.clear()

    def _needed(self, order: list[fx.Node], wanted: set[fx.Node]) -> list[fx.Node]:
        needed = set(wanted)
        for node in reversed(order):
            if node in needed:
                needed.update(node.all_input_nodes)
        return [node for node in order if node in needed]

    def _evaluate(self, node: fx.Node, placeholders: dict[fx.Node, int]) -> list[Any]:
        count = len(self._batches)
        if node in self._replaced:
            return [self._replaced[node]] * count
        if node.op == "placeholder":
            return [batch[placeholders[node]] for batch in self._batches]
        if node.op == "get_attr":
            return [self._program.weight(node)] * count
        inputs = node.all_input_nodes
        if _is_slow_linear(node, self._values):
            return self._linear(node)
        if inputs and not any(is_size(used) for used in inputs) and all(self._is_shared(used) for used in inputs):
            return [self._call(node, 0)] * count
        return [self._call(node, index) for index in range(count)]

    def _linear(self, node: fx.Node) -> list[Any]:
        """A linear layer in f32, rounded to its own type: the weight is widened once for all batches."""
        given, weight, *bias = (self._values[input_node(node, place)] for place in range(len(node.args)))
        wide = [operand[0].float() for operand in (weight, *bias)]
        return [F.linear(value.float(), *wide).to(value.dtype) for value in given]

    def _is_shared(self, node: fx.Node) -> bool:
        values = self._values[node]
        return all(value is values[0] for value in values) and node.op != "placeholder"

    def _call(self, node: fx.Node, index: int) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: self._values[used][index])
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _is_slow_linear(node: fx.Node, values: dict[fx.Node, list[Any]]) -> bool:
    """Whether PyTorch would multiply it one number at a time: half precision on a processor without instructions for
    it, where f32 takes an eighth of the time. Only the common form, whose weight is the same for all batches."""
    if (
        node.target is not torch.ops.aten.linear.default
        or node.kwargs
        or "512" in torch.backends.cpu.get_cpu_capability()
    ):
        return False
    if not all(isinstance(used, fx.Node) for used in node.args):
        return False
    constants = [values[input_node(node, place)] for place in range(1, len(node.args))]
    return all(
        operand[0].dtype in _HALVES and operand[0].device.type == "cpu" and all(v is operand[0] for v in operand)
        for operand in constants
    )
