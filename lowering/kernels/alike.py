"""Nodes that are alike in layer after layer, so that what is worked out about indices in one layer serves them all.

A Llama of 30 layers has 30 times the same index expressions, over symbols named after each layer's own nodes. Given the
names of the first layer's, the expressions are equal, and results that are kept by expression are found again.

That is right as long as no kernel computes two nodes of one name: an index of the one would stand for an index of the
other. `Names.meet` sees to it, and the program is scheduled again with every node's own name where it finds such a
kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch.fx as fx
from torch import Tensor

from irc.core.program import VAL, Program

# Operations of a layer. What repeats after fewer is mostly in one kernel.
_MIN_PERIOD, _MAX_PERIOD = 8, 2048


class NamesMeet(Exception):
    """One kernel computes two nodes that share a name."""


class Names:
    """What symbols of nodes are named after: the node itself, or the one in its place in the first of alike layers."""

    def __init__(self, shared: Mapping[str, str] | None = None) -> None:
        self._shared = shared or {}

    @staticmethod
    def of(program: Program) -> Names:
        """Names shared among layers that follow one another."""
        nodes = list(program.operations())
        kinds: dict[object, int] = {}
        keys = np.array([kinds.setdefault(_kind(program, node), len(kinds)) for node in nodes], dtype=np.int64)
        shared: dict[str, str] = {}
        ranges = [(0, len(nodes))]
        while ranges:
            low, high = ranges.pop()
            found = _repeated(keys[low:high])
            if found is None:
                continue
            start, length, period = found[0] + low, found[1], found[2]
            for place in range(period, length):
                shared[nodes[start + place].name] = nodes[start + place % period].name
            ranges += [(low, start), (start + length, high)]
        return Names(shared)

    def __bool__(self) -> bool:
        return bool(self._shared)

    def of_node(self, node: fx.Node) -> str:
        return self._shared.get(node.name, node.name)

    def meet(self, together: Iterable[str]) -> None:
        """A kernel computes the nodes of these names.

        Raises:
            NamesMeet: two of them share a name.
        """
        nodes = set(together)
        if len({self._shared.get(name, name) for name in nodes}) < len(nodes):
            raise NamesMeet


def _kind(program: Program, node: fx.Node) -> object:
    """Equal for operations that do the same to values of the same types."""

    def described(value: object) -> object:
        if isinstance(value, fx.Node):
            known = value.meta.get(VAL)
            return _types(known) if isinstance(known, (Tensor, tuple, list)) else str(known)
        if isinstance(value, (list, tuple)):
            return tuple(described(item) for item in value)
        return (type(value).__name__, str(value))

    own = node.meta.get(VAL)
    options = tuple((name, described(value)) for name, value in node.kwargs.items())
    return str(node.target), described(node.args), options, _types(own) if own is not None else None


def _types(value: object) -> object:
    if isinstance(value, Tensor):
        return value.dtype, tuple(str(size) for size in value.shape)
    return tuple(_types(one) for one in value) if isinstance(value, (list, tuple)) else str(value)


def _repeated(keys: np.ndarray) -> tuple[int, int, int] | None:
    """(start, length, period) of the longest stretch that repeats itself; None: there is none."""
    best: tuple[int, int, int] | None = None
    for period in range(_MIN_PERIOD, min(len(keys) // 2, _MAX_PERIOD) + 1):
        same = np.concatenate(([False], keys[period:] == keys[:-period], [False]))
        edges = np.flatnonzero(same[1:] != same[:-1])
        lengths = edges[1::2] - edges[::2]
        if len(lengths) == 0:
            continue
        longest = int(lengths.argmax())
        repeated = int(lengths[longest])
        if repeated >= period and (best is None or repeated + period > best[1]):
            best = int(edges[2 * longest]), repeated + period, period
    return best
