"""Replacement functions: ordinary PyTorch code that inserts nodes into a program as it runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import PassError
from irc.core.program import VAL, Program
from irc.core.rewrite.tracing import Traced, parameters, unwrap_result


class _NodeRecorder:
    """Inserts every recorded call in front of one node, typed; sizes and types of values are known."""

    def __init__(self, program: Program, before: fx.Node) -> None:
        self._program, self._before = program, before
        self.created: list[fx.Node] = []

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        namespace, _, operation = name.partition("::")
        overload, args = _resolve(name, args, kwargs)
        target = getattr(getattr(getattr(torch.ops, namespace), operation), overload)
        node = self._program.insert(
            target, *self._sizes_as_nodes(args), before=self._before, name=operation, **self._sizes_as_nodes(kwargs)
        )
        self.created.append(node)
        return node

    def attribute(self, value: Any, name: str) -> Any:
        found = getattr(value.meta[VAL], name)
        return tuple(found) if name == "shape" else found

    def item(self, value: Any, index: int) -> fx.Node:
        node = self._program.insert(operator.getitem, value, index, before=self._before)
        self.created.append(node)
        return node

    def num_items(self, value: Any) -> int | None:
        found = value.meta[VAL]
        return None if isinstance(found, Tensor) else len(found)

    def _sizes_as_nodes(self, value: Any) -> Any:
        """Symbolic sizes that the function computed with become nodes that compute them."""
        if isinstance(value, torch.SymInt):
            from irc.core.sizes import size_node

            return size_node(self._program, value, before=self._before)
        if isinstance(value, (list, tuple)):
            return type(value)(self._sizes_as_nodes(item) for item in value)
        if isinstance(value, dict):
            return {key: self._sizes_as_nodes(item) for key, item in value.items()}
        return value


def _resolve(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
    """The overload that takes these arguments, and the arguments as it takes them."""
    # Python's torch.roll(x, 1, -1) means shifts=[1], dims=[-1]; the operator itself wants the lists.
    as_lists = tuple([a] if isinstance(a, int) and not isinstance(a, bool) else a for a in args)
    problem: RuntimeError | None = None
    for candidate in (args, as_lists):
        fake_args, fake_kwargs = fx.map_arg((candidate, kwargs), lambda n: n.meta[VAL])
        try:
            return torch._C._jit_resolve_packet(name, *fake_args, **fake_kwargs), candidate
        except RuntimeError as error:
            problem = problem or error
    raise PassError(f"a replacement calls {name} with arguments it does not take: {problem}") from problem


def build(
    function: Callable[..., Any], program: Program, values: Mapping[str, Any], before: fx.Node
) -> tuple[fx.Node, list[fx.Node]]:
    """Run a replacement function on matched values; returns its result and the nodes it inserted.

    The function takes any of the matched values by parameter name. Inside it tensors have real `.shape`
    and `.dtype`, and constants are plain Python numbers.
    """
    recorder = _NodeRecorder(program, before)
    wanted = parameters(function)
    unknown = sorted(set(wanted) - set(values))
    if unknown:
        raise PassError(
            f"the replacement takes {', '.join(unknown)}, which the pattern does not have"
            f" (it has {', '.join(sorted(values))})"
        )
    arguments = {
        name: Traced(recorder, values[name]) if isinstance(values[name], fx.Node) else values[name] for name in wanted
    }
    result = unwrap_result(function(**arguments))
    if not isinstance(result, fx.Node):
        raise PassError(f"a replacement must return a tensor, got {type(result).__name__}")
    return result, recorder.created
