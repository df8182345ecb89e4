"""The weights of a graph that a weight quantizer is about, found by the operations that use them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx

from irc.core.contract import Skip
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.passes.fuse._layers import CONVOLUTIONS, arguments, is_transposed

aten = torch.ops.aten

_PRODUCTS = frozenset(
    {
        aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default,
        aten.einsum.default, aten.mv.default, aten._grouped_mm.default,
    }
)  # fmt: skip


@dataclass(frozen=True)
class WeightLayer:
    """A stored weight and the operations that use it, all of them layers; its rows as [num_rows, width]."""

    weight: fx.Node
    users: tuple[fx.Node, ...]
    num_rows: int
    width: int

    @property
    def name(self) -> str:
        return str(self.weight.target)


def find_weight_layers(program: Program, *, embeddings: bool, convolutions: bool) -> Iterator[WeightLayer | Skip]:
    """Each weight matrix of the graph: to quantize, or why not.

    Weights of operations that are no products (norms, added tables) are none of them.
    """
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for weight in program.graph.find_nodes(op="get_attr"):
        fake = weight.meta[VAL]
        if not fake.is_floating_point() or fake.ndim < 2:
            continue
        users = tuple(sorted(weight.users, key=order.__getitem__))
        refusals = {user: _why_not(user, weight, embeddings, convolutions) for user in users}
        if not any(_is_candidate(user) for user in users):
            continue
        kept = [(user, reason) for user, reason in refusals.items() if reason is not None]
        if kept:
            user, reason = kept[0]
            others = ", ".join(u.name for u in users if u is not user)
            yield Skip.at(user, f"weight {weight.target} {reason}" + (f"; {others} shares it" if others else ""))
        else:
            yield WeightLayer(weight, users, int(fake.shape[0]), math.prod(int(size) for size in fake.shape[1:]))


def _is_candidate(user: fx.Node) -> bool:
    return (
        user.target in (aten.linear.default, aten.embedding.default)
        or user.target in CONVOLUTIONS
        or user.target in _PRODUCTS
        or is_irc_op(user.target, "linear_activation")
        or is_irc_op(user.target, "conv_activation")
    )


def _why_not(user: fx.Node, weight: fx.Node, embeddings: bool, convolutions: bool) -> str | None:
    """Why one use of a weight keeps it in full precision, or None if it does not."""
    if not _is_candidate(user) or user.target in _PRODUCTS:
        return f"is used by {user.name}, {user.target}, which is no linear layer"
    if arguments(user)["weight"] is not weight:
        return f"is not the weight of {user.name}, {user.target}"
    if user.target is aten.embedding.default:
        return None if embeddings else "is an embedding table (include_embeddings=True takes it)"
    if user.target in CONVOLUTIONS or is_irc_op(user.target, "conv_activation"):
        if not convolutions:
            return "is a convolution's (include_convolutions=True takes it)"
        transposed = user.args[6] if is_irc_op(user.target) else is_transposed(user)
        return "is a transposed convolution's: its output channels are not its rows" if transposed else None
    return None if weight.meta[VAL].ndim == 2 else f"has {weight.meta[VAL].ndim} dimensions"
