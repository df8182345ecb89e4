"""Matrix products with a stored matrix become `aten.linear`. Runs right after noise is dropped.

So that quantization, pruning and merging look for one operation: GPT-2's `Conv1D` arrives as `addmm`
on flattened tokens, hand-written models spell `x @ w.T + b`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor, nn

from irc.core.contract import Pass, PassContext, PassResult, Skip, register_pass
from irc.core.operands import int_argument, list_argument
from irc.core.program import VAL, Program

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.matmul.default, aten.addmm.default)
_TURNS = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
_VIEWS = (aten.view.default, aten.reshape.default)


@dataclass(frozen=True)
class _Product:
    """x @ matrix + bias: `matrix` is a weight node; `turned` if the program turns it (so it is [N, K] as stored)."""

    node: fx.Node
    x: fx.Node
    matrix: fx.Node
    turned: bool
    bias: fx.Node | None


@register_pass
@dataclass(frozen=True, kw_only=True)
class RaiseLinear(Pass):
    """x @ w + b  →  linear(x, wᵀ, b), for a stored matrix w.

    1. `mm`, `matmul` and `addmm` (alpha = beta = 1) with a weight [K, N], or with the turned form of a weight [N, K].
    2. Tokens flattened for the product and unflattened after it stay in their shape: the two views go.

    wᵀ is a view of the stored matrix: no bytes are copied. Does not raise: a stacked (three-dimensional) weight; a
    matrix that is computed; a bias that is not [N].
    Preserves: exact up to rounding.
    """

    name: ClassVar[str] = "raise-linear"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, skips = 0, []
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target not in _PRODUCTS:
                continue
            found = _product(node)
            if isinstance(found, Skip):
                skips.append(found)
            elif found is not None and ctx.allow(node):
                _rewrite(program, found)
                matches += 1
        if matches:
            program.erase_dead()
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0)


def _product(node: fx.Node) -> _Product | Skip | None:
    """The parts of a product with a stored matrix; a skip if one is nearly that; None if no weight is involved."""
    bias = None
    operands = list(node.args)
    if node.target is aten.addmm.default:
        bias, *operands = operands
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            return Skip.at(node, "addmm with alpha or beta other than 1")
    x, matrix = operands
    assert isinstance(x, fx.Node)
    assert isinstance(matrix, fx.Node)
    stored, turned = _stored(matrix)
    if stored is None:
        return None
    if stored.meta[VAL].dim() != 2:
        return Skip.at(node, f"the weight {stored.target} has {stored.meta[VAL].dim()} dimensions, not 2")
    if x.op == "get_attr" or x.meta[VAL].dim() < 2:
        return Skip.at(node, "the other operand is no batch of rows")
    if bias is not None and (not isinstance(bias, fx.Node) or bias.meta[VAL].shape != node.meta[VAL].shape[-1:]):
        return Skip.at(node, "the added tensor is no bias of one number a column")
    return _Product(node, x, stored, turned, bias)


def _stored(matrix: fx.Node) -> tuple[fx.Node | None, bool]:
    """The weight behind a matrix, and whether the program turns it."""
    if matrix.op == "get_attr":
        return matrix, False
    if matrix.target in _TURNS:
        source = matrix.args[0]
        assert isinstance(source, fx.Node)
        swaps = matrix.meta[VAL].dim() == 2 and source.op == "get_attr" and _swaps(matrix)
        return (source, True) if swaps else (None, False)
    return None, False


def _swaps(turn: fx.Node) -> bool:
    """True if a two-dimensional turn really exchanges rows and columns."""
    if turn.target is aten.transpose.int:
        return {int_argument(turn, n) % 2 for n in (1, 2)} == {0, 1}
    if turn.target is aten.permute.default:
        return [int(d) % 2 for d in list_argument(turn, 1)] == [1, 0]
    return True


def _rewrite(program: Program, product: _Product) -> None:
    node = product.node
    weight = product.matrix if product.turned else _turned_weight(program, product.matrix, node)
    source, results = _flattened(program, product)
    last = results[0] if results else node
    # Shape arguments of the removed views are no longer needed; the new node stands where the first of them stood.
    linear = program.insert(aten.linear.default, source, weight, *([product.bias] if product.bias else []), before=last)
    for result in results or [node]:
        program.replace(result, linear)


def _turned_weight(program: Program, matrix: fx.Node, before: fx.Node) -> fx.Node:
    tensor = program.weight(matrix)
    view: Tensor = tensor.detach().t()
    if isinstance(tensor, nn.Parameter):
        view = nn.Parameter(view, requires_grad=tensor.requires_grad)
    return program.weight_node(f"{matrix.target}_transposed", view, before=before)


def _flattened(program: Program, product: _Product) -> tuple[fx.Node, list[fx.Node]]:
    """Case 2: the tensor before flattening and the nodes that unflatten; (x, []) when there are no such views."""
    node, flat = product.node, product.x
    if flat.target not in _VIEWS:
        return flat, []
    source = flat.args[0]
    assert isinstance(source, fx.Node)
    width = program.shape_expr(flat)[-1]
    wanted = (*program.shape_expr(source)[:-1], program.shape_expr(node)[-1])
    users = [user for user in node.users if user.target in _VIEWS and program.shape_expr(user) == wanted]
    same = len(users) == len(node.users) > 0 and program.shape_expr(source)[-1] == width
    return (source, users) if same else (flat, [])


__all__ = ["RaiseLinear"]
