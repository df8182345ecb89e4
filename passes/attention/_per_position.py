"""Proof that a program works per position: what makes a key-value cache legal.

Every value that depends on the tokens is walked in order. Its *token layout* says which dimension
carries the sequence: of size outer·S·inner, row-major, so that `[B, S, E]`, `[B·S, E]` and
`[B·S·k, E]` (experts) are all understood. Only ops known to keep positions apart are let through
(`_per_position_rules`); attention is the one that may mix them. Everything else is
refused with node, reason and user line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch.fx as fx
from torch import Tensor

from irc.core.contract import Skip
from irc.core.program import VAL, Program, is_size
from irc.passes.attention._sequence import Sequence, is_attention


@dataclass(frozen=True)
class Token:
    """Dimension `dim` has size outer·S·inner; `inner` consecutive entries belong to one position."""

    dim: int
    inner: sympy.Expr = sympy.S.One


Layout = Token | None | tuple["Token | None", ...]


Rule = Callable[["Walk", fx.Node], Layout]


class Refusal(Exception):
    """An op cannot be shown to work per position; carries the reason."""


@dataclass
class Walk:
    """State of the walk over a program's data-dependent nodes.

    `operand` gives the layout of a size-only operand (a table indexed by position, or None when it is
    the same at every position), or refuses it; `identity` says how often each flat token is repeated
    by a size-only index (`arange(B·S·k) // k` → k), or None when it is no such index. `gathers` lists
    (user, operand) pairs where the operand is a table that the step must gather by position.
    """

    program: Program
    sequence: Sequence
    data: set[fx.Node]
    operand: Callable[[fx.Node, sympy.Expr | None], Token | None]
    identity: Callable[[fx.Node, sympy.Expr], sympy.Expr | None]
    attention: Callable[[Walk, fx.Node], Token]
    rule_for: Callable[[fx.Node], Rule]
    current: fx.Node | None = None
    gathers: dict[tuple[fx.Node, fx.Node], Token] = field(default_factory=dict)
    layouts: dict[fx.Node, Layout] = field(default_factory=dict)
    problems: list[Skip] = field(default_factory=list)
    poisoned: set[fx.Node] = field(default_factory=set)

    # ------------------------------------------------------------ looking

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        return self.program.shape_expr(node)

    def carries(self, size: sympy.Expr) -> bool:
        return self.sequence.symbol in size.free_symbols

    def mixes(self, size: sympy.Expr) -> str | None:
        """Name of the dimension that an op over a dimension of this size would mix, if any."""
        if self.carries(size):
            return f"the sequence dimension {self.sequence.name}"
        if self.sequence.batch_symbol in size.free_symbols:
            return "the batch dimension"
        return None

    def layout(self, arg: Any, inner: sympy.Expr | None = None) -> Token | None:
        """Layout of a tensor operand; size-only operands are classified on the way."""
        if not isinstance(arg, fx.Node) or is_size(arg):
            return None
        if arg in self.data:
            found = self.layouts[arg]
            if isinstance(found, tuple):
                raise Refusal("uses a tuple where a tensor is expected")
            return found
        token = self.operand(arg, inner)
        if token is not None and self.current is not None:
            self.gathers[self.current, arg] = token
        return token

    def layouts_of(self, args: Any) -> dict[fx.Node, Token]:
        """Layouts of all tensor operands that carry the sequence; data first, they settle `inner`."""
        nodes = list(dict.fromkeys(_tensor_nodes(args)))
        found: dict[fx.Node, Token] = {}
        inner: sympy.Expr | None = None
        for node in sorted(nodes, key=lambda n: n not in self.data):
            token = self.layout(node, inner)
            if token is not None:
                found[node] = token
                inner = token.inner
        return found

    def token_dims(self, value: Any) -> list[int]:
        sizes = [self.program.expr(size) for size in value.shape]
        return [i for i, size in enumerate(sizes) if self.carries(size)]

    # ------------------------------------------------------------ walking

    def run(self) -> None:
        """Fill `layouts` and `problems`; what follows a refused node is not reported again."""
        masks = self._only_for_masks()
        for node in self.program.graph.nodes:
            if node not in self.data or node.op != "call_function" or node in masks:
                continue
            if any(i in self.poisoned for i in node.all_input_nodes):
                self.poisoned.add(node)
                continue
            self.current = node
            try:
                self.layouts[node] = self._check(node, self.rule_for(node)(self, node))
            except Refusal as refusal:
                self.problems.append(Skip.at(node, f"{node.target} {refusal}"))
                self.poisoned.add(node)

    def _only_for_masks(self) -> set[fx.Node]:
        """Values that end as an attention's mask: the attention is the place to judge them."""
        found: set[fx.Node] = set()
        for node in reversed(self.program.graph.nodes):
            ends = [u in found or (is_attention(u) and node not in u.args[:3]) for u in node.users]
            if node in self.data and node.op == "call_function" and ends and all(ends):
                found.add(node)
        return found

    def _check(self, node: fx.Node, layout: Layout) -> Layout:
        """The result's shape must say the same as the rule: exactly one dimension carries S, that one."""
        value = node.meta[VAL]
        pairs = zip(value, layout, strict=True) if isinstance(layout, tuple) else [(value, layout)]
        for part, token in pairs:
            if token is None or not isinstance(part, Tensor):
                continue
            dims = self.token_dims(part)
            if dims != [token.dim]:
                if len(dims) > 1:
                    raise Refusal(
                        f"pairs positions with positions (result {list(self.shape(node))}); only attention may"
                    )
                raise Refusal(f"loses track of {self.sequence.name} in its result")
        return layout


def _tensor_nodes(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(args, lambda n: found.append(n) if not is_size(n) else None)
    return found
