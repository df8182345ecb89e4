"""Rules of the proof for ops that look elements up by tensors of indices; see `_per_position_rules`."""

from __future__ import annotations

import sympy
import torch
import torch.fx as fx

from irc.core.operands import input_node, int_argument, list_argument
from irc.core.program import VAL
from irc.passes.attention._per_position import Refusal, Token, Walk


def schema_name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def embedding_rule(walk: Walk, node: fx.Node) -> Token | None:
    if walk.layout(node.args[0]) is not None:
        raise Refusal("looks up in a table that depends on the position")
    return walk.layout(node.args[1])


def index_rule(walk: Walk, node: fx.Node) -> Token | None:
    """x[i, j, …] with integer tensors: weights looked up by data, or tokens repeated in order."""
    source, indices = node.args[0], list_argument(node, 1)
    if isinstance(indices, list) and schema_name(node) == "aten::index_select":
        indices = [None] * (int_argument(node, 1) % len(walk.shape(source))) + [node.args[2]]
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if any(index.meta[VAL].dtype == torch.bool for _, index in given):
        raise Refusal("selects by a boolean mask: the number of results depends on the data")
    rank = max(len(index.meta[VAL].shape) for _, index in given)
    consecutive = [dim for dim, _ in given] == list(range(given[0][0], given[0][0] + len(given)))
    place = given[0][0] if consecutive else 0
    token = walk.layout(source)
    if token is None or token.dim not in dict(given):
        return _index_elsewhere(walk, node, token, given, place, rank)
    index = dict(given)[token.dim]
    repeats = walk.identity(index, walk.shape(source)[token.dim]) if index not in walk.data else None
    if repeats is None:
        raise Refusal(f"picks tokens along {walk.sequence.name} by {index.name}, which may mix positions")
    own = walk.token_dims(index.meta[VAL])
    result = Token(place + own[0] + rank - len(index.meta[VAL].shape), token.inner * repeats)
    for _, other in given:
        extra = walk.layout(other, result.inner) if other is not index else None
        if extra is not None and Token(place + extra.dim + rank - len(walk.shape(other)), extra.inner) != result:
            raise Refusal("pairs positions with positions")
    return result


def _index_elsewhere(
    walk: Walk, node: fx.Node, token: Token | None, given: list[tuple[int, fx.Node]], place: int, rank: int
) -> Token | None:
    found = walk.layouts_of([index for _, index in given])
    if token is not None:
        for dim, _ in given:
            mixed = walk.mixes(walk.shape(node.args[0])[dim])
            if mixed is not None:
                raise Refusal(f"indexes {mixed}")
        if found:
            raise Refusal("pairs positions with positions")
        dims = walk.token_dims(node.meta[VAL])
        return Token(dims[0], token.inner) if dims else None
    tokens = {Token(place + t.dim + rank - len(walk.shape(n)), t.inner) for n, t in found.items()}
    if len(tokens) > 1:
        raise Refusal("pairs positions with positions")
    return next(iter(tokens), None)


def gather_rule(walk: Walk, node: fx.Node) -> Token | None:
    """gather and scatter along a dimension that holds no positions; all operands share one layout."""
    sizes = walk.shape(node.args[0])
    mixed = walk.mixes(sizes[int_argument(node, 1) % len(sizes)])
    if mixed is not None:
        raise Refusal(f"gathers or scatters along {mixed}")
    tokens = set(walk.layouts_of(node.args).values())
    if len(tokens) > 1:
        raise Refusal("pairs positions with positions")
    return next(iter(tokens), None)


def index_add_rule(walk: Walk, node: fx.Node) -> Token | None:
    """x[i // k] += source[i]: the k parts of a token are summed (experts)."""
    target, index, source = input_node(node), input_node(node, 2), input_node(node, 3)
    dim = int_argument(node, 1) % len(walk.shape(target))
    token = walk.layout(source)
    walk.layout(target)
    repeats = walk.identity(index, walk.shape(target)[dim]) if index not in walk.data else None
    if token is None or repeats is None or token.dim != dim:
        raise Refusal(f"adds tokens up by {index.name}, which may mix positions")
    return Token(dim, sympy.cancel(token.inner / repeats))
