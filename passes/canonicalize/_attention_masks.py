"""From the masks and biases of one attention to `mask=`, `window=` and one `bias=` tensor.

Every term is either recognised as a mask kind (see `irc.core.masks`), or stays in the bias. A term
that joins a size-only mask with a data-dependent one (causal and padding) is taken apart when that
is provably the same function, else it stays whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from irc.core.dims import Size
from irc.core.errors import IrcError
from irc.core.masks import CAUSAL, FULL, MASKED_BELOW, MaskKind, NotAMaskKind, recognise
from irc.core.operands import input_node
from irc.core.program import VAL, Program
from irc.core.row_evaluation import RowEvaluator
from irc.passes.canonicalize._attention_layout import Layouts

aten = torch.ops.aten

_ABSORBING = -1e30
_AND = frozenset({aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor})
_OR = frozenset({aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default})
_NOT = frozenset({aten.bitwise_not.default, aten.logical_not.default})
_WHERE = frozenset({
    aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar,
})  # fmt: skip
_MASKED_FILL = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})


@dataclass(frozen=True)
class Term:
    """One mask or bias over the scores.

    `form`: `keep` (bool, true keeps), `drop` (bool, true drops) or `add` (float, added after
    multiplication with `factor`). A dropped score becomes `fill`, or has `fill` added to it.
    `score_ndim`: axes of the scores that it was applied to (3: [B·H, S, T] or [B, S, T]).
    """

    node: fx.Node
    form: str
    fill: float = -torch.inf
    factor: float = 1.0
    score_ndim: int = 4

    @property
    def is_exact_drop(self) -> bool:
        """True when a dropped key gets weight 0 even in a row where every key is dropped."""
        return self.form != "add" and self.fill == -torch.inf


@dataclass(frozen=True)
class MaskPlan:
    """What the attention gets: a kind and the terms that stay tensors."""

    kind: MaskKind
    terms: tuple[Term, ...] = ()
    num_recognised: int = 0


@dataclass
class MaskPlanner:
    """Plans masks for all attentions of a program; each distinct mask is evaluated once."""

    program: Program
    tainted: set[fx.Node]
    layouts: Layouts
    _known: dict[Any, MaskKind | NotAMaskKind] = field(default_factory=dict)

    def plan(self, terms: Sequence[Term], queries: Size, keys: Size, *, causal: bool = False) -> MaskPlan | str:
        """How to mask scores [.., queries, keys]; a text says why it cannot be done.

        `causal`: on top of the terms (it comes without a tensor).
        """
        for term in terms:
            if term.form != "add" and term.fill > MASKED_BELOW:
                return f"masked scores become {term.fill:g}, which does not surely give them weight 0"
        terms = [replace(term, node=self._uncovered(term.node)) for term in terms]
        base = CAUSAL if causal else FULL
        whole = self._split(terms, queries, keys, base)
        if not whole.terms:
            return whole
        fine = self._split([part for term in terms for part in self._parts(term)], queries, keys, base)
        # Taking terms apart is worth it only when some part needs no tensor then.
        return fine if fine.num_recognised > whole.num_recognised and _same_in_full_rows(terms, fine.terms) else whole

    def _split(self, terms: Sequence[Term], queries: Size, keys: Size, base: MaskKind) -> MaskPlan:
        """Move terms that are mask kinds out of the bias as far as that is the same function."""
        kinds: list[MaskKind] = [base]
        kept: list[Term] = []
        num_recognised = 0
        finite: list[tuple[list[Term], MaskKind]] = []
        for group in self._groups(terms, queries, keys):
            found = self._recognise(group, queries, keys)
            if isinstance(found, NotAMaskKind):
                kept.extend(group)
            elif found == FULL or (group[0].is_exact_drop and _strongest([*kinds, found]) is not None):
                kinds.append(found)
                num_recognised += 1
            else:
                finite.append((group, found))
        # A finite mask value equals a dropped key only when its row surely keeps some key.
        certain = all(self._keeps_rows(term) for term in kept)
        for group, found in finite:
            if certain and _strongest([*kinds, found]) is not None:
                kinds.append(found)
                num_recognised += 1
            else:
                kept.extend(group)
        kind = _strongest(kinds)
        assert kind is not None
        return MaskPlan(kind, tuple(kept), num_recognised)

    def _groups(self, terms: Sequence[Term], queries: Size, keys: Size) -> list[list[Term]]:
        """Each term by itself, but bool masks that are one kind only together (t ≤ p, t > p - window) joined."""
        joined: list[list[Term]] = []
        rest = list(terms)
        for form, fill in {(term.form, term.fill) for term in terms if term.form != "add"}:
            group = [t for t in rest if (t.form, t.fill) == (form, fill) and t.node not in self.tainted]
            if len(group) > 1 and isinstance(self._recognise(group, queries, keys), MaskKind):
                joined.append(group)
                rest = [term for term in rest if term not in group]
        return joined + [[term] for term in rest]

    def _recognise(self, group: Sequence[Term], queries: Size, keys: Size) -> MaskKind | NotAMaskKind:
        if any(term.node in self.tainted for term in group):
            return NotAMaskKind("it depends on input values")
        term = group[0]
        if term.form == "add" and not 1e-3 <= term.factor <= 1e3:
            return NotAMaskKind(f"it is multiplied by {term.factor:g}")
        nodes = [term.node for term in group]
        key = (tuple(nodes), term.form, str(queries), str(keys))
        if key not in self._known:
            inverted = term.form == "drop"
            self._known[key] = recognise(self.program, nodes, queries=queries, keys=keys, inverted=inverted)
        return self._known[key]

    def _keeps_rows(self, term: Term) -> bool:
        """True for a bias that masks nothing at all: size-only and finite."""
        if term.form != "add" or term.node in self.tainted:
            return False
        sizes = {name: dim.hint for name, dim in self.program.dims.items()}
        try:
            value = RowEvaluator(self.program, sizes).whole(term.node)
        except IrcError:
            return False
        return bool((value * term.factor > MASKED_BELOW / 2).all())

    # ---------------------------------------------------------------- taking terms apart

    def _parts(self, term: Term) -> Iterator[Term]:
        """Terms that together do what this one does."""
        node = self._uncovered(term.node)
        if term.form == "add":
            yield from self._float_parts(replace(term, node=node))
        elif node.target in _NOT:
            flipped = "drop" if term.form == "keep" else "keep"
            yield from self._parts(replace(term, node=input_node(node, 0), form=flipped))
        elif (term.form == "keep" and node.target in _AND and _is_bool(node)) or (
            term.form == "drop" and node.target in _OR and _is_bool(node)
        ):
            operands = [operand for operand in node.args[:2] if isinstance(operand, fx.Node) and _is_bool(operand)]
            if len(operands) < 2:
                yield term
                return
            for operand in operands:
                yield from self._parts(replace(term, node=operand))
        else:
            yield replace(term, node=node)

    def _float_parts(self, term: Term) -> Iterator[Term]:
        """Parts of a float mask: sums, and selections between 0 and -inf."""
        node = term.node
        if node.target is aten.add.Tensor and not node.kwargs:
            operands = [operand for operand in node.args[:2] if isinstance(operand, fx.Node)]
            if len(operands) == 2 and all(o.meta[VAL].is_floating_point() for o in operands):
                for operand in operands:
                    yield from self._parts(replace(term, node=operand))
                return
        selection = self._selection(node)
        if selection is None:
            yield term
            return
        condition, form, fill, rest = selection
        yield from self._parts(replace(term, node=condition, form=form, fill=fill, factor=1.0))
        if rest is not None:
            yield from self._parts(replace(term, node=rest))

    def _selection(self, node: fx.Node) -> tuple[fx.Node, str, float, fx.Node | None] | None:
        """where(keep, x, fill) and its like: condition, form, fill, and x unless it is 0."""
        if node.target in _WHERE:
            condition = input_node(node, 0)
            sides: tuple[tuple[Any, Any, str], ...] = (
                (node.args[1], node.args[2], "keep"),
                (node.args[2], node.args[1], "drop"),
            )
        elif node.target in _MASKED_FILL:
            condition, sides = input_node(node, 1), ((node.args[0], node.args[2], "drop"),)
        else:
            return None
        for rest, fill_argument, form in sides:
            fill = self.layouts.fill_value(fill_argument)
            if fill is None or fill > MASKED_BELOW:
                continue
            if self.layouts.fill_value(rest) == 0.0:
                return condition, form, fill, None
            if isinstance(rest, fx.Node) and rest.meta[VAL].is_floating_point():
                return condition, form, fill, rest
        return None

    def _uncovered(self, node: fx.Node) -> fx.Node:
        """The node under expansions, which broadcasting makes unnecessary."""
        while (
            node.target is aten.expand.default
            and isinstance(node.args[0], fx.Node)
            and node.args[0].meta[VAL].ndim == node.meta[VAL].ndim
        ):
            node = node.args[0]
        return node


def _same_in_full_rows(before: Sequence[Term], after: Sequence[Term]) -> bool:
    """Whether parts that stay tensors give a row of dropped keys what the whole gave it.

    Two finite fills would add up, and a fill that does not absorb the score would let it through.
    """
    new = [term for term in after if term not in before and term.form != "add" and not term.is_exact_drop]
    return len(new) <= 1 and all(term.fill <= _ABSORBING for term in new)


def _strongest(kinds: Iterable[MaskKind]) -> MaskKind | None:
    """The one kind that a conjunction of kinds is; None when it is no kind."""
    rest = {kind for kind in kinds if kind != FULL}
    if len(rest) > 1:
        rest.discard(CAUSAL)  # Sliding and chunked masks are causal too.
    if len(rest) > 1:
        if {kind.kind for kind in rest} != {"sliding"}:
            return None
        return min(rest, key=lambda kind: kind.window or 0)
    return next(iter(rest), FULL)


def build_bias(program: Program, terms: Sequence[Term], as_scores: Any, before: fx.Node) -> fx.Node | None:
    """One bias tensor [B|1, H|1, S|1, T] for the terms; `as_scores` gives a node its four axes."""
    keep: fx.Node | None = None
    total: fx.Node | None = None
    for term in terms:
        node = as_scores(term)
        if term.is_exact_drop:
            if term.form == "drop":
                node = program.insert(aten.bitwise_not.default, node, before=before)
            keep = node if keep is None else program.insert(aten.bitwise_and.Tensor, keep, node, before=before)
            continue
        if term.form != "add":
            values = (term.fill, 0.0) if term.form == "drop" else (0.0, term.fill)
            node = program.insert(aten.where.Scalar, node, *values, before=before)
        elif term.factor != 1.0:
            node = program.insert(aten.mul.Tensor, node, term.factor, before=before)
        total = node if total is None else program.insert(aten.add.Tensor, total, node, before=before)
    if keep is None or total is None:
        return keep if total is None else total
    return program.insert(aten.where.ScalarOther, keep, total, -torch.inf, before=before)


def _is_bool(node: fx.Node) -> bool:
    return node.meta[VAL].dtype == torch.bool
