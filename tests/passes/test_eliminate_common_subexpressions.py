from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from irc.passes import EliminateCommonSubexpressions
from tests.passes.raising import captured, raised
from tests.passes.running import operations, run_pass

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def test_equal_operations_are_computed_once() -> None:
    before = captured(lambda x: x.exp().sin() + x.exp().sin() * x.exp(), (X,))
    result = raised(EliminateCommonSubexpressions(), before, widths=[(6,)])
    assert operations(result.program) == {"exp": 1, "sin": 1, "mul": 1, "add": 1}
    assert result.matches == 3


def test_constants_of_different_types_are_different() -> None:
    before = captured(lambda x: (x.long() + 1).float() + (x.long() + 1.0) + (x.long() + True), (X,))
    result = run_pass(EliminateCommonSubexpressions(), before)
    assert operations(result.program)["add"] == operations(before)["add"]


def test_one_weight_under_two_names_is_tied() -> None:
    weight = torch.nn.Parameter(torch.ones(6), requires_grad=False)
    before = captured(lambda x, a, b: x * a + b, (X,), weight, weight.clone())
    assert run_pass(EliminateCommonSubexpressions(), before).matches == 0  # equal numbers are not the same weight


def test_random_operations_are_kept() -> None:
    before = captured(lambda x: F.dropout(x, 0.5, True) + F.dropout(x, 0.5, True), (X,))
    assert run_pass(EliminateCommonSubexpressions(), before).matches == 0


def test_equal_sizes_are_one_node() -> None:
    def model(x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0] * 2, 6).sum() + y.new_ones(y.shape[0] * 2, 6)

    before = captured(model, (X, X))
    result = run_pass(EliminateCommonSubexpressions(), before)
    sizes = [node for node in result.program.graph.nodes if "sym_size" in str(node.target)]
    assert len(sizes) == len({str(node.meta["val"]) for node in sizes})
