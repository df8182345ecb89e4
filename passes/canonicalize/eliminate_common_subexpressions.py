"""Compute equal things once. Runs after folding, before dead-code elimination."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from irc.core.contract import Pass, PassContext, PassResult, register_pass
from irc.core.program import VAL, Program, is_size
from irc.core.rewrite.graph import is_pure


@register_pass
@dataclass(frozen=True, kw_only=True)
class EliminateCommonSubexpressions(Pass):
    """f(x), f(x)  →  one f(x) used twice.

    1. Pure operations with the same target and the same arguments.
    2. Reads of the same weight (the same tensor, under one name or several).
    3. Sizes that are the same expression of the program's dimensions.

    Does not merge: random operations, operations that write in place, inputs.
    Preserves: exact, bit for bit.
    """

    name: ClassVar[str] = "eliminate-common-subexpressions"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        first_of: dict[Hashable, fx.Node] = {}
        matches = 0
        for node in list(program.graph.nodes):
            if not is_pure(node):
                continue
            key = _key(program, node)
            first = first_of.setdefault(key, node)
            if first is not node and ctx.allow(node):
                if node.op == "get_attr" and node.target != first.target:
                    program.tied[str(node.target)] = str(first.target)
                program.replace(node, first)
                matches += 1
        return PassResult(program, matches=matches, modified=matches > 0)


def _key(program: Program, node: fx.Node) -> Hashable:
    if node.op == "get_attr":
        return ("weight", id(program.weight(node)))
    if is_size(node) and isinstance(node.meta[VAL], torch.SymInt):
        return ("size", program.expr(node.meta[VAL]))
    return (node.target, freeze(node.args), freeze(node.kwargs))


def freeze(value: Any) -> Hashable:
    """A hashable stand-in for an argument: equal only for the same node, or the same value of the same type."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return ("list", *(freeze(item) for item in value))
    if isinstance(value, dict):
        return ("dict", *((key, freeze(item)) for key, item in sorted(value.items())))
    if isinstance(value, slice):
        return ("slice", freeze(value.start), freeze(value.stop), freeze(value.step))
    # repr tells 1 from 1.0 and True, -0.0 from 0.0, and makes NaN equal to itself.
    return (type(value).__name__, repr(value))
