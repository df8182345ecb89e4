"""Nodes in messages: one line for a node, and the lines of the program around it."""

from __future__ import annotations

from typing import Any

import torch.fx as fx
from torch import Tensor

from irc.core import provenance
from irc.core.program import VAL, Program

_AROUND = 3


def target_name(node: fx.Node) -> str:
    """`aten.mul.Tensor`, `irc.rms_norm`, `getitem`; the weight's name for a weight."""
    if node.op != "call_function":
        return {"get_attr": "@", "placeholder": "input "}.get(node.op, "") + str(node.target)
    name = str(node.target) if not hasattr(node.target, "__name__") else ""
    if hasattr(node.target, "_schema"):
        name = str(node.target).removesuffix(".default")
    return name or str(getattr(node.target, "__name__", node.target))


def node_text(node: fx.Node) -> str:
    """`%mul_3 = aten.mul.Tensor at layers.0.mlp (model.py:12)`."""
    module, line = provenance.module_path(node), provenance.location(node)
    return f"%{node.name} = {target_name(node)}{f' at {module}' if module else ''}{f' ({line})' if line else ''}"


def listing_line(program: Program, node: fx.Node) -> str:
    """A node with its type and arguments, as in the text form but under its FX name."""
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    kind = _type_text(program, node)
    if node.op != "call_function":
        return f"%{node.name}{kind} = {target_name(node)}"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return f"%{node.name}{kind} = {target_name(node)}({', '.join(arguments)})"


def window(program: Program, node: fx.Node) -> str:
    """The lines around a node, with the node underlined."""
    nodes = [n for n in program.graph.nodes if n.op != "get_attr" or n is node]
    at = nodes.index(node)
    lines = []
    for other in nodes[max(0, at - _AROUND) : at + _AROUND + 1]:
        text = listing_line(program, other)
        lines.append(f"    {text}")
        if other is node:
            lines.append("    " + "^" * (len(node.name) + 1 if node.op != "output" else len(text)))
    return "\n".join(lines)


def _type_text(program: Program, node: fx.Node) -> str:
    return f": {program.type_text(node)}" if isinstance(node.meta.get(VAL), Tensor) else ""


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_argument(item) for item in value) + "]"
    return repr(value)
