"""The graph module that carries a program: weights by dotted name, and Python code only when somebody calls it.

PyTorch writes and compiles a `forward` for each graph module that is made. A program is copied for every pass and
is run by `irc.core.evaluate`, which needs none, so here that waits for the first call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.fx as fx
from torch import Tensor, nn


class Carrier(fx.GraphModule):
    """A graph module that compiles its `forward` at the first call, or when `recompile` is called."""

    def __init__(self, root: nn.Module | dict[str, Any], graph: fx.Graph, class_name: str = "GraphModule") -> None:
        self.__dict__["_unwritten"] = True
        super().__init__(root, graph, class_name)
        self.__dict__["_unwritten"] = False

    def take(self, graph: fx.Graph) -> None:
        """Carry this graph; `forward` is written at the first call."""
        self.__dict__["_unwritten"] = True
        self.graph = graph
        self.__dict__["_unwritten"] = False

    def recompile(self) -> Any:
        """Write and compile `forward`; while the module is being made, only prepare to."""
        if not self.__dict__.get("_unwritten", False):
            return super().recompile()
        type(self).forward = _first_call
        return None

    @property
    def code(self) -> str:
        """The Python code of `forward`."""
        if "_code" not in self.__dict__:
            self.recompile()
        return super().code


def _first_call(module: Carrier, *args: Any, **kwargs: Any) -> Any:
    module.recompile()
    return module(*args, **kwargs)


def build_graph_module(graph: fx.Graph, weights: Mapping[str, Tensor], name: str) -> fx.GraphModule:
    """A graph module over a graph whose `get_attr` targets are the given weights."""
    safe = "".join(c if c.isalnum() else "_" for c in name) or "Program"
    made = Carrier({}, fx.Graph(), class_name=safe)
    for target in dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr")):
        *path, leaf = target.split(".")
        holder: nn.Module = made
        for step in path:
            inner = holder._modules.get(step)
            if inner is None:
                inner = holder._modules[step] = _empty_module()
            holder = inner
        tensor = weights[target]
        if isinstance(tensor, nn.Parameter):
            holder._parameters[leaf] = tensor
        else:
            holder._buffers[leaf] = tensor
    made.take(graph)
    return made


_EMPTY = nn.Module()


def _empty_module() -> nn.Module:
    """As `nn.Module()`, which takes long: every copy of a program needs one for each module of the model."""
    made = nn.Module.__new__(nn.Module)
    made.__dict__.update({k: v.copy() if isinstance(v, (dict, set)) else v for k, v in _EMPTY.__dict__.items()})
    return made


def attach(module: nn.Module, target: str, tensor: Tensor) -> None:
    """Register a tensor under a dotted name, as parameter if it is one, else as buffer."""
    *path, leaf = target.split(".")
    for step in path:
        if not hasattr(module, step):
            module.add_module(step, nn.Module())
        module = getattr(module, step)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


def look_up(module: nn.Module, target: str) -> Any:
    """What a dotted name means; AttributeError if nothing."""
    found: Any = module
    *path, leaf = target.split(".")
    for step in path:
        found = found._modules.get(step) or getattr(found, step)  # the table: `getattr` of a module looks in three
    for table in (found._parameters, found._buffers) if isinstance(found, nn.Module) else ():
        if table.get(leaf) is not None:
            return table[leaf]
    return getattr(found, leaf)


def has_attr(module: nn.Module, target: str) -> bool:
    """Whether a dotted name means something."""
    try:
        look_up(module, target)
    except AttributeError:
        return False
    return True
