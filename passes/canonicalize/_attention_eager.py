"""Attention written out: from a softmax, up through masks and scales to q·kᵀ, down to ·v.

The scores are walked from the softmax upwards, outermost operation first; `_Walk` collects what it
meets. With m the product of the scales met so far, scores = m · x + terms, where x is what is left:

- x + b: a term with factor m.                      - masked_fill, where: a mask term.
- c · x, x / c: m becomes m · c, m / c.             - tanh(x): soft-cap m, and m · x goes on inside.
- cat(x, sinks) whose last weight is dropped: sinks. - x - max(x): softmax does not see it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.operands import list_argument
from irc.core.program import VAL
from irc.passes.canonicalize._attention_layout import Layouts
from irc.passes.canonicalize._attention_masks import Term
from irc.passes.canonicalize._attention_match import AttentionMatch, NoMatch, Operand, find_operands
from irc.passes.canonicalize._attention_product import Product, score_product, value_product

aten = torch.ops.aten

SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
_CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout})
_COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default})
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default})
_DROPOUTS = frozenset({aten.dropout.default, aten.native_dropout.default})
_MASKED_FILL = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})
_WHERE = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf})
_MULTIPLY = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_DIVIDE = frozenset({aten.div.Tensor, aten.div.Scalar})
_ADD = frozenset({aten.add.Tensor, aten.sub.Tensor})
_MAXIMUM = frozenset({aten.max.other, aten.maximum.default, aten.clamp.default, aten.clamp_min.default})
_MAX_STEPS = 24


def match_softmax(softmax: fx.Node, layouts: Layouts) -> AttentionMatch | NoMatch | None:
    """The attention around a softmax; None when it is no part of one (a router, a classifier)."""
    below = _walk_down(softmax)
    if below is None:
        return None
    walk = _Walk(softmax, layouts, drops_last=below.drops_last)
    refusal = walk.run()
    if walk.product is None:
        return NoMatch(softmax, refusal or "its scores are no product of queries and keys")
    if below.refusal or refusal:
        return NoMatch(softmax, below.refusal or refusal or "")
    if not _is_last_axis(softmax):
        return NoMatch(softmax, f"softmax runs over axis {softmax.args[1]}, not over the keys")
    values = value_product(below.product, below.weights)
    if isinstance(values, str):
        return NoMatch(softmax, values)
    return _assemble(softmax, below.product, walk, walk.product, values, layouts)


def _assemble(
    softmax: fx.Node, anchor: fx.Node, walk: _Walk, scores: Product, values: Product, layouts: Layouts
) -> AttentionMatch | NoMatch:
    query, key = Operand(scores.left, scores.left_order), Operand(scores.right, scores.right_order)
    found = find_operands(layouts, anchor, query, key, Operand(values.right, values.right_order))
    if isinstance(found, NoMatch):
        return replace(found, node=softmax)
    score_shape = scores.node.meta[VAL].shape
    sinks = None
    if walk.sinks is not None:
        sinks = _sink_vector(walk.sinks, layouts, found[0].num_heads)
        if sinks is None:
            return NoMatch(softmax, f"sink logits {walk.sinks.name} are no vector of one number a head")
    return AttentionMatch(
        anchor=anchor,
        query=found[0],
        key=found[1],
        value=found[2],
        queries=score_shape[-2],
        keys=score_shape[-1],
        scale=walk.scale * found[0].factor * found[1].factor,
        score_ndim=len(values.left_shape),
        terms=tuple(walk.terms),
        softcap=walk.softcap,
        sinks=sinks,
        output_order=values.output_order,
    )


# -------------------------------------------------------------------- from the softmax to the values


@dataclass(frozen=True)
class _Below:
    """The product with the values, and the weights as they go into it."""

    product: fx.Node
    weights: fx.Node
    drops_last: bool
    refusal: str | None


def _walk_down(softmax: fx.Node) -> _Below | None:
    node, drops_last, refusal = softmax, False, None
    for _ in range(_MAX_STEPS):
        users = list(node.users)
        following = [user for user in users if _continues(user, node)]
        if len(following) != 1:
            return None
        if len(users) > 1:
            refusal = f"its attention weights {node.name} are used elsewhere ({_names(users, following[0])})"
        user = following[0]
        if user.target in (aten.matmul.default, aten.bmm.default, aten.einsum.default):
            return _Below(user, node, drops_last, refusal)
        if user.target in _DROPOUTS and len(user.args) > 2 and user.args[2] and user.args[1] != 0:
            refusal = "it drops attention weights: capture in eval mode"
        if user.target is aten.slice.Tensor:
            drops_last = True
        node = user
    return None


def _continues(user: fx.Node, node: fx.Node) -> bool:
    target = user.target
    if target in _CASTS:
        return user.meta[VAL].dtype.is_floating_point
    if target in _COPIES or target in _DROPOUTS:
        return True
    if target in _VIEWS:
        return _keeps_plane(user, node)
    if target is aten.slice.Tensor:
        return _drops_last_column(user, node)
    if target in (aten.matmul.default, aten.bmm.default):
        return user.args[0] is node
    return target is aten.einsum.default and node in list_argument(user, 1)


def _keeps_plane(user: fx.Node, node: fx.Node) -> bool:
    """A view that leaves the last two axes and the number of elements alone."""
    before, after = node.meta[VAL], user.meta[VAL]
    return (
        before.ndim >= 2
        and after.ndim >= 2
        and [str(s) for s in before.shape[-2:]] == [str(s) for s in after.shape[-2:]]
        and str(before.numel()) == str(after.numel())
    )


def _drops_last_column(user: fx.Node, node: fx.Node) -> bool:
    axis = user.args[1] if len(user.args) > 1 else 0
    start = user.args[2] if len(user.args) > 2 else None
    before, after = node.meta[VAL].shape, user.meta[VAL].shape
    return axis in (-1, len(before) - 1) and start in (0, None) and str(after[-1] + 1) == str(before[-1])


def _is_last_axis(softmax: fx.Node) -> bool:
    axis = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim")
    return axis in (-1, softmax.meta[VAL].ndim - 1)


def _names(users: list[fx.Node], but: fx.Node) -> str:
    return ", ".join(user.name for user in users if user is not but)


# -------------------------------------------------------------------- from the softmax to the scores


@dataclass
class _Walk:
    """The way up from the softmax: see the module's docstring."""

    softmax: fx.Node
    layouts: Layouts
    drops_last: bool
    scale: float = 1.0
    softcap: float | None = None
    sinks: fx.Node | None = None
    terms: list[Term] = field(default_factory=list)
    product: Product | None = None

    def run(self) -> str | None:
        """Walk up to the product; a text says what is in the way."""
        node: Any = self.softmax.args[0]
        for _ in range(_MAX_STEPS):
            product = score_product(node)
            if product is not None:
                return self._arrive(product)
            following = self._step(node)
            if isinstance(following, str):
                return following
            node = following
        return "its scores come from too long a chain of operations"

    def _arrive(self, product: Product) -> str | None:
        self.product = product
        scale = self.layouts.constant(product.scale)
        if scale is None:
            return f"the scale of {product.node.name} is not a constant"
        if self.drops_last and self.sinks is None:
            return "the last of its weights is dropped, but no sink logits were appended"
        if product.added is not None and product.added_factor != 0:
            if self.softcap is not None:
                return f"{product.added.name} is added before the soft-cap"
            self._add(product.added, self.scale * product.added_factor, product.node)
        self.scale *= scale
        return None

    def _step(self, node: fx.Node) -> fx.Node | str:
        """The next node up."""
        target = node.target
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if len(node.users) > 1 and not self._only_softmax_uses(node):
            return f"its scores {node.name} are used elsewhere"
        if source is not None:
            if target in _CASTS and source.meta[VAL].dtype.is_floating_point:
                return source
            if target in _COPIES or target in _DROPOUTS or (target in _VIEWS and _keeps_plane(node, source)):
                return source
            if target in _MULTIPLY or target in _DIVIDE:
                return self._scaled(node)
            if target in _ADD:
                return self._shifted(node)
            if target in _MAXIMUM and self._is_lowest(node):
                return source  # raises -inf to the lowest number: no softmax sees a difference
            if target is aten.tanh.default:
                return self._capped(source)
            if target in _MASKED_FILL:
                return self._masked(node, source, node.args[1], "drop", node.args[2])
            if target in _WHERE:
                return self._selected(node)
        if target is aten.cat.default:
            return self._with_sinks(node)
        return f"its scores pass through {node.name} = {target}"

    def _is_lowest(self, node: fx.Node) -> bool:
        value = self.layouts.fill_value(node.args[1])
        return value is not None and value <= torch.finfo(node.meta[VAL].dtype).min / 2

    def _only_softmax_uses(self, node: fx.Node) -> bool:
        """True when the other users only compute the row maximum that is subtracted again."""
        return all(
            user.target in (aten.amax.default, aten.max.dim, aten.sub.Tensor) or user is self.softmax
            for user in node.users
        )

    def _scaled(self, node: fx.Node) -> fx.Node | str:
        left, right = node.args[:2]
        if node.target in _MULTIPLY and self.layouts.constant(right) is None:
            left, right = right, left
        constant = self.layouts.constant(right)
        if constant is None or not isinstance(left, fx.Node):
            return f"its scores are scaled by a tensor in {node.name}"
        if constant == 0:
            return f"its scores are scaled by 0 in {node.name}"
        self.scale *= constant if node.target in _MULTIPLY else 1.0 / constant
        return left

    def _shifted(self, node: fx.Node) -> fx.Node | str:
        left, right = node.args[:2]
        alpha = node.kwargs.get("alpha", 1)
        if self.softcap is not None:
            return f"something is added before the soft-cap in {node.name}"
        if node.target is aten.sub.Tensor and isinstance(left, fx.Node) and _is_row_maximum(right, left):
            return left if alpha == 1 else f"part of the row maximum is subtracted in {node.name}"
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or not isinstance(alpha, (int, float)):
            return f"a number is added to its scores in {node.name}"
        swap = node.target is aten.add.Tensor and alpha == 1 and not self._leads_to_product(left)
        scores, other = (right, left) if swap else (left, right)
        if str(scores.meta[VAL].shape) != str(node.meta[VAL].shape):
            return f"the sum {node.name} widens its scores"
        self._add(other, self.scale * (alpha if node.target is aten.add.Tensor else -alpha), node)
        return scores

    def _add(self, bias: fx.Node, factor: float, scores: fx.Node) -> None:
        self.terms.append(Term(bias, "add", factor=factor, score_ndim=scores.meta[VAL].ndim))

    def _capped(self, source: fx.Node) -> fx.Node | str:
        if self.softcap is not None:
            return "its scores are soft-capped twice"
        if self.scale <= 0:
            return f"its soft-cap {self.scale:g} is not positive"
        self.softcap = self.scale
        return source

    def _selected(self, node: fx.Node) -> fx.Node | str:
        condition, left, right = node.args[:3]
        if isinstance(left, fx.Node) and (not isinstance(right, fx.Node) or self._leads_to_product(left)):
            return self._masked(node, left, condition, "keep", right)
        return self._masked(node, right, condition, "drop", left)

    def _masked(self, node: fx.Node, scores: Any, condition: Any, form: str, fill: Any) -> fx.Node | str:
        if self.softcap is not None:
            return f"its scores are masked before the soft-cap in {node.name}"
        value = self.layouts.fill_value(fill)
        if value is None:
            return f"its masked scores become {fill}, not a constant, in {node.name}"
        if not isinstance(scores, fx.Node) or str(scores.meta[VAL].shape) != str(node.meta[VAL].shape):
            return f"the mask in {node.name} widens its scores"
        if self.scale <= 0:
            return f"masked scores are multiplied by {self.scale:g}"
        self.terms.append(Term(condition, form, fill=value * self.scale, score_ndim=node.meta[VAL].ndim))
        return scores

    def _with_sinks(self, node: fx.Node) -> fx.Node | str:
        parts: Any = node.args[0]
        axis = node.args[1] if len(node.args) > 1 else 0
        if not self.drops_last or self.sinks is not None or self.terms or self.scale != 1.0:
            return f"its scores are joined with others in {node.name}"
        if not isinstance(parts, (list, tuple)) or len(parts) != 2 or axis not in (-1, node.meta[VAL].ndim - 1):
            return f"its scores are joined with others in {node.name}"
        scores, sinks = parts
        if str(sinks.meta[VAL].shape[-1]) != "1":
            return f"{sinks.name} holds more than one sink logit a row"
        self.sinks = sinks
        return scores

    def _leads_to_product(self, node: Any) -> bool:
        """Whether the way up from here arrives at a product of queries and keys."""
        trial = _Walk(self.softmax, self.layouts, drops_last=False)
        for _ in range(_MAX_STEPS):
            if not isinstance(node, fx.Node):
                return False
            if score_product(node) is not None:
                return True
            node = trial._step(node)
        return False


def _is_row_maximum(node: Any, scores: fx.Node) -> bool:
    """amax(scores, -1, keepdim) in either spelling."""
    if not isinstance(node, fx.Node):
        return False
    while node.target in _COPIES:
        node = node.args[0]
    if getattr(node.target, "__name__", "") == "getitem" and node.args[1] == 0:
        node = node.args[0]
        if node.target is not aten.max.dim:
            return False
    elif node.target is not aten.amax.default:
        return False
    axis = node.args[1] if not isinstance(node.args[1], (list, tuple)) else node.args[1][0]
    keeps = len(node.args) > 2 and bool(node.args[2])
    return node.args[0] is scores and keeps and axis in (-1, scores.meta[VAL].ndim - 1)


def _sink_vector(sinks: fx.Node, layouts: Layouts, num_heads: Any) -> fx.Node | None:
    """The tensor [H] that was spread to [B, H, S, 1]."""

    def equal(vector: Tensor, spread: Tensor) -> bool:
        return (
            spread.ndim == 4
            and vector.shape[0] == num_heads
            and torch.equal(vector.view(1, -1, 1, 1).expand_as(spread), spread)
        )

    return layouts.equals_moved(sinks, 1, equal)
