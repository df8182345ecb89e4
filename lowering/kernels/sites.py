"""Template sites: places in a graph where a target has a kernel of its own shape.

A target matches nodes with its matchers; a site says which tensors the template reads as memory, and everything
else about the problem. Sites are data: how a template is written in some language is the printer's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.fx as fx

from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.kernel import Origin
from irc.lowering.kernels.values import Value


@dataclass(frozen=True)
class Site:
    """A node that a template computes.

    Attributes:
        kind: name of the template.
        node: whose value it gives.
        reads: nodes that it reads as memory, with the layout it needs: `rows` (dense, row-major) or `strided` (any
            strides, last axis dense).
        covers: further nodes that it stands for (a dequantized weight, say).
        problem: sizes and types, hashable; what a template is chosen and written by.
        order: axes of the result from slowest to fastest in memory.
        fuses: whether an elementwise continuation of the result can be computed inside.
        weights: names of weights that the template packs for itself.
    """

    kind: str
    node: fx.Node
    reads: tuple[tuple[fx.Node, str], ...]
    problem: Any
    covers: tuple[fx.Node, ...] = ()
    order: tuple[int, ...] | None = None
    fuses: bool = False
    weights: tuple[str, ...] = ()


class Matcher(Protocol):
    """Finds the site of a node."""

    def __call__(self, definer: Definer, node: fx.Node) -> Site | None: ...


@dataclass(frozen=True)
class TemplateCall:
    """A template in the schedule of a program.

    Attributes:
        reads: buffers in the order of `site.reads`, with the start of the data in elements.
        epilogue: what is stored instead of the result `Local("acc")`, over `row` and `column` of the result seen as
            a matrix.
    """

    name: str
    site: Site
    reads: tuple[tuple[Buffer, Any], ...]
    write: Buffer
    epilogue: Value | None = None
    epilogue_axes: tuple[Any, ...] = ()
    extra_reads: tuple[Buffer, ...] = ()
    origins: tuple[Origin, ...] = ()
    notes: tuple[str, ...] = field(default=())


def first_match(matchers: Sequence[Matcher], definer: Definer, node: fx.Node) -> Site | None:
    """The site that the first matcher finds."""
    for matcher in matchers:
        found = matcher(definer, node)
        if found is not None:
            return found
    return None
