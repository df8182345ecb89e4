"""What was found where: one attention of a program, whatever its spelling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from irc.core.dims import Size
from irc.core.program import VAL
from irc.passes.canonicalize._attention_layout import Heads, Layouts
from irc.passes.canonicalize._attention_masks import Term

aten = torch.ops.aten


@dataclass(frozen=True)
class NoMatch:
    """Something close to attention that is left alone, and why."""

    node: fx.Node
    reason: str


@dataclass(frozen=True)
class AttentionMatch:
    """One attention.

    `anchor` is the node whose value the attention computes, with `score_ndim` axes of which the
    leading ones are [B, H] (4), [B·H] or [B] (3), or nothing (2).
    """

    anchor: fx.Node
    query: Heads
    key: Heads
    value: Heads
    queries: Size
    keys: Size
    scale: float
    score_ndim: int
    terms: tuple[Term, ...] = ()
    causal: bool = False
    top_left_causal: bool = False
    softcap: float | None = None
    sinks: fx.Node | None = None
    output_order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Operand:
    """A factor of a product; permuting its axes by `order` gives [.., T, D]."""

    node: fx.Node
    order: tuple[int, ...] | None = None


def find_operands(
    layouts: Layouts, anchor: fx.Node, query: Operand, key: Operand, value: Operand
) -> tuple[Heads, Heads, Heads] | NoMatch:
    """The tensors [B, H, ·, D] under the three operands."""
    query_heads = layouts.find(query.node, order=query.order)
    if query_heads is None:
        return NoMatch(anchor, f"query {query.node.name} is no [B, H, S, D] or [B, S, D] tensor")
    num_heads = query_heads.num_heads
    if not isinstance(num_heads, int):
        return NoMatch(anchor, f"the number of heads of {query_heads.node.name} is not fixed")
    found: list[Heads] = []
    for what, operand in (("key", key), ("value", value)):
        heads = layouts.find(operand.node, order=operand.order, num_heads=num_heads)
        if heads is None:
            return NoMatch(anchor, f"{what} {operand.node.name} is no [B, Hkv, T, D] tensor or repetition of one")
        if not isinstance(heads.num_heads, int) or num_heads % heads.num_heads:
            return NoMatch(anchor, f"{num_heads} query heads are no multiple of {heads.num_heads} {what} heads")
        if str(heads.batch) != str(query_heads.batch):
            return NoMatch(anchor, f"{what} {heads.node.name} has batch {heads.batch}, query {query_heads.batch}")
        found.append(heads)
    if found[0].num_heads != found[1].num_heads:
        # One of them repeats heads once more than the other: both with the larger number, if they go that far.
        stored = max(int(heads.num_heads) for heads in found)
        again = [layouts.find(o.node, order=o.order, num_heads=num_heads, stored_heads=stored) for o in (key, value)]
        found = [new or old for new, old in zip(again, found, strict=True)]
    if found[0].num_heads != found[1].num_heads:
        return NoMatch(anchor, f"{found[0].num_heads} key heads but {found[1].num_heads} value heads")
    return query_heads, found[0], found[1]


def match_sdpa(node: fx.Node, layouts: Layouts) -> AttentionMatch | NoMatch:
    """`aten.scaled_dot_product_attention`: its causal mask is aligned top left, ours bottom right."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if given.get("dropout_p", 0.0) != 0.0:
        return NoMatch(node, f"it drops attention weights (dropout_p={given['dropout_p']}): capture in eval mode")
    shape = query.meta[VAL].shape
    if len(shape) not in (2, 3, 4):
        return NoMatch(node, f"query {query.name} has {len(shape)} axes")
    found = find_operands(layouts, node, Operand(query), Operand(key), Operand(value))
    if isinstance(found, NoMatch):
        return found
    scale = given.get("scale")
    scale = 1.0 / math.sqrt(shape[-1]) if scale is None else layouts.constant(scale)
    if scale is None:
        return NoMatch(node, f"its scale {given['scale']} is not a constant")
    queries, keys = shape[-2], key.meta[VAL].shape[-2]
    causal = bool(given.get("is_causal", False))
    aligned = str(queries) == str(keys)
    terms = () if mask is None else (Term(mask, "keep" if mask.meta[VAL].dtype == torch.bool else "add"),)
    return AttentionMatch(
        anchor=node,
        query=found[0],
        key=found[1],
        value=found[2],
        queries=queries,
        keys=keys,
        scale=scale * found[0].factor * found[1].factor,
        score_ndim=len(shape),
        terms=terms,
        causal=causal and aligned,
        top_left_causal=causal and not aligned,
    )
