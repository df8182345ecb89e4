"""Remove what no output needs. Runs last in canonicalization and after any pass that leaves debris."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from irc.core.contract import Pass, PassContext, PassResult, register_pass
from irc.core.program import Program
from irc.core.rewrite.graph import is_mutating


@register_pass
@dataclass(frozen=True, kw_only=True)
class EliminateDeadCode(Pass):
    """Operations and weights without users are removed; inputs stay, and so does an op that writes in place.

    Preserves: exact, bit for bit.
    """

    name: ClassVar[str] = "eliminate-dead-code"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches = 0
        for node in reversed(list(program.graph.nodes)):
            removable = node.op == "get_attr" or (node.op == "call_function" and not is_mutating(node))
            if removable and not node.users and ctx.allow(node):
                program.graph.erase_node(node)
                matches += 1
        return PassResult(program, matches=matches, modified=matches > 0)
