"""Products of attention in any spelling: matmul, bmm, baddbmm, einsum.

A product is brought to left[.., S, x] · right[.., x, T] by saying how the axes of its factors are
ordered; nothing is computed or inserted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from irc.core.program import VAL

aten = torch.ops.aten

_SWAPPED = {2: (1, 0), 3: (0, 2, 1), 4: (0, 1, 3, 2)}


@dataclass(frozen=True)
class Product:
    """One product. Permuting a factor by its order gives [.., rows, width].

    `added`: a tensor added to it (baddbmm), times `added_factor`; `output_order` permutes the axes
    [B, H, S, D] to those of the node.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_order: tuple[int, ...] | None = None
    right_order: tuple[int, ...] | None = None
    scale: Any = 1.0
    added: fx.Node | None = None
    added_factor: float = 0.0
    output_order: tuple[int, ...] | None = None

    @property
    def left_shape(self) -> torch.Size:
        return self.left.meta[VAL].shape


def score_product(node: Any) -> Product | None:
    """queries[.., S, D] · keys[.., T, D]ᵀ."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    args: Any = node.args
    if node.target in (aten.matmul.default, aten.bmm.default):
        left, right = args[:2]
        swapped = _swap(left, right)
        return None if swapped is None else Product(node, left, right, right_order=swapped)
    if node.target is aten.baddbmm.default:
        added, left, right = args[:3]
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if not isinstance(beta, (int, float)) or not isinstance(added, fx.Node):
            return None
        return Product(node, left, right, right_order=_SWAPPED[3], scale=alpha, added=added, added_factor=float(beta))
    if node.target is aten.einsum.default:
        return _score_einsum(node)
    return None


def value_product(node: fx.Node, weights: fx.Node) -> Product | str:
    """weights[.., S, T] · values[.., T, D]; a text says why not."""
    if node.target is aten.einsum.default:
        return _value_einsum(node, weights)
    values = node.args[1]
    assert isinstance(values, fx.Node)
    if values.meta[VAL].ndim != weights.meta[VAL].ndim or values.meta[VAL].ndim not in _SWAPPED:
        return f"weights of {weights.meta[VAL].ndim} axes are multiplied with values of {values.meta[VAL].ndim}"
    return Product(node, weights, values)


def _swap(left: Any, right: Any) -> tuple[int, ...] | None:
    if left.meta[VAL].ndim != right.meta[VAL].ndim:
        return None
    return _SWAPPED.get(right.meta[VAL].ndim)


def _letters(node: fx.Node) -> tuple[str, str, str] | None:
    """The axes of left, right and result of an einsum of two tensors, each letter once."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if not arrow or len(parts) != 2 or "." in equation:
        return None
    if any(len(set(text)) != len(text) for text in (*parts, result)):
        return None
    return parts[0], parts[1], result


def _score_einsum(node: fx.Node) -> Product | None:
    letters = _letters(node)
    if letters is None or not 2 <= len(letters[2]) <= 4:
        return None
    operands: Any = node.args[1]
    lead, row, column = letters[2][:-2], letters[2][-2], letters[2][-1]
    by_row = 0 if row in letters[0] else 1
    left, right = letters[by_row], letters[1 - by_row]
    width = set(left) & set(right) - set(letters[2])
    if len(width) != 1:
        return None
    (d,) = width
    if set(left) != {*lead, row, d} or set(right) != {*lead, column, d}:
        return None
    return Product(
        node,
        operands[by_row],
        operands[1 - by_row],
        left_order=_order(left, lead + row + d),
        right_order=_order(right, lead + column + d),
    )


def _value_einsum(node: fx.Node, weights: fx.Node) -> Product | str:
    letters = _letters(node)
    refusal = f"einsum {node.args[0]!r} is no product of weights and values"
    if letters is None:
        return refusal
    operands: Any = node.args[1]
    first = 0 if operands[0] is weights else 1
    left, right, result = letters[first], letters[1 - first], letters[2]
    if not 2 <= len(left) <= 4:
        return f"weights of {len(left)} axes in einsum {node.args[0]!r}"
    lead, row, key = left[:-2], left[-2], left[-1]
    width = set(right) - set(left)
    if len(width) != 1 or key in result:
        return refusal
    (d,) = width
    if set(right) != {*lead, key, d} or set(result) != {*lead, row, d}:
        return refusal
    return Product(
        node,
        weights,
        operands[1 - first],
        right_order=_order(right, lead + key + d),
        output_order=_order(lead + row + d, result),
    )


def _order(have: str, want: str) -> tuple[int, ...] | None:
    """The permutation from one order of axes to another; None when they are the same."""
    return None if have == want else tuple(have.index(axis) for axis in want)
