from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from irc.core.ops.fused import ACTIVATIONS
from irc.frontend import capture
from irc.passes import FuseActivation
from tests.passes.running import assert_same, operations, reasons, run_pass, run_with_findings

MODULES = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "mish": nn.Mish(),
    "leaky_relu": nn.LeakyReLU(),
}


def test_every_activation_is_tested() -> None:
    assert set(MODULES) == set(ACTIVATIONS) - {"quick_gelu"}  # no ATen operation: the op has it, the pass never sees it


@pytest.mark.parametrize("name", MODULES)
def test_linear(name: str) -> None:
    torch.manual_seed(0)
    before = capture(nn.Sequential(nn.Linear(5, 7), MODULES[name]), (torch.randn(3, 5),))
    result = run_pass(FuseActivation(), before)
    assert operations(result.program) == {"linear_activation": 1}
    fused = next(result.program.operations())
    assert fused.kwargs == {"activation": name}
    for batch in (1, 2, 5):
        assert_same(before, result.program, (torch.randn(batch, 5) * 4,), rtol=1e-6)
    assert run_pass(FuseActivation(), result.program).matches == 0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 3, padding="same"), (3, 9)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 9, 8)),
        (nn.Conv3d(2, 4, 2, bias=False), (2, 5, 4, 3)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 5, 5)),
    ],
)
def test_convolution(layer: nn.Module, shape: tuple[int, ...]) -> None:
    before = capture(nn.Sequential(layer, nn.SiLU()), (torch.randn(3, *shape),), dynamic=({0: "B"},))
    result = run_pass(FuseActivation(), before)
    assert operations(result.program) == {"conv_activation": 1}
    for batch in (1, 2, 5):
        assert_same(before, result.program, (torch.randn(batch, *shape),), rtol=1e-6)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.relu(y) + y


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (Twice(), (5,), "linear is also used by add"),
        (nn.Sequential(nn.Linear(5, 7), nn.LeakyReLU(0.2)), (5,), "leaky_relu has slope 0.2"),
        (nn.Sequential(nn.Linear(5, 7), nn.Hardtanh()), (5,), "clamping to (-1.0, 1.0)"),
        (nn.Sequential(nn.Linear(5, 7), nn.ELU()), (5,), "elu.default is no activation"),
    ],
)
def test_refuses(module: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    result = run_pass(FuseActivation(), capture(module, (torch.randn(3, *shape),), dynamic=({0: "B"},)))
    assert result.matches == 0
    assert reason in reasons(result)


# PyTorch itself warns about the copy that uneven padding needs.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_refuses_uneven_padding() -> None:
    module = nn.Sequential(nn.Conv1d(3, 4, 2, padding="same"), nn.ReLU())
    before = capture(module, (torch.randn(3, 3, 6),), dynamic={}, canonicalize=False)
    assert "padding 'same' of an even kernel [2] is uneven" in reasons(run_pass(FuseActivation(), before))


def test_other_activation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from irc.core.program import Program

    right = Program.insert
    monkeypatch.setattr(Program, "insert", lambda *args, **kw: right(*args, **kw | {"activation": "silu"}))
    before = capture(nn.Sequential(nn.Linear(5, 7), nn.ReLU()), (torch.randn(3, 5),))
    _, findings = run_with_findings(FuseActivation(), before)
    assert "silu" in findings[0].problem
