"""Numbers of stored weights: plain tensors and quantized ones, whole or some of their rows."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.formats import Format, Parts
from irc.core.operands import input_node
from irc.core.program import Program


def quantized_parts(program: Program, node: fx.Node) -> tuple[Format, Parts] | None:
    """Format and parts of a weight that is dequantized, or None for a plain one."""
    if node.op == "get_attr":
        return None
    chosen = formats.parse(str(node.kwargs["format"]))
    others = [program.weight(arg) if isinstance(arg, fx.Node) else None for arg in node.args[1:]]
    return chosen, Parts(program.weight(input_node(node)), *others)


def numbers(program: Program, node: fx.Node) -> Tensor:
    """The real numbers of a stored weight; plain ones in their own type."""
    found = quantized_parts(program, node)
    if found is None:
        return program.weight(node).detach()
    chosen, parts = found
    return formats.dequantize_tensor(parts, chosen)


def select_rows(parts: Parts, rows: Tensor | None) -> Parts:
    """Some rows of a quantized tensor; rows are stored apart, so no number changes."""
    if rows is None:
        return parts
    count = parts.stored.shape[0]

    def some(part: Tensor | None) -> Tensor | None:
        return part if part is None or part.ndim < 2 or part.shape[0] != count else part[rows]

    return Parts(parts.stored[rows], some(parts.scale), some(parts.zero_point), parts.tensor_scale)


def rows_of(tensor: Tensor, rows: Tensor | None, axis: int = 0) -> Tensor:
    return tensor if rows is None else torch.index_select(tensor, axis, rows)
