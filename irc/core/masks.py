"""Recognise attention masks by meaning: evaluate them at several sizes and say what they are.

A mask that depends on no data is a function of sizes alone. It is evaluated at small sizes and at
one beyond every integer constant that it is computed from (a window of 4096 looks causal at 40),
and must equal one kind of `irc.core.ops.attention.MASKS` everywhere; else it is refused with the
reason, and the caller keeps it as it is, as a bias.

Does not recognise: a mask that differs between batch entries or heads; one that reads input values
(see `irc.core.slices.data_dependent`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor

from irc.core.dims import Size
from irc.core.errors import IrcError
from irc.core.ops.attention import keep_mask
from irc.core.program import VAL, Program, is_size
from irc.core.row_evaluation import RowEvaluator, inputs_by_value
from irc.core.slices import evaluate_size

MASKED_BELOW = -1e9
"""An additive value at or below this gives weight 0 beside any unmasked key: exp(score - 1e9) underflows."""

_MAX_CONSTANT = 1 << 18
_MAX_WHOLE = 1 << 20
_SMALL_SIZES = (1, 2, 3, 5, 8)


@dataclass(frozen=True)
class MaskKind:
    """A mask that needs no tensor: `mask=` and `window=` of `irc.attention`."""

    kind: str
    window: int | None = None

    def __str__(self) -> str:
        return self.kind if self.window is None else f"{self.kind}({self.window})"


@dataclass(frozen=True)
class NotAMaskKind:
    """Why a tensor is no mask kind, and so has to stay a tensor."""

    reason: str


FULL = MaskKind("full")
CAUSAL = MaskKind("causal")


def recognise(
    program: Program,
    masks: fx.Node | Sequence[fx.Node],
    *,
    queries: Size,
    keys: Size,
    inverted: bool = False,
) -> MaskKind | NotAMaskKind:
    """The kind of a size-only mask over scores [..., queries, keys], or why it is none.

    Several masks mean all of them together. A bool mask keeps where true (`inverted`: drops where
    true); a float mask is added to the scores: 0 keeps, `MASKED_BELOW` or less drops.
    """
    nodes = [masks] if isinstance(masks, fx.Node) else list(masks)
    probes = _Probes(program, nodes, queries, keys)
    if probes.largest_constant > _MAX_CONSTANT:
        return NotAMaskKind(f"constant {probes.largest_constant} is too large to probe beyond")
    seen: list[_Sample] = []
    beyond: IrcError | None = None
    for length in probes.lengths():
        sample = probes.sample(length, inverted)
        if isinstance(sample, NotAMaskKind):
            return sample
        if isinstance(sample, _Sample):
            seen.append(sample)
        else:
            beyond = sample
    if not seen:
        return NotAMaskKind(f"it cannot be evaluated at any size tried: {beyond}")
    largest = max(seen, key=lambda sample: sample.length)
    if not probes.is_decisive(largest.length):
        return NotAMaskKind(f"it cannot be evaluated beyond its constants ({probes.largest_constant}): {beyond}")
    return _decide(seen, largest)


def _decide(seen: Sequence[_Sample], largest: _Sample) -> MaskKind | NotAMaskKind:
    """The one kind that equals every sample; else the nearest miss as the reason."""
    misses = []
    for kind in _candidates(largest):
        wrong = next((sample for sample in seen if not sample.equals(kind)), None)
        if wrong is None:
            return kind
        misses.append((largest.num_differences(kind), f"not {kind} at {wrong.describe_difference(kind)}"))
    nearest = min(misses)[1]
    return NotAMaskKind(f"it is none of full, causal, sliding, chunked ({nearest})")


def _candidates(sample: _Sample) -> Iterator[MaskKind]:
    """Kinds that the largest sample could be, the simplest first."""
    yield FULL
    if sample.num_keys < sample.num_queries:
        return
    yield CAUSAL
    last = sample.keep[-1]
    if sample.rows[-1] == sample.num_queries - 1 and bool(last.any()):
        yield MaskKind("sliding", int(last.sum()))
    offset = sample.num_keys - sample.num_queries
    for row, keep in zip(sample.rows, sample.keep, strict=True):
        position = row + offset
        if position > 0 and not bool(keep[0]) and bool(keep[position]):
            # The first row that starts a new chunk: its position is the chunk length.
            yield MaskKind("chunked", position)
            return


@dataclass(frozen=True)
class _Sample:
    """Rows of the mask at one size: `keep` bool[len(rows), num_keys]."""

    length: int
    rows: tuple[int, ...]
    num_queries: int
    num_keys: int
    keep: Tensor

    def expected(self, kind: MaskKind) -> Tensor | None:
        if kind.kind == "full":
            return torch.ones_like(self.keep)
        if self.num_keys < self.num_queries:
            return None
        positions = torch.tensor(self.rows) + (self.num_keys - self.num_queries)
        return keep_mask(kind.kind, kind.window, positions, torch.arange(self.num_keys))

    def equals(self, kind: MaskKind) -> bool:
        expected = self.expected(kind)
        return expected is not None and torch.equal(self.keep, expected)

    def num_differences(self, kind: MaskKind) -> int:
        expected = self.expected(kind)
        return self.keep.numel() if expected is None else int((self.keep != expected).sum())

    def describe_difference(self, kind: MaskKind) -> str:
        expected = self.expected(kind)
        if expected is None:
            return f"{self.num_queries} queries and {self.num_keys} keys"
        row, key = (int(i) for i in (self.keep != expected).nonzero()[0])
        return f"query {self.rows[row]} of {self.num_queries}, key {key} of {self.num_keys}"


class _Probes:
    """At which sizes, and which rows, masks have to be looked at."""

    def __init__(self, program: Program, nodes: list[fx.Node], queries: Size, keys: Size) -> None:
        self._program, self._nodes, self._queries, self._keys = program, nodes, queries, keys
        slice_nodes = backward_slice(nodes)
        constants = {abs(c) for c in _constants(program, slice_nodes) if abs(c) < 1 << 31}
        self._constants = sorted(constants)
        self.largest_constant = max(constants, default=0)
        self._table_sizes = {
            size for node in slice_nodes if node.op == "get_attr" for size in program.weight(node).shape if size > 1
        }
        self._queries_names = _names(program, queries)
        self._names = self._queries_names | _names(program, keys)
        self._rng = torch.Generator().manual_seed(0)

    def lengths(self) -> list[int]:
        """Sizes to try, ascending; a static mask has one."""
        if not self._names:
            return [0]
        far = 2 * self.largest_constant + 17
        return sorted({*_SMALL_SIZES, self.largest_constant + 3, far, *self._table_sizes})

    def is_decisive(self, length: int) -> bool:
        """True when a mask looked at there cannot change its kind at a larger size."""
        return not self._names or length > self.largest_constant or length == max(self._table_sizes, default=-1)

    def sizes(self, length: int) -> dict[str, int]:
        """Sizes of all dimensions: the mask's long, the rest (batch and such) short."""
        found = {}
        for name in self._program.dims:
            if name in self._queries_names:
                found[name] = length
            else:
                found[name] = length + 3 if name in self._names else 1 + length % 3
        return found

    def sample(self, length: int, inverted: bool) -> _Sample | NotAMaskKind | IrcError:
        """The mask at that length; an error when the program cannot have that length."""
        sizes = self.sizes(length)
        num_queries = evaluate_size(self._program, self._queries, sizes)
        num_keys = evaluate_size(self._program, self._keys, sizes)
        rows = self._rows(num_queries, num_keys)
        evaluator = RowEvaluator(self._program, sizes)
        keep = torch.ones((len(rows), num_keys), dtype=torch.bool)
        for node in self._nodes:
            try:
                value = evaluator.rows(node, rows)
            except (IrcError, RuntimeError, IndexError, ValueError) as error:
                return IrcError(f"{node.name} at {sizes}: {error}")
            part = _as_keep(value, inverted)
            if isinstance(part, NotAMaskKind):
                return part
            plane = part.reshape(-1, *part.shape[-2:]) if part.ndim > 2 else part.unsqueeze(0)
            if not torch.equal(plane, plane[:1].expand_as(plane)):
                return NotAMaskKind(f"it differs between batch entries or heads at {sizes}")
            keep = keep & plane[0]
        return _Sample(length, rows, num_queries, num_keys, keep)

    def _rows(self, num_queries: int, num_keys: int) -> tuple[int, ...]:
        if num_queries * num_keys <= _MAX_WHOLE:
            return tuple(range(num_queries))
        chosen = {0, 1, 2, num_queries - 2, num_queries - 1}
        for constant in self._constants:
            chosen.update(range(constant - 2, constant + 3))
        chosen.update(torch.randint(num_queries, (16,), generator=self._rng).tolist())
        return tuple(sorted(row for row in chosen if 0 <= row < num_queries))


def _as_keep(value: Tensor, inverted: bool) -> Tensor | NotAMaskKind:
    """bool: where the mask lets a key through."""
    if value.dtype == torch.bool:
        return ~value if inverted else value
    if not value.is_floating_point():
        return NotAMaskKind(f"it has type {value.dtype}")
    keep, drop = value == 0, value <= MASKED_BELOW
    if not bool((keep | drop).all()):
        odd = value[~(keep | drop)][0].item()
        return NotAMaskKind(f"it holds {odd:.6g}, which is neither 0 nor a mask value")
    return keep


def backward_slice(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes and all that they are computed from; sizes are included but not what they come from."""
    found: dict[fx.Node, None] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            if not is_size(node):
                pending.extend(inputs_by_value(node))
    return list(found)


def _constants(program: Program, nodes: Iterable[fx.Node]) -> Iterator[int]:
    """Whole numbers that could be a window: literals, parts of size expressions, short integer weights."""
    for node in nodes:
        value = node.meta.get(VAL)
        if isinstance(value, (torch.SymInt, torch.SymBool)):
            yield from (int(atom) for atom in value.node.expr.atoms(sympy.Integer))
        if node.op == "get_attr":
            weight = program.weight(node)
            if weight.numel() <= 64 and weight.dtype != torch.bool and not weight.is_complex():
                yield from _literals(weight.flatten().tolist())
        else:
            yield from _literals(node.args)
            yield from _literals(node.kwargs)


def _literals(value: Any) -> Iterator[int]:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield value
    elif isinstance(value, float):
        # A large float is a fill value, not a window.
        if value.is_integer() and abs(value) <= _MAX_CONSTANT:
            yield int(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _literals(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _literals(item)


def _names(program: Program, size: Size) -> set[str]:
    return {str(symbol) for symbol in program.expr(size).free_symbols}
