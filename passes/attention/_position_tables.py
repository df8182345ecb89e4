"""Size-only values that the tokens meet: tables indexed by position, constants, or token counts.

Position ids, rotary tables, learned positions and ALiBi biases depend on no token. They are evaluated
for the whole cache length once; a step then gathers its rows by `positions`. That is right only if the
table does not change when the sequence grows: `table(L)[:s] == table(s)`, checked here, along with
independence of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import sympy
import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import IrcError
from irc.core.program import VAL, Program, is_size
from irc.core.slices import evaluate_at, evaluate_size, integer_constants
from irc.passes.attention._per_position import Refusal, Token
from irc.passes.attention._sequence import Sequence, attention_nodes

DEFAULT_LENGTH = 512
_PROBES = (2, 3, 5, 8)
_MASKING = 1e9


@dataclass(frozen=True)
class Table:
    """Values by position: `values` is [L, inner, *rest], `rest` the other dimensions (batch as 1).

    `token` tells where positions were in the original tensor of `rank` dimensions, `outer` whether the
    batch shared that dimension, `batch_dim` where the batch was otherwise (None: nowhere).
    """

    values: Tensor
    token: Token
    rank: int
    outer: bool
    batch_dim: int | None


@dataclass(frozen=True)
class BiasTable:
    """A size-only attention bias for the whole cache: [1, H, L|1, L|1]; `causal`: it masks all later keys."""

    values: Tensor
    by_row: bool
    causal: bool


@dataclass
class Tables:
    """Evaluates and classifies size-only operands; `found` and `biases` are what the rewrite uses."""

    program: Program
    sequence: Sequence
    data: set[fx.Node]
    length: int
    found: dict[fx.Node, Table] = field(default_factory=dict)
    biases: dict[fx.Node, BiasTable] = field(default_factory=dict)
    _verdicts: dict[fx.Node, Token | Refusal | None] = field(default_factory=dict)
    _depends: dict[fx.Node, bool] = field(default_factory=dict)

    # ------------------------------------------------------------ questions of the walk

    def depends_on_length(self, node: fx.Node) -> bool:
        """Whether the value or the shape of a size-only node changes with S."""
        if node not in self._depends:
            if is_size(node):
                size = self.program.expr(node.meta[VAL])
                self._depends[node] = self.sequence.symbol in size.free_symbols
            else:
                self._depends[node] = any(self.depends_on_length(i) for i in node.all_input_nodes)
        return self._depends[node]

    def operand(self, node: fx.Node, inner: sympy.Expr | None) -> Token | None:
        """Layout of a size-only operand, None if it is the same at every position. Refuses all else."""
        if not self.depends_on_length(node):
            return None
        if node not in self._verdicts:
            try:
                self._verdicts[node] = self._classify(node)
            except Refusal as refusal:
                self._verdicts[node] = refusal
        verdict = self._verdicts[node]
        if isinstance(verdict, Refusal):
            raise verdict
        return verdict

    def identity(self, node: fx.Node, size: sympy.Expr) -> sympy.Expr | None:
        """k, if the index names every one of `size` flat tokens k times in order; else None."""
        repeats = set()
        for length in _PROBES:
            value, count = self._value(node, 2, length), self._number(size, 2, length)
            k, rest = divmod(value.numel(), count)
            expected = torch.arange(value.numel()) // max(k, 1)
            if rest or k == 0 or value.dtype == torch.bool or not torch.equal(value.flatten().cpu(), expected):
                return None
            repeats.add(k)
        return sympy.Integer(repeats.pop()) if len(repeats) == 1 else None

    def bias(self, node: fx.Node, *, shiftable: bool) -> BiasTable | None:
        """The bias over the whole cache; None if it does not depend on the length.

        `shiftable`: a number added to a whole row of scores changes nothing (softmax without sinks).
        """
        if not self.depends_on_length(node):
            return None
        if node not in self.biases:
            self.biases[node] = self._bias(node, shiftable)
        return self.biases[node]

    # ------------------------------------------------------------ classification

    def _classify(self, node: fx.Node) -> Token | None:
        shape = self.program.shape_expr(node)
        dims = [i for i, size in enumerate(shape) if self.sequence.symbol in size.free_symbols]
        if len(dims) > 1:
            raise Refusal(f"uses {node.name} {list(shape)}, which pairs positions with positions")
        if not dims:
            first, *others = [self._value(node, 2, s) for s in (*self._lengths(node), self.length)]
            if all(_same(first, other) for other in others):
                return None
            raise Refusal(f"uses {node.name}, whose value changes with the sequence length")
        dim = dims[0]
        if self._is_uniform(node, dim):
            return None
        share = sympy.cancel(shape[dim] / self.sequence.symbol)
        batch = self.sequence.batch_symbol
        outer = batch in share.free_symbols
        inner = sympy.cancel(share / batch) if outer else share
        if self.sequence.symbol in inner.free_symbols or batch in inner.free_symbols:
            raise Refusal(f"uses {node.name} {list(shape)}, in which positions cannot be told apart")
        batch_dims = [i for i, size in enumerate(shape) if i != dim and batch in size.free_symbols]
        token = Token(dim, inner)
        rows = self._rows(node, self.length, token, outer, batch_dims, batch_size=1)
        for length in self._lengths(node):
            part = self._rows(node, length, token, outer, batch_dims, batch_size=2)
            if not _same(rows[:length], part):
                raise Refusal(
                    f"uses {node.name}, a table that changes as the sequence grows (at length {length} its first"
                    f" {length} rows differ from those at length {self.length}): a cached key would go stale"
                )
        values = rows if inner != 1 else rows.squeeze(1)
        self.found[node] = Table(values.contiguous(), token, len(shape), outer, batch_dims[0] if batch_dims else None)
        return token

    def _rows(
        self, node: fx.Node, length: int, token: Token, outer: bool, batch_dims: list[int], *, batch_size: int
    ) -> Tensor:
        """[S, inner, *rest] of one sequence; refuses a table that differs between sequences."""
        value = self._value(node, batch_size, length)
        for dim in batch_dims:
            first = value.narrow(dim, 0, 1)
            if not _same(first.expand_as(value), value):
                raise Refusal(f"uses {node.name}, which differs between the sequences of a batch")
            value = first
        moved = value.movedim(token.dim, 0)
        moved = moved.reshape(batch_size if outer else 1, length, int(token.inner), *moved.shape[1:])
        if not _same(moved[:1].expand_as(moved), moved):
            raise Refusal(f"uses {node.name}, which differs between the sequences of a batch")
        return moved[0]

    def _is_uniform(self, node: fx.Node, dim: int) -> bool:
        """One value along positions and at every length: kept as it is, whatever its length is then."""
        seen: Tensor | None = None
        for length in (*self._lengths(node), self.length):
            value = self._value(node, 2, length)
            first = value.narrow(dim, 0, 1)
            seen = first if seen is None else seen
            if not _same(first.expand_as(value), value) or not _same(first, seen):
                return False
        return True

    def _bias(self, node: fx.Node, shiftable: bool) -> BiasTable:
        # Sizes are taken from values: `64 - max(0, 64 - S)` is S for every length that there is.
        probes = {length: self._value(node, 2, length) for length in self._lengths(node)}
        full = self._value(node, 1, self.length)
        carried = [i for i in range(full.ndim) if any(v.shape[i] != full.shape[i] for v in probes.values()) and i > 0]
        fits = all(v.shape[i] == length for length, v in probes.items() for i in carried)
        if full.ndim != 4 or not fits or any(i not in (2, 3) or full.shape[i] != self.length for i in carried):
            shape = list(self.program.shape_expr(node))
            raise Refusal(f"has a bias {node.name} {shape} that is not over queries and keys")
        if shiftable:
            full = _from_first_key(full)
        for length, value in probes.items():
            part = full
            for dim in carried:
                part = part.narrow(dim, 0, length)
            if not _same(part.expand_as(value), _from_first_key(value) if shiftable else value):
                raise Refusal(f"has a bias {node.name} that changes as the sequence grows or differs between sequences")
        return BiasTable(full.contiguous(), 2 in carried, carried == [2, 3] and _masks_later_keys(full))

    # ------------------------------------------------------------ evaluation

    def _lengths(self, node: fx.Node) -> list[int]:
        """Lengths to probe: small ones, around every constant of the computation, and close to L."""
        near = {c + d for c in integer_constants([node]) for d in (0, 1)}
        return sorted(s for s in {*_PROBES, *near, self.length // 2, self.length - 1} if 2 <= s <= self.length)

    def _value(self, node: fx.Node, batch: int, length: int) -> Tensor:
        try:
            value = evaluate_at(self.program, [node], self._sizes(batch, length))[0]
        except IrcError as error:
            raise Refusal(f"uses {node.name}, which cannot be evaluated: {error}") from error
        assert isinstance(value, Tensor)
        return value

    def _sizes(self, batch: int, length: int) -> dict[str, int]:
        sizes = {self.sequence.name: length}
        if self.sequence.batch is not None:
            sizes[self.sequence.batch.name] = batch
        return sizes

    def _number(self, size: sympy.Expr, batch: int, length: int) -> int:
        return int(size.subs({self.sequence.symbol: length, self.sequence.batch_symbol: batch}))


def longest_table(program: Program, sequence: Sequence, data: set[fx.Node], wanted: int) -> int:
    """The largest length up to `wanted` for which every size-only operand can be computed.

    A model with learned positions ends where its table ends.
    """
    tables = Tables(program, sequence, data, wanted)
    operands = [
        p
        for p in program.graph.nodes
        if p not in data and p.op == "call_function" and not is_size(p)
        and any(user in data for user in p.users) and tables.depends_on_length(p)
    ]  # fmt: skip

    biases = {node.kwargs.get("bias") for node in attention_nodes(program)}

    def fits(length: int) -> bool:
        sizes = tables._sizes(1, length)
        planes = [[evaluate_size(program, n, sizes) for n in p.meta[VAL].shape[-2:]] for p in operands if p in biases]
        return all(n in (1, length) for plane in planes for n in plane) and _computable(program, operands, sizes)

    if fits(wanted):
        return wanted
    low, high = 1, wanted
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _computable(program: Program, nodes: Iterable[fx.Node], sizes: dict[str, int]) -> bool:
    for node in nodes:
        try:
            value = evaluate_at(program, [node], sizes)[0]
        except (IndexError, RuntimeError):
            return False
        expected = [evaluate_size(program, size, sizes) for size in node.meta[VAL].shape]
        if list(value.shape) != expected:  # slicing a table that is too short does not raise
            return False
    return True


def _from_first_key(bias: Tensor) -> Tensor:
    """Each row less its entry for the first key, where that is a number for every row."""
    first = bias[..., :1]
    # Beyond that it masks the first key: taking it away would bring back what is masked.
    return bias - first if bias.is_floating_point() and bool((first.abs() < _MASKING).all()) else bias


def _masks_later_keys(bias: Tensor) -> bool:
    """Whether every key after the query is masked out."""
    later = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
    entries = bias[..., later]
    if bias.dtype == torch.bool:
        return not bool(entries.any())
    return bool((entries <= torch.finfo(bias.dtype).min / 2).all())


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal; floats up to the last bits, which vectorised functions round differently by length."""
    if a.dtype.is_floating_point:
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
    return torch.equal(a, b)
