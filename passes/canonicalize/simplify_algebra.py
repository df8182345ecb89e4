"""One-line laws that make programs smaller. Runs after the raising passes, before constant folding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from irc.core.contract import Pass, PassContext, PassResult, register_pass
from irc.core.program import VAL, Program
from irc.core.rewrite import Match, RewriteRule, apply_rules
from irc.core.rewrite.calls import cast_input


@register_pass
@dataclass(frozen=True, kw_only=True)
class SimplifyAlgebra(Pass):
    """The table `LAWS`, applied until nothing changes, and chains of casts.

    A law never changes an element type: `x * 1.0` on integers stays.
    Preserves: exact up to rounding (merging two constants rounds once less).
    """

    name: ClassVar[str] = "simplify-algebra"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, _ = apply_rules(program, LAWS, ctx)  # a law that does not fit is no near miss
        matches += _merge_casts(program, ctx)
        return PassResult(program, matches=matches, modified=matches > 0)


def _law(
    name: str,
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    check: Callable[[Match], str | None] | None = None,
    extra_users: bool = True,
) -> RewriteRule:
    return RewriteRule(name=name, pattern=pattern, replacement=replacement, check=check, extra_users=extra_users)


def _same_swap(match: Match) -> str | None:
    return None if {match["a"], match["b"]} == {match["c"], match["d"]} else "it swaps other dimensions"


def _compose(first: list[int], second: list[int]) -> list[int]:
    return [first[i] for i in second]


def _parts_fill(match: Match) -> str | None:
    """The two parts of a slice_scatter pair cover the dimension, so the tensor below does not matter."""
    dim, total = match["dim"], match.program.shape_expr(match.root)
    first, second = match.shape("a")[dim], match.shape("b")[dim]
    if first == match["n"] and first + second == total[dim]:
        return None
    return f"parts of {first} and {second} do not fill {total[dim]}"


_END = 2**63 - 1

LAWS = [
    _law("x + 0 = x", lambda x: x + 0, lambda x: x),
    _law("x - 0 = x", lambda x: x - 0, lambda x: x),
    _law("x · 1 = x", lambda x: x * 1, lambda x: x),
    _law("x / 1 = x", lambda x: x / 1, lambda x: x),
    _law("x^1 = x", lambda x: x.pow(1), lambda x: x),
    _law("-(-x) = x", lambda x: torch.neg(torch.neg(x)), lambda x: x),
    _law("x - (-y) = x + y", lambda x, y: x - (-y), lambda x, y: x + y, extra_users=False),
    _law("x + (-y) = x - y", lambda x, y: x + (-y), lambda x, y: x - y, extra_users=False),
    # Merging two constants may only happen where the inner product is not needed itself.
    _law("(x · a) · b = x · ab", lambda x, a=float, b=float: x * a * b, lambda x, a, b: x * (a * b), extra_users=False),
    _law(
        "(x + a) + b = x + (a + b)", lambda x, a=int, b=int: x + a + b, lambda x, a, b: x + (a + b), extra_users=False
    ),
    _law(
        "swap twice = nothing",
        lambda x, a=int, b=int, c=int, d=int: x.transpose(a, b).transpose(c, d),
        lambda x: x,
        check=_same_swap,
    ),
    _law(
        "permute twice = permute",
        lambda x, first=object, second=object: x.permute(first).permute(second),
        lambda x, first, second: x.permute(_compose(first, second)),
    ),
    _law(
        "reshape twice = reshape",
        lambda x, first=object, second=object: x.reshape(first).reshape(second),
        lambda x, second: torch.ops.aten.reshape(x, second),
    ),
    _law("squeeze of unsqueeze", lambda x, dim=int: x.unsqueeze(dim).squeeze(dim), lambda x: x),
    _law("cat of one", lambda x, dim=int: torch.cat([x], dim), lambda x: x),
    _law("copy over all = its source", lambda x, y: torch.ops.aten.copy(y, x), lambda x: x),
    _law(
        "two slice_scatters that fill = cat",
        lambda x, a, b, dim=int, n=int: torch.ops.aten.slice_scatter(
            torch.ops.aten.slice_scatter(x, a, dim, 0, n), b, dim, n, _END
        ),
        lambda a, b, dim: torch.cat((a, b), dim),
        check=_parts_fill,
    ),
]


def _merge_casts(program: Program, ctx: PassContext) -> int:
    """to(to(x, a), b) = to(x, b) where a holds every value of x's type, and to(x, x's type) = x."""
    matches = 0
    for node in list(program.graph.nodes):
        middle = cast_input(node)
        source = cast_input(middle) if middle is not None else None
        if middle is None or source is None:
            continue
        start, between, end = (n.meta[VAL].dtype for n in (source, middle, node))
        if not _holds(between, start) or not ctx.allow(node):
            continue
        if start == end:
            node.replace_all_uses_with(source)
        else:
            node.replace_all_uses_with(program.insert(torch.ops.aten._to_copy.default, source, before=node, dtype=end))
        matches += 1
        for used in (node, middle):
            if not used.users:
                _erase(used)
    return matches


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    return wide.is_floating_point and narrow.is_floating_point and torch.promote_types(wide, narrow) == wide


def _erase(node: fx.Node) -> None:
    node.graph.erase_node(node)
