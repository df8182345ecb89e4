"""Attention replaced by its memory-efficient twin.

Runs after canonicalization and after passes that start from `irc.attention`; before lowering. An additive
bias that the program itself builds stays as large as it is: only the scores disappear.
Source: Dao 2023 (FlashAttention-2), https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from irc.core.contract import Finding, Pass, PassContext, PassResult, Skip, register_pass
from irc.core.ops.registry import is_irc_op
from irc.core.program import Program
from irc.core.provenance import origin_of

aten = torch.ops.aten

_SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.einsum.default})


@register_pass
@dataclass(frozen=True, kw_only=True)
class SubstituteFlashAttention(Pass):
    """irc.attention(q, k, v, …) → irc.flash_attention(q, k, v, …), same arguments.

    Preserves: exact; peak memory of the scores falls from O(S·T) to O(S).
    """

    name: ClassVar[str] = "substitute-flash-attention"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, with_bias, skips = 0, 0, []
        for node in list(program.graph.nodes):
            reason = _why_not_canonical(node)
            if reason is not None:
                skips.append(Skip.at(node, reason))
            elif is_irc_op(node.target, "attention") and ctx.allow(node):
                options = dict(node.kwargs)
                flash = program.insert(torch.ops.irc.flash_attention.default, *node.args, before=node, **options)
                program.replace(node, flash)
                matches += 1
                with_bias += options.get("bias") is not None
        return PassResult(
            program, matches=matches, skips=skips, modified=matches > 0, statistics={"with_bias": with_bias}
        )

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """Each flash attention has exactly the arguments of the attention it replaced."""
        originals = {node.name: node for node in before.graph.nodes}
        findings = []
        for node in result.program.graph.nodes:
            if node.name in originals or not is_irc_op(node.target, "flash_attention"):
                continue
            old = originals.get(origin_of(node) or "")
            if old is None or not is_irc_op(old.target, "attention"):
                findings.append(Finding(node.name, "stands for no attention of the program before"))
                continue
            # Inputs that were attention themselves carry another name now: follow them to what they stand for.
            new_call, old_call = ([_plain(value) for value in _call(n)] for n in (node, old))
            if new_call != old_call:
                findings.append(Finding(node.name, f"has arguments {new_call}, but {old.name} has {old_call}"))
        return findings


def _why_not_canonical(node: fx.Node) -> str | None:
    """Why a node that looks like attention cannot be substituted, or None."""
    if node.target is aten.scaled_dot_product_attention.default:
        return "was not raised to irc.attention (raise-attention says why)"
    if node.target in _SOFTMAXES and any(user.target in _PRODUCTS for user in node.users):
        return "softmax before a product was not raised to irc.attention (raise-attention says why)"
    return None


def _call(node: fx.Node) -> list[object]:
    return [*node.args, *(item for pair in sorted(node.kwargs.items()) for item in pair)]


def _plain(value: object) -> object:
    return (origin_of(value) or value.name) if isinstance(value, fx.Node) else value
