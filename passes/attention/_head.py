"""Where to pick the tokens whose logits are wanted: after the last attention, before the head."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import PassError
from irc.core.program import VAL, Program, is_size
from irc.passes.attention._analysis import Analysis
from irc.passes.attention._per_position import Token

_HEADS = ("aten::linear", "aten::matmul", "aten::mm", "aten::addmm", "aten::bmm")


def find_cut(program: Program, analysis: Analysis) -> fx.Node:
    """The latest value that alone determines the logits and comes before the last matrix product.

    Raises:
        PassError: no value between the last attention and the output is laid out by batch and position.
    """
    output = program.outputs[0]
    behind = _ancestors(output)
    order = [n for n in program.graph.nodes if n in behind]
    index = {node: i for i, node in enumerate(order)}
    data = analysis.walk.data
    last_attention = max(index[n] for n in analysis.attentions if n in index)
    heads = [i for n, i in index.items() if i > last_attention and n in data and _is_product(n)]
    limit = max(heads) if heads else len(order)
    best: fx.Node | None = None
    reach = 0
    for node in order:
        if index[node] >= limit and best is not None:
            break
        if node not in data:
            continue
        # Everything before this node is used no later than by it: all paths to the output go through it.
        if index[node] >= last_attention and reach <= index[node] and _is_laid_out(program, analysis, node):
            best = node
        reach = max([reach, *(index[u] for u in node.users if u in index)])
    if best is None:
        raise PassError("no value between the last attention and the output is laid out by batch and position")
    return best


def _is_product(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _HEADS


def _is_laid_out(program: Program, analysis: Analysis, node: fx.Node) -> bool:
    if not isinstance(node.meta[VAL], Tensor):
        return False
    token = analysis.walk.layouts.get(node)
    shape = program.shape_expr(node)
    sequence = analysis.sequence
    others = [size for i, size in enumerate(shape) if not isinstance(token, Token) or i != token.dim]
    return (
        isinstance(token, Token)
        and shape[token.dim] == sequence.symbol
        and others.count(sequence.batch_expr) >= 1
        and shape.index(sequence.batch_expr) != token.dim
        and all(size.is_number for size in others if size != sequence.batch_expr)
    )


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending.extend(i for i in current.all_input_nodes if not is_size(i))
    return found
