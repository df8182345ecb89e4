"""Gate and up projections of a gated MLP merged into one linear layer.

Runs after canonicalization (it starts from `irc.glu`), before or after quantization. Does not merge:
projections of different inputs, with tied weights, or whose results meet something else on the way to the gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from irc.core.contract import Finding, Pass, PassContext, PassResult, Skip, register_pass
from irc.core.memory import expect
from irc.core.ops.registry import is_irc_op
from irc.core.program import Program
from irc.passes._weights import weight_uses
from irc.passes.fuse._layers import arguments
from irc.passes.fuse._merge_linears import check_merged, is_linear, merge_linears, why_not_mergeable


@register_pass
@dataclass(frozen=True, kw_only=True)
class MergeGateUp(Pass):
    """irc.glu(x·Wgᵀ, x·Wuᵀ) → gate, up = split(x·[Wg; Wu]ᵀ); irc.glu(gate, up).

    Preserves: exact.
    """

    name: ClassVar[str] = "merge-gate-up"

    def get_ready(self, num_weights: int, num_bytes: int) -> int:
        expect(num_bytes // 2)
        return num_bytes

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, skips = 0, []
        uses = weight_uses(program)
        for node in list(program.graph.nodes):
            if not is_irc_op(node.target, "glu"):
                continue
            args = arguments(node)
            pair = [args["gate"], args["up"]]
            reason = _why_no_pair(pair) or why_not_mergeable(program, pair, uses)
            if reason is not None:
                skips.append(Skip.at(node, reason))
            elif ctx.allow(node):
                merge_linears(program, pair)
                matches += 1
        if matches:
            program.erase_dead()
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0)

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """Each slice of a merged layer holds exactly the rows of the layer it replaced."""
        return check_merged(before, result)


def _why_no_pair(pair: list[fx.Node]) -> str | None:
    for role, node in zip(("gate", "up"), pair, strict=True):
        if not is_linear(node):
            return f"its {role} {node.name} is {node.target}, not a linear layer"
    gate, up = pair
    if gate is up:
        return f"gate and up are the same value {gate.name}"
    inputs = [arguments(node)["input"].name for node in pair]
    return None if inputs[0] == inputs[1] else f"gate and up read different inputs ({inputs[0]}, {inputs[1]})"
