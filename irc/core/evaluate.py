"""Run an FX graph node by node: the meaning of a program, and the one place that executes it.

Values are freed after their last use. An observer sees every value as it is made, which is how
numeric verification, calibration and bisection look inside a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.fx as fx
from torch import Tensor

Observer = Callable[[fx.Node, Any], None]


def evaluate(
    graph: fx.Graph,
    weight: Callable[[fx.Node], Tensor],
    inputs: Sequence[Any],
    observer: Observer | None = None,
) -> list[Any]:
    """Flat outputs of the graph on flat inputs.

    `weight` gives the tensor of a `get_attr` node. The observer is called after each node. An error
    inside an operation is raised as it is, with the node and the user's line added as a note.
    """
    values: dict[fx.Node, Any] = {}
    last_use: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last_use[used] = node
    remaining = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op == "get_attr":
            values[node] = weight(node)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            try:
                values[node] = node.target(*args, **kwargs)
            except Exception as error:
                error.add_note(f"while running node {node.name} = {node.target}")
                raise
        elif node.op == "output":
            result = fx.map_arg(node.args[0], values.__getitem__)
            return list(result) if isinstance(result, (tuple, list)) else [result]
        else:
            raise ValueError(f"node {node.name}: a program has no {node.op} nodes")
        if observer is not None:
            observer(node, values[node])
        for used in node.all_input_nodes:
            if last_use[used] is node:
                del values[used]
        if node not in last_use:
            del values[node]
    raise ValueError("the graph has no output node")
