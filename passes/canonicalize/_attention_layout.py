"""Head layout by meaning: which tensor [B, Hkv, T, D] lies under an operand of attention.

Between the projection of keys and the attention there are views, transposes, and the repetition of
key-value heads, in a dozen spellings. All of them only move data, so they are run on numbered
elements: a tensor further up *is* the un-repeated operand exactly if repeating its heads gives the
same numbers in the same places.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.dims import Size
from irc.core.errors import IrcError
from irc.core.operands import apply_op
from irc.core.ops.attention import repeat_heads
from irc.core.program import VAL, Program
from irc.core.row_evaluation import RowEvaluator

aten = torch.ops.aten

_MOVES = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.expand.default, aten.clone.default,
    aten.contiguous.default, aten.alias.default, aten.transpose.int, aten.permute.default, aten.t.default,
    aten.mT.default, aten.numpy_T.default, aten.movedim.int, aten.movedim.intlist, aten.swapaxes.default,
    aten.repeat.default, aten.repeat_interleave.self_int, aten.index_select.default, aten.index.Tensor,
    aten.flatten.using_ints, aten.unflatten.int, aten.tile.default, aten.expand_as.default,
    aten.view_as.default, aten.broadcast_to.default, aten.detach.default,
})  # fmt: skip
_MAX_PATH = 16
Equal = Callable[[Tensor, Tensor], bool]


@dataclass(frozen=True)
class Heads:
    """A tensor and how to see it as [B, H, T, D]; `factor`: a constant it was multiplied with on the way."""

    node: fx.Node
    layout: str
    factor: float = 1.0

    @property
    def num_heads(self) -> Size:
        """Size of the head axis; 1 if there is none."""
        return self.node.meta[VAL].shape[self.layout.index("h")] if "h" in self.layout else 1

    @property
    def batch(self) -> Size:
        """Size of the batch axis; 1 if there is none."""
        return self.node.meta[VAL].shape[self.layout.index("b")] if "b" in self.layout else 1

    def materialise(self, program: Program, before: fx.Node) -> fx.Node:
        """The [B, H, T, D] node, inserted in front of `before` if need be."""
        node, order = self.node, _order(self.layout)
        swapped = [i for i, axis in enumerate(order) if axis != i]
        if len(swapped) == 2:
            node = program.insert(aten.transpose.int, node, *swapped, before=before)
        elif swapped:
            node = program.insert(aten.permute.default, node, order, before=before)
        for axis in _missing_axes(self.layout):
            node = program.insert(aten.unsqueeze.default, node, axis, before=before)
        return node


def _order(layout: str) -> list[int]:
    return [layout.index(axis) for axis in "bhtd" if axis in layout]


def _missing_axes(layout: str) -> list[int]:
    return [i for i, axis in enumerate("bhtd") if axis not in layout]


def _as_heads(x: Tensor, layout: str) -> Tensor:
    x = x.permute(_order(layout))
    for axis in _missing_axes(layout):
        x = x.unsqueeze(axis)
    return x


def _all_layouts(axes: str, *first: str) -> tuple[str, ...]:
    """Every order of the axes, the usual ones first."""
    return (*first, *sorted({"".join(p) for p in itertools.permutations(axes)} - set(first)))


_LAYOUTS = {
    4: _all_layouts("bhtd", "bhtd", "bthd", "bhdt"),
    3: _all_layouts("btd", "btd", "bdt"),
    2: _all_layouts("td", "td"),
}


@dataclass(frozen=True)
class Step:
    """One operation of the path from a source to an operand: a move of data, or a constant factor."""

    node: fx.Node
    source: fx.Node
    factor: float | None = None


class Layouts:
    """Finds sources of operands in one program (as it is before rewriting)."""

    def __init__(self, program: Program, tainted: set[fx.Node]) -> None:
        self._program, self._tainted = program, tainted
        self._sizes = [{name: dim.hint for name, dim in program.dims.items()}]
        self._sizes.append({name: 2 + 3 * i for i, name in enumerate(program.dims)})

    def constant(self, value: Any) -> float | None:
        """A number that neither input, size nor trainable weight can change; None for anything else."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, fx.Node) or value in self._tainted:
            return None
        known = value.meta.get(VAL)
        if isinstance(known, (int, float)) and not isinstance(known, bool):
            return float(known)
        if not isinstance(known, Tensor) or known.numel() != 1 or self._reads_parameter(value):
            return None
        try:
            return float(RowEvaluator(self._program, {}).whole(value).item())
        except IrcError:
            return None

    def fill_value(self, node: Any) -> float | None:
        """The one value of a tensor (or number) all over, if it is such."""
        if not isinstance(node, fx.Node):
            return self.constant(node)
        if node.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
            return 0.0
        if node.target in (aten.full.default, aten.full_like.default):
            return self.constant(node.args[1])
        return self.constant(node)

    def _reads_parameter(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return isinstance(self._program.weight(node), torch.nn.Parameter)
        return any(self._reads_parameter(used) for used in node.all_input_nodes)

    def find(
        self,
        operand: fx.Node,
        *,
        order: Sequence[int] | None = None,
        num_heads: int | None = None,
        stored_heads: int | None = None,
    ) -> Heads | None:
        """The source of an operand [.., T, D] (which it is after permuting its axes by `order`).

        Of several the one of the fewest elements, which is the one before heads were repeated.
        `num_heads`: heads of the scores, needed when a 3-D operand [B·H, T, D] may repeat heads.
        `stored_heads`: heads that the source must have; None: as few as there are.
        """
        path = list(self._path(operand))
        best: tuple[tuple[int, int, int], Heads] | None = None
        factor = 1.0
        for depth in range(len(path) + 1):
            source = operand if depth == 0 else path[depth - 1].source
            if depth:
                factor *= path[depth - 1].factor or 1.0
            layouts = _LAYOUTS.get(source.meta[VAL].ndim, ())
            runs = self._runs(path[:depth], source, operand) if layouts else None
            for preference, layout in enumerate(layouts if runs is not None else ()):
                if not all(_proves(numbers, moved, layout, order, num_heads) for numbers, moved in runs or ()):
                    continue
                found = Heads(source, layout, factor)
                if stored_heads is not None and found.num_heads != stored_heads:
                    continue
                # Fewest elements, then a 4-D tensor in the wanted layout, then the nearest to the operand.
                rank = (self._numel(source), preference + 24 * (4 - source.meta[VAL].ndim), depth)
                if best is None or rank < best[0]:
                    best = rank, found
        return best[1] if best else None

    def equals_moved(self, operand: fx.Node, source_ndim: int, equal: Equal) -> fx.Node | None:
        """The nearest tensor of that rank above `operand` with equal(it, operand), by moves alone."""
        path = list(self._path(operand))
        for depth in range(len(path) + 1):
            source = operand if depth == 0 else path[depth - 1].source
            if any(step.factor is not None for step in path[:depth]):
                return None
            if source.meta[VAL].ndim != source_ndim:
                continue
            runs = self._runs(path[:depth], source, operand)
            if runs is not None and all(equal(numbers, moved) for numbers, moved in runs):
                return source
        return None

    def _path(self, operand: fx.Node) -> Iterator[Step]:
        node = operand
        for _ in range(_MAX_PATH):
            step = self._step(node)
            if step is None:
                return
            yield step
            node = step.source

    def _step(self, node: fx.Node) -> Step | None:
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        source = node.args[0]
        if node.target in _MOVES:
            others = [n for n in node.all_input_nodes if n is not source]
            return (
                None
                if any(n in self._tainted for n in others if n.target is not aten.sym_size.int)
                else Step(node, source)
            )
        if node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
            return self._scaling(node)
        return None

    def _scaling(self, node: fx.Node) -> Step | None:
        left, right = node.args[0], node.args[1]
        divides = node.target in (aten.div.Tensor, aten.div.Scalar)
        for source, other in ((left, right), (right, left)):
            constant = self.constant(other)
            if constant and isinstance(source, fx.Node) and node.meta[VAL].ndim == source.meta[VAL].ndim:
                if node.meta[VAL].dtype != source.meta[VAL].dtype:
                    return None
                return Step(node, source, 1.0 / constant if divides else constant)
            if divides:
                return None
        return None

    def _numel(self, node: fx.Node) -> int:
        count = 1
        for size in RowEvaluator(self._program, self._sizes[0]).shape(node):
            count *= size
        return count

    def _runs(self, path: list[Step], source: fx.Node, operand: fx.Node) -> list[tuple[Tensor, Tensor]] | None:
        """(numbered elements of the source, where the path moves them) at each of the sizes.

        None if that is no proof: the program cannot have these sizes, or the result has another shape.
        """
        found = []
        for sizes in self._sizes:
            evaluator = RowEvaluator(self._program, sizes)
            shape = evaluator.shape(source)
            numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
            moved = numbers
            try:
                for step in reversed(path):
                    if step.factor is None:
                        moved = _move(step.node, moved, evaluator)
            except RuntimeError:
                return None
            if tuple(moved.shape) != evaluator.shape(operand):
                return None
            found.append((numbers, moved))
        return found


def _proves(x: Tensor, moved: Tensor, layout: str, order: Sequence[int] | None, num_heads: int | None) -> bool:
    """Whether the elements of x [the axes of `layout`], heads repeated, lie where `moved` has them."""
    heads = _as_heads(x, layout)
    moved = moved if order is None else moved.permute(tuple(order))
    if heads.shape[2:] != moved.shape[-2:]:
        return False
    wanted = _heads_of(moved.shape, heads.shape, num_heads)
    if wanted is None or wanted % heads.shape[1]:
        return False
    return torch.equal(repeat_heads(heads, wanted).reshape(moved.shape), moved)


def _heads_of(shape: torch.Size, heads_shape: torch.Size, num_heads: int | None) -> int | None:
    """Heads that an operand of `shape` has, given the batch of the candidate source."""
    if len(shape) == 4:
        return shape[1] if shape[0] == heads_shape[0] else None
    if len(shape) == 3:
        wanted = num_heads if num_heads is not None else heads_shape[1]
        return wanted if heads_shape[0] * wanted == shape[0] else None
    return 1 if heads_shape[:2] == (1, 1) else None


def _move(node: fx.Node, value: Tensor, evaluator: RowEvaluator) -> Tensor:
    """Run one data movement on other data."""
    source: Any = node.args[0]
    rest: Any
    kwargs: Any
    rest, kwargs = fx.map_arg((node.args[1:], node.kwargs), lambda n: value if n is source else evaluator.whole(n))
    if node.target is aten.view.default:
        # Strides of the numbers need not be those of the real tensor.
        return value.reshape(rest[0])
    return apply_op(node, value, *rest, **kwargs)
