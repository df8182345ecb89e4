"""Template sites: places in a graph where a target has a kernel of its own shape.

A target matches nodes with its matchers; a site says which tensors the template reads as memory, and everything
else about the problem. Sites are data: how a template is written in some language is the printer's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import sympy
import torch.fx as fx

from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.definitions import At, Definer
from irc.lowering.kernels.indexing import equal
from irc.lowering.kernels.kernel import Kernel, Origin
from irc.lowering.kernels.values import Value

# Layouts of dense tensors: axes from the slowest to the fastest.
LAYOUTS = {"channels_last": (0, 2, 3, 1)}

Finish = Callable[[Definer, Value, At], Value]


@dataclass(frozen=True)
class Site:
    """A node that a template computes.

    Attributes:
        kind: name of the template.
        node: whose value it gives.
        reads: nodes that it reads as memory, with the layout it needs: `rows` (dense, row-major), `strided` (any
            strides, last axis dense), or one of `LAYOUTS`.
        covers: further nodes that it stands for (a dequantized weight, say).
        problem: sizes and types, hashable; what a template is chosen and written by.
        order: axes of the result from slowest to fastest in memory (and of the matrix that an epilogue sees).
        finish: for a template with an epilogue: the node's value at an index, from what the template computed
            there (a bias added, say). Without: the template stores the result itself.
        columns: trailing axes of the result (in that order) that the epilogue gets in one piece.
    """

    kind: str
    node: fx.Node
    reads: tuple[tuple[fx.Node, str], ...]
    problem: Any
    covers: tuple[fx.Node, ...] = ()
    order: tuple[int, ...] | None = None
    finish: Finish | None = field(default=None, compare=False)
    columns: int = 1


class Matcher(Protocol):
    """Finds the site of a node."""

    def __call__(self, definer: Definer, node: fx.Node) -> Site | None: ...


@dataclass(frozen=True)
class Memory:
    """A value as it lies in memory: `buffer[start + Σ index · stride]`."""

    buffer: Buffer
    shape: At
    strides: At
    start: sympy.Expr


def bias_strides(bias: Memory, query: Memory) -> At:
    """Strides of batch, head, query and key of what is added to scores, 0 where it is broadcast.

    bias: [B|1, H|1, S|1, L], or [N|1, H|1, L] for flat tokens; query: [B, H, S, D] or [N, H, D]. A size of one may be
    an expression that says so only for the sizes that occur: what is not the whole size is one.
    """
    zero = sympy.Integer(0)
    outer = zip(bias.shape[:-1], bias.strides[:-1], query.shape[:-1], strict=True)
    found = [stride if equal(size, whole) else zero for size, stride, whole in outer]
    first = found if len(found) == 3 else [zero, found[1], found[0]]
    return (*first, bias.strides[-1])


@dataclass(frozen=True)
class TemplateCall:
    """A template in the schedule of a program.

    Attributes:
        reads: buffers in the order of `site.reads`, with the start of the data in elements.
        epilogue: what is done with each element `Local("acc")` of the result: a kernel of one store, whose outer axes
            together are the rows of the result seen as a matrix, and whose loop is its columns.
    """

    name: str
    site: Site
    reads: tuple[Memory, ...]
    write: Buffer
    epilogue: Kernel | None = None
    origins: tuple[Origin, ...] = ()

    @property
    def extra_reads(self) -> list[Buffer]:
        """What the epilogue reads."""
        return [] if self.epilogue is None else self.epilogue.reads


def first_match(matchers: Sequence[Matcher], definer: Definer, node: fx.Node) -> Site | None:
    """The site that the first matcher finds."""
    for matcher in matchers:
        found = matcher(definer, node)
        if found is not None:
            return found
    return None
