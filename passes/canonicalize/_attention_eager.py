"""Attention written out: the scores above a softmax, and from the softmax down to ·v.

`_attention_scores` walks up; here the way down is walked, and both are put together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.operands import list_argument
from irc.core.program import VAL
from irc.passes.canonicalize._attention_layout import Layouts
from irc.passes.canonicalize._attention_match import AttentionMatch, NoMatch, Operand, find_operands
from irc.passes.canonicalize._attention_product import Product, value_product
from irc.passes.canonicalize._attention_scores import CASTS, COPIES, DROPOUTS, MAX_STEPS, VIEWS, ScoreWalk, keeps_plane

aten = torch.ops.aten

SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})


def match_softmax(softmax: fx.Node, layouts: Layouts) -> AttentionMatch | NoMatch | None:
    """The attention around a softmax; None when it is no part of one (a router, a classifier)."""
    below = _walk_down(softmax)
    if below is None:
        return None
    walk = ScoreWalk(softmax, layouts, drops_last=below.drops_last)
    refusal = walk.run()
    if walk.product is None:
        return NoMatch(softmax, refusal or "its scores are no product of queries and keys")
    if below.refusal or refusal:
        return NoMatch(softmax, below.refusal or refusal or "")
    if not _is_last_axis(softmax):
        return NoMatch(softmax, f"softmax runs over axis {softmax.args[1]}, not over the keys")
    values = value_product(below.product, below.weights)
    if isinstance(values, str):
        return NoMatch(softmax, values)
    return _assemble(softmax, below.product, walk, walk.product, values, layouts)


def _assemble(
    softmax: fx.Node, anchor: fx.Node, walk: ScoreWalk, scores: Product, values: Product, layouts: Layouts
) -> AttentionMatch | NoMatch:
    query, key = Operand(scores.left, scores.left_order), Operand(scores.right, scores.right_order)
    found = find_operands(layouts, anchor, query, key, Operand(values.right, values.right_order))
    if isinstance(found, NoMatch):
        return replace(found, node=softmax)
    score_shape = scores.node.meta[VAL].shape
    sinks = None
    if walk.sinks is not None:
        sinks = _sink_vector(walk.sinks, layouts, found[0].num_heads)
        if sinks is None:
            return NoMatch(softmax, f"sink logits {walk.sinks.name} are no vector of one number a head")
    return AttentionMatch(
        anchor=anchor,
        query=found[0],
        key=found[1],
        value=found[2],
        queries=score_shape[-2],
        keys=score_shape[-1],
        scale=walk.scale * found[0].factor * found[1].factor,
        score_ndim=len(values.left_shape),
        terms=tuple(walk.terms),
        softcap=walk.softcap,
        sinks=sinks,
        output_order=values.output_order,
    )


# -------------------------------------------------------------------- from the softmax to the values


@dataclass(frozen=True)
class _Below:
    """The product with the values, and the weights as they go into it."""

    product: fx.Node
    weights: fx.Node
    drops_last: bool
    refusal: str | None


def _walk_down(softmax: fx.Node) -> _Below | None:
    node, drops_last, refusal = softmax, False, None
    for _ in range(MAX_STEPS):
        users = list(node.users)
        following = [user for user in users if _continues(user, node)]
        if len(following) != 1:
            return None
        if len(users) > 1:
            refusal = f"its attention weights {node.name} are used elsewhere ({_names(users, following[0])})"
        user = following[0]
        if user.target in (aten.matmul.default, aten.bmm.default, aten.einsum.default):
            return _Below(user, node, drops_last, refusal)
        if user.target in DROPOUTS and len(user.args) > 2 and user.args[2] and user.args[1] != 0:
            refusal = "it drops attention weights: capture in eval mode"
        if user.target is aten.slice.Tensor:
            drops_last = True
        node = user
    return None


def _continues(user: fx.Node, node: fx.Node) -> bool:
    target = user.target
    if target in CASTS:
        return user.meta[VAL].dtype.is_floating_point
    if target in COPIES or target in DROPOUTS:
        return True
    if target in VIEWS:
        return keeps_plane(user, node)
    if target is aten.slice.Tensor:
        return _drops_last_column(user, node)
    if target in (aten.matmul.default, aten.bmm.default):
        return user.args[0] is node
    return target is aten.einsum.default and node in list_argument(user, 1)


def _drops_last_column(user: fx.Node, node: fx.Node) -> bool:
    axis = user.args[1] if len(user.args) > 1 else 0
    start = user.args[2] if len(user.args) > 2 else None
    before, after = node.meta[VAL].shape, user.meta[VAL].shape
    return axis in (-1, len(before) - 1) and start in (0, None) and str(after[-1] + 1) == str(before[-1])


def _is_last_axis(softmax: fx.Node) -> bool:
    axis = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim")
    return axis in (-1, softmax.meta[VAL].ndim - 1)


def _names(users: list[fx.Node], but: fx.Node) -> str:
    return ", ".join(user.name for user in users if user is not but)


def _sink_vector(sinks: fx.Node, layouts: Layouts, num_heads: Any) -> fx.Node | None:
    """The tensor [H] that was spread to [B, H, S, 1]."""

    def equal(vector: Tensor, spread: Tensor) -> bool:
        return (
            spread.ndim == 4
            and vector.shape[0] == num_heads
            and torch.equal(vector.view(1, -1, 1, 1).expand_as(spread), spread)
        )

    return layouts.equals_moved(sinks, 1, equal)
