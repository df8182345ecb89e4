"""Query, key and value projections merged into one linear layer.

Runs after canonicalization (it starts from `irc.attention`), before or after quantization and KV-cache
insertion. The projections are found by walking back from the attention's inputs, through whatever lies
between (reshapes, head norms, rotary embedding, cache writes), to the first linear layer. With several
inputs (cross-attention) those that share one are merged. Does not merge: projections with tied weights;
an input of attention that comes from more than one linear layer (low-rank attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from irc.core.contract import Finding, Pass, PassContext, PassResult, Skip, register_pass
from irc.core.memory import expect
from irc.core.ops.registry import find_op
from irc.core.program import Program
from irc.passes._weights import weight_uses
from irc.passes.fuse._layers import arguments
from irc.passes.fuse._merge_linears import check_merged, is_linear, merge_linears, why_not_mergeable

_ATTENTION = {"attention": ("query", "key", "value"), "flash_attention": ("query", "key", "value")}


@register_pass
@dataclass(frozen=True, kw_only=True)
class MergeQkv(Pass):
    """attention(x·Wqᵀ, x·Wkᵀ, x·Wvᵀ) → q, k, v = split(x·[Wq; Wk; Wv]ᵀ); attention(q, k, v).

    Preserves: exact.
    """

    name: ClassVar[str] = "merge-qkv"

    def get_ready(self, num_weights: int, num_bytes: int) -> int:
        expect(num_bytes // 10)
        return num_bytes

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, skips = 0, []
        uses = weight_uses(program)
        for node in list(program.graph.nodes):
            definition = find_op(node.target)
            if definition is None or definition.name not in _ATTENTION:
                continue
            found = _projections(node, _ATTENTION[definition.name])
            if isinstance(found, str):
                skips.append(Skip.at(node, found))
                continue
            for siblings in found:
                reason = why_not_mergeable(program, siblings, uses)
                if reason is not None:
                    skips.append(Skip.at(node, reason))
                elif ctx.allow(siblings[0]):
                    merge_linears(program, siblings)
                    matches += 1
        if matches:
            program.erase_dead()
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0)

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """Each slice of a merged layer holds exactly the rows of the layer it replaced."""
        return check_merged(before, result)


def _projections(attention: fx.Node, roles: tuple[str, ...]) -> list[list[fx.Node]] | str:
    """Groups of at least two projections that share an input, or why there are none."""
    found: dict[str, fx.Node] = {}
    for role in roles:
        sources = _linears_behind(arguments(attention)[role])
        if len(sources) != 1:
            names = ", ".join(sorted(node.name for node in sources)) or "none"
            return f"its {role} comes from {len(sources)} linear layers ({names}), not one"
        found[role] = sources.pop()
    groups: dict[fx.Node, list[fx.Node]] = {}
    for linear in dict.fromkeys(found.values()):
        groups.setdefault(arguments(linear)["input"], []).append(linear)
    if len(set(found.values())) == 1:
        return f"query, key and value already come from one linear layer ({found['query'].name})"
    merged = [siblings for siblings in groups.values() if len(siblings) > 1]
    if not merged:
        inputs = ", ".join(f"{role}: {arguments(linear)['input'].name}" for role, linear in found.items())
        return f"the projections read different inputs ({inputs})"
    return merged


def _linears_behind(node: fx.Node) -> set[fx.Node]:
    """The first linear layers on every way back from a node."""
    found, seen, pending = set(), set(), [node]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if is_linear(current):
            found.add(current)
        else:
            pending.extend(current.all_input_nodes)
    return found
