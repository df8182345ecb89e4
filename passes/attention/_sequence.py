"""Which input holds the tokens, and which of its dimensions is the sequence: found by structure."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
import torch.fx as fx
from torch import Tensor

from irc.core.dims import Dim, dim_symbol
from irc.core.errors import PassError
from irc.core.operands import input_node
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program


@dataclass(frozen=True)
class Sequence:
    """The tokens' placeholder and its dimensions.

    Attributes:
        tokens: the placeholder.
        dim: S, the sequence dimension.
        batch: B, or None when the program was captured with a batch of exactly one.
        axis, batch_axis: where they are in the placeholder.
    """

    tokens: fx.Node
    dim: Dim
    batch: Dim | None
    axis: int
    batch_axis: int

    @property
    def name(self) -> str:
        return self.dim.name

    @property
    def symbol(self) -> sympy.Symbol:
        return dim_symbol(self.dim.name)

    @property
    def batch_symbol(self) -> sympy.Symbol:
        """B's symbol; one that occurs nowhere when the batch is fixed."""
        return dim_symbol(self.batch.name) if self.batch is not None else sympy.Dummy("batch")

    @property
    def batch_size(self) -> int | torch.SymInt:
        return self.batch.size if self.batch is not None else 1

    @property
    def batch_expr(self) -> sympy.Expr:
        return dim_symbol(self.batch.name) if self.batch is not None else sympy.Integer(1)


def is_attention(node: fx.Node) -> bool:
    """Whether the node is canonical attention, whole or memory-efficient."""
    return is_irc_op(node.target, "attention") or is_irc_op(node.target, "flash_attention")


def attention_nodes(program: Program) -> list[fx.Node]:
    """All canonical attentions, in order."""
    return [
        n for n in program.graph.nodes if is_irc_op(n.target, "attention") or is_irc_op(n.target, "flash_attention")
    ]


def find_sequence(program: Program, tokens: str | None = None) -> Sequence:
    """The sequence that the program's attentions attend over.

    Raises:
        PassError: there is no attention, its length is fixed or shared by no input, or the named input
            does not hold it.
    """
    nodes = attention_nodes(program)
    if not nodes:
        raise PassError("the program has no irc.attention: nothing to cache (is it a decoder, and canonicalized?)")
    if any(n.kwargs.get("positions") is not None for n in nodes):
        raise PassError("the program already has a cache: its attentions have positions")
    lengths = {program.shape_expr(input_node(n))[2] for n in nodes}
    named = {dim_symbol(d.name): d for d in program.dims.values()}
    if len(lengths) > 1:
        raise PassError(
            f"attentions run over different sequences ({', '.join(sorted(map(str, lengths)))}):"
            " encoder-decoder models have no single step"
        )
    length = lengths.pop()
    if length not in named:
        raise PassError(f"attention runs over a fixed length {length}: capture with a dynamic sequence dimension")
    dim = named[length]
    candidates = []
    for node in program.placeholders:
        value = node.meta[VAL]
        if not isinstance(value, Tensor) or not node.users or tokens not in (None, str(node.target)):
            continue
        axes = [i for i, size in enumerate(program.shape_expr(node)) if size == length]
        if len(axes) == 1:
            candidates.append((node, axes[0]))
    if len(candidates) != 1:
        found = ", ".join(str(n.target) for n, _ in candidates) or "none"
        wanted = f"named {tokens!r} " if tokens else ""
        raise PassError(f"expected one used input {wanted}with sequence dimension {dim.name}, found: {found}")
    node, axis = candidates[0]
    batch_expr = program.shape_expr(input_node(nodes[0]))[0]
    batch = named.get(batch_expr)
    if batch is None and batch_expr != 1:
        raise PassError(f"the batch is fixed at {batch_expr}: capture with a dynamic batch, or a batch of one")
    axes = [i for i, size in enumerate(program.shape_expr(node)) if size == batch_expr and i != axis]
    if not axes:
        raise PassError(f"input {node.target} has no batch dimension {batch_expr}")
    return Sequence(node, dim, batch, axis, axes[0])
