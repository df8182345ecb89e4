"""`torch.compile(model, backend="irc")`: each graph that Dynamo finds is captured, canonicalized and run.

Weights stay inputs of the program, so that training steps between calls are seen and gradients flow. A
graph is captured at its first call, with real tensors and outside Dynamo's own tracing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import CaptureError
from irc.core.evaluate import evaluate
from irc.core.program import Program
from irc.frontend.arranged import Arranged
from irc.frontend.capture import from_arranged


def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A function that runs the graph; what `torch.compile` calls for each graph and set of guards."""
    return CompiledGraph(graph_module)


class CompiledGraph:
    """One Dynamo graph, with a program for each set of sizes that needs its own.

    Attributes:
        programs: captured so far; mostly one, its dynamic sizes being those of Dynamo.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._module, self._sizes = _sizes_from_tensors(graph_module)
        self._symbols = [_symbols(node) for node in self._module.graph.find_nodes(op="placeholder")]
        self.programs: list[tuple[dict[int, Any], Program]] = []

    def __call__(self, *inputs: Any) -> Any:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        fixed = {i: v for i, v in enumerate(inputs) if not isinstance(v, Tensor) and i not in self._sizes}
        for known, program in self.programs:
            if known == fixed and _fits(program, tensors):
                break
        else:
            program = self._capture(inputs)
            self.programs.append((fixed, program))
        return program.unflatten(evaluate(program.graph, program.weight, tensors))

    def _capture(self, inputs: Sequence[Any]) -> Program:
        names = {
            (index, dim): name
            for index, symbols in enumerate(self._symbols)
            for dim, name in symbols.items()
            if isinstance(inputs[index], Tensor)
        }
        arranged = Arranged(
            self._module,
            # Export must not see a view: its base would become part of the guards.
            tuple(v.detach().clone() if isinstance(v, Tensor) and v._is_view() else v for v in inputs),
            {},
            names,
            metadata={"frontend": "torch.compile"},
        )
        arranged.enlarge()
        program = from_arranged(arranged, self._module, "graph", canonicalize=True)
        program.example_inputs = None  # they would keep the caller's tensors alive
        return program


def _sizes_from_tensors(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, set[int]]:
    """The graph with size inputs read off the tensors that have those sizes, and the indices of those inputs."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    copied = fx.GraphModule(graph_module, graph)
    placeholders = graph.find_nodes(op="placeholder")
    owners: dict[str, tuple[fx.Node, int]] = {}
    for node in placeholders:
        for dim, name in _symbols(node).items():
            owners.setdefault(name, (node, dim))
    found: set[int] = set()
    for index, node in enumerate(placeholders):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and str(value.node.expr) in owners:
            with graph.inserting_after(placeholders[-1]):
                size = graph.call_function(torch.ops.aten.sym_size.int, owners[str(value.node.expr)])
            node.replace_all_uses_with(size)
            found.add(index)
    copied.recompile()
    return copied, found


def _symbols(node: fx.Node) -> dict[int, str]:
    """Names of the dimensions that Dynamo made symbolic."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        return {}
    sizes: Iterable[int | torch.SymInt] = value.shape
    return {
        dim: str(size.node.expr)
        for dim, size in enumerate(sizes)
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol
    }


def _fits(program: Program, tensors: Sequence[Tensor]) -> bool:
    """True if the sizes that the program fixed are those of the inputs."""
    if len(tensors) != len(program.placeholders):
        raise CaptureError(f"graph takes {len(program.placeholders)} tensors, got {len(tensors)}")
    sizes: dict[str, int] = {}
    for node, tensor in zip(program.placeholders, tensors, strict=True):
        for expr, size in zip(program.shape_expr(node), tensor.shape, strict=True):
            if expr.is_Symbol:
                if sizes.setdefault(str(expr), size) != size:
                    return False
            elif not expr.free_symbols and int(expr) != size:
                return False
    return True


__all__ = ["CompiledGraph", "backend"]
