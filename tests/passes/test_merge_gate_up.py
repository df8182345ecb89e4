from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from irc.core.program import Program
from irc.frontend import capture
from irc.passes import MergeGateUp
from tests import zoo
from tests.passes.running import assert_same, operations, reasons, run_pass, run_with_findings


class Gated(nn.Module):
    def __init__(self, *, up_bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=up_bias)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x), self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x)
        return torch.ops.irc.glu(gate, up, activation="gelu")


def program_of(module: nn.Module) -> Program:
    return capture(module.eval(), (torch.randn(3, 5, 6),), dynamic=({0: "B", 1: "S"},))


@pytest.mark.parametrize("up_bias", [False, True])
def test_rewrites(up_bias: bool) -> None:
    before = program_of(Gated(up_bias=up_bias))
    result = run_pass(MergeGateUp(), before)
    assert result.matches == 1
    assert result.skips == []
    assert operations(result.program) == {"linear": 1, "split_with_sizes": 1, "glu": 1}
    for batch, length in ((1, 1), (2, 7), (5, 3)):
        assert_same(before, result.program, (torch.randn(batch, length, 6),))
    again = run_pass(MergeGateUp(), result.program)
    assert again.matches == 0
    assert "not a linear layer" in reasons(again)


def test_model() -> None:
    before = zoo.captured("tinypy")
    result = run_pass(MergeGateUp(), before)
    assert result.matches == operations(before)["glu"] > 0
    assert_same(before, result.program, before.example_inputs or ())


class TwoInputs(Gated):
    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x), self.up(x + 1)


class OneWeight(Gated):
    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x), nn.functional.linear(x, self.gate.weight, self.up.bias)


class NoLinear(Gated):
    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x), self.up(x) + 1


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (TwoInputs(), "gate and up read different inputs"),
        (OneWeight(up_bias=True), "weight gate.weight is shared by 2 operations"),
        (NoLinear(), "its up add is aten.add.Tensor, not a linear layer"),
    ],
)
def test_refuses(module: nn.Module, reason: str) -> None:
    result = run_pass(MergeGateUp(), program_of(module))
    assert result.matches == 0
    assert reason in reasons(result)


def test_swapped_gate_and_up_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from irc.passes.fuse import _merge_linears

    monkeypatch.setattr(_merge_linears, "_stack", lambda tensors: torch.cat(list(reversed(tensors))).detach())
    _, findings = run_with_findings(MergeGateUp(), program_of(Gated()))
    assert len(findings) == 2
    assert "rows 0 to 8 of gate_up.weight are not the weight of linear" in findings[0].problem
