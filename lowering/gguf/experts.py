"""A mixture of experts as captured: softmax, top-k, and a batched product with the chosen experts' weights."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from irc.core.errors import TargetError
from irc.core.operands import input_node, int_argument, list_argument
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.lowering.gguf.description import Experts, Linear
from irc.lowering.gguf.trace import (
    factor,
    identity,
    is_linear_like,
    is_stored,
    linear_input,
    linear_of,
    skip_layout,
    trace,
)

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True)
class FoundExperts:
    experts: Experts
    reads: fx.Node


def read(program: Program, node: fx.Node) -> FoundExperts | None:
    """The mixture that `node` is the result of, or None if it is none.

    Raises:
        TargetError: it is one, but of a kind that is not described; says what is unusual.
    """
    total = skip_layout(node)
    if total.target is not aten.sum.dim_IntList:
        return None
    product = skip_layout(input_node(total))
    if product.target is not aten.mul.Tensor:
        return None
    sides = [skip_layout(side) for side in product.args[:2] if isinstance(side, fx.Node)]
    downs = [side for side in sides if side.target is aten.bmm.default]
    if len(sides) != 2 or len(downs) != 1:
        return None
    weights = next(side for side in sides if side is not downs[0])
    down, chosen = _expert_weight(downs[0])
    inner = skip_layout(input_node(downs[0], 1))
    if not is_irc_op(inner.target, "glu"):
        raise TargetError(f"{inner.name}: experts without a gated MLP are not written")
    gate, up = (_half(program, inner.args[index], chosen) for index in range(2))
    router, normalized, num_used, scale = _router(program, weights, chosen)
    hidden = skip_layout(input_node(gate[1], 1))
    if skip_layout(linear_input(router)) is not hidden:
        raise TargetError(f"{router.name}: the router reads another value than its experts")
    found = Experts(
        linear_of(program, router), gate[0], up[0], down, str(inner.kwargs.get("activation", "silu")),
        int(down.weight.meta[VAL].shape[0]), num_used, normalized, scale,
    )  # fmt: skip
    return FoundExperts(found, hidden)


def _expert_weight(product: fx.Node) -> tuple[Linear, fx.Node]:
    """The weights [X, N, K] that a batched product takes the chosen ones of, and what chose them."""
    lookup = input_node(product)
    if lookup.target is not aten.index.Tensor or not is_stored(lookup.args[0]):
        raise TargetError(f"{product.name}: the experts' weights are not looked up in one tensor")
    indices = list_argument(lookup, 1)
    if len(indices) != 1 or not isinstance(indices[0], fx.Node):
        raise TargetError(f"{lookup.name}: experts are chosen by more than one index")
    return Linear(lookup.args[0]), skip_layout(indices[0])


def _half(program: Program, node: object, chosen: fx.Node) -> tuple[Linear, fx.Node]:
    assert isinstance(node, fx.Node)
    product = skip_layout(node)
    if product.target is not aten.bmm.default:
        raise TargetError(f"{node.name}: gate and up of an expert are no batched product")
    weight, by = _expert_weight(product)
    if by is not chosen:
        raise TargetError(f"{product.name}: gate, up and down of the experts are chosen differently")
    # The product is [tokens, N, 1]: what follows it is followed on its rows.
    count = int(weight.weight.meta[VAL].shape[1])
    squeezed = next(iter(product.users))
    rows = _rows_after(program, node, squeezed, count)
    return Linear(weight.weight, None, None if identity(rows, count) else rows), product


def _rows_after(program: Program, node: fx.Node, source: fx.Node, count: int) -> torch.Tensor:
    if node is source:
        return torch.arange(count)
    order, current = [], node
    while current is not source:
        order.append(current)
        current = input_node(current)
    value: Any = torch.arange(count).unsqueeze(0)
    for step in reversed(order):
        if step.target is operator.getitem:
            value = value[int_argument(step, 1)]
        elif step.target in (aten.split.Tensor, aten.chunk.default, aten.slice.Tensor, aten.split_with_sizes.default):
            value = step.target(value, *step.args[1:], **step.kwargs)
        else:
            raise TargetError(f"{step.name} = {step.target} lies between an expert's product and its activation")
    assert isinstance(value, torch.Tensor)
    return value[0]


def _router(program: Program, weights: fx.Node, chosen: fx.Node) -> tuple[fx.Node, bool, int, float]:
    """(router layer, whether weights add up to 1, experts a token, factor on the weights)."""
    node, normalized, scale = _uncast(weights), False, 1.0
    while (scaled := factor(program, node)) is not None:
        node, scale = _uncast(scaled[0]), scale * scaled[1]
    softmax_last = node.target in _SOFTMAX
    if softmax_last:
        normalized, node = True, _uncast(input_node(node))
    elif node.target is aten.div.Tensor and isinstance(node.args[1], fx.Node):
        if skip_layout(node.args[1]).target is not aten.sum.dim_IntList:
            raise TargetError(f"{node.name}: the experts' weights are divided by something other than their sum")
        normalized, node = True, _uncast(input_node(node))
    top = input_node(node) if node.target is operator.getitem else node
    if top.target is not aten.topk.default:
        raise TargetError(f"{node.name} = {node.target}: the experts' weights do not come from a top-k")
    if chosen is not top:  # its indices: its values are no integers
        raise TargetError(f"{chosen.name}: the experts are not chosen by the top-k that weighs them")
    scores = _uncast(input_node(top))
    if not softmax_last:
        if scores.target not in _SOFTMAX:
            raise TargetError(f"{scores.name} = {scores.target}: only routers with a softmax are written")
        scores = _uncast(input_node(scores))
    if not is_linear_like(scores):
        raise TargetError(f"{scores.name}: the router is no linear layer")
    return scores, normalized, int_argument(top, 1), scale


def _uncast(node: fx.Node) -> fx.Node:
    node = skip_layout(node) if node.target is not operator.getitem else node
    while node.target in _CASTS:
        node = input_node(node)
        node = skip_layout(node) if node.target is not operator.getitem else node
    return node


__all__ = ["FoundExperts", "read", "trace"]
