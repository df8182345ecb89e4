from __future__ import annotations

import torch
from torch import Tensor

from irc.passes import EliminateDeadCode
from tests.passes.raising import captured
from tests.passes.running import assert_same, operations, run_pass

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def test_unused_operations_and_weights_go_and_inputs_stay() -> None:
    def model(x: Tensor, unused: Tensor, w: Tensor) -> Tensor:
        return x.exp()

    before = captured(model, (X, X), torch.ones(6)).copy()
    weight = before.weight_node("extra", torch.ones(6), before=before.output_node)
    before.insert(torch.ops.aten.mul.Tensor, before.placeholders[0], weight, before=before.output_node)
    result = run_pass(EliminateDeadCode(), before)
    assert operations(result.program) == {"exp": 1}
    assert (result.matches, result.program.weights, len(result.program.placeholders)) == (2, {}, 2)
    assert_same(before, result.program, (X[:1], X[:1]))
    assert run_pass(EliminateDeadCode(), result.program).matches == 0
