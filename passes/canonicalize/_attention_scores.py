"""The scores of attention that is written out: from a softmax up through masks and scales to q·kᵀ.

Outermost operation first; `ScoreWalk` collects what it meets. With m the product of the scales met so far,
scores = m · x + terms, where x is what is left:

- x + b: a term with factor m.                      - masked_fill, where: a mask term.
- c · x, x / c: m becomes m · c, m / c.             - tanh(x): soft-cap m, and m · x goes on inside.
- cat(x, sinks) whose last weight is dropped: sinks. - x - max(x): softmax does not see it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from irc.core.program import VAL
from irc.passes.canonicalize._attention_layout import Layouts
from irc.passes.canonicalize._attention_masks import Term
from irc.passes.canonicalize._attention_product import Product, score_product

aten = torch.ops.aten

CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout})
COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default})
VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default})
DROPOUTS = frozenset({aten.dropout.default, aten.native_dropout.default})
MAX_STEPS = 24
"""Operations between a softmax and a product, at most."""
_MASKED_FILL = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})
_WHERE = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf})
_MULTIPLY = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_DIVIDE = frozenset({aten.div.Tensor, aten.div.Scalar})
_ADD = frozenset({aten.add.Tensor, aten.sub.Tensor})
_MAXIMUM = frozenset({aten.max.other, aten.maximum.default, aten.clamp.default, aten.clamp_min.default})


@dataclass
class ScoreWalk:
    """The way up from a softmax: see the module's docstring.

    Attributes:
        drops_last: the last weight of each row is dropped behind the softmax.
        product: the product of queries and keys, once it is reached.
    """

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
        for _ in range(MAX_STEPS):
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
            if target in CASTS and source.meta[VAL].dtype.is_floating_point:
                return source
            if target in COPIES or target in DROPOUTS or (target in VIEWS and keeps_plane(node, source)):
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
        trial = ScoreWalk(self.softmax, self.layouts, drops_last=False)
        for _ in range(MAX_STEPS):
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
    while node.target in COPIES:
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


def keeps_plane(user: fx.Node, node: fx.Node) -> bool:
    """A view that leaves the last two axes and the number of elements alone."""
    before, after = node.meta[VAL], user.meta[VAL]
    return (
        before.ndim >= 2
        and after.ndim >= 2
        and [str(s) for s in before.shape[-2:]] == [str(s) for s in after.shape[-2:]]
        and str(before.numel()) == str(after.numel())
    )
