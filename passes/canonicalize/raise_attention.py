"""Attention in any spelling → `irc.attention`.

Runs after `drop-noise`, before passes that rewrite projections. Sources:

1. `aten.scaled_dot_product_attention`.
2. Eager chains: q·kᵀ (matmul, bmm, baddbmm, einsum) → scale → soft-cap → masks and biases → softmax
   (with sink logits) → ·v.

Key-value heads are taken from under their repetition (`_attention_layout`), masks are recognised by
evaluating them (`_attention_masks`, `irc.core.masks`); a mask that is no kind stays a bias.

Not handled: dropout in training; attention weights that are used elsewhere; scores of more than four
axes; a trainable scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from irc.core.contract import Pass, PassContext, PassResult, Skip, register_pass
from irc.core.program import Program
from irc.core.row_evaluation import value_dependent
from irc.passes.canonicalize._attention_build import build
from irc.passes.canonicalize._attention_eager import SOFTMAXES, match_softmax
from irc.passes.canonicalize._attention_layout import Layouts
from irc.passes.canonicalize._attention_masks import MaskPlanner
from irc.passes.canonicalize._attention_match import AttentionMatch, NoMatch, match_sdpa

aten = torch.ops.aten


@register_pass
@dataclass(frozen=True, kw_only=True)
class RaiseAttention(Pass):
    """softmax(q·kᵀ·scale + masks)·v  →  irc.attention(q, k, v, mask=…, window=…, bias=…).

    Preserves: exact but for rounding. A row with every key masked gives zeros where an eager -inf
    mask gives NaN.
    """

    name: ClassVar[str] = "raise-attention"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        tainted = value_dependent(program)
        layouts = Layouts(program, tainted)
        planner = MaskPlanner(program, tainted, layouts)
        matches, skips = 0, []
        kinds: dict[str, int] = {}
        for node in list(program.graph.nodes):
            found = _match(node, layouts)
            if found is None:
                continue
            if isinstance(found, NoMatch):
                skips.append(Skip.at(found.node, found.reason))
                continue
            plan = planner.plan(found.terms, found.queries, found.keys, causal=found.causal)
            if isinstance(plan, str):
                skips.append(Skip.at(found.anchor, plan))
                continue
            if not ctx.allow(found.anchor):
                continue
            build(program, found, plan)
            matches += 1
            label = f"{plan.kind}{'+bias' if plan.terms else ''}"
            kinds[label] = kinds.get(label, 0) + 1
        if matches:
            program.erase_dead()
            program.infer_types()  # the memory layout of results may differ from before
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0, statistics=kinds)


def _match(node: fx.Node, layouts: Layouts) -> AttentionMatch | NoMatch | None:
    if node.target is aten.scaled_dot_product_attention.default:
        return match_sdpa(node, layouts)
    if node.target in SOFTMAXES:
        return match_softmax(node, layouts)
    return None
