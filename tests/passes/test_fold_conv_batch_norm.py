from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from irc.core.program import Program
from irc.frontend import capture
from irc.passes import FoldConvBatchNorm
from tests.passes.running import assert_same, operations, reasons, run_pass, run_with_findings


def settled(module: nn.Module) -> nn.Module:
    """The module in evaluation, its batch norms with random statistics and parameters."""
    generator = torch.Generator().manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            for tensor in (child.running_mean, child.weight, child.bias):
                if tensor is not None:
                    tensor.data.normal_(generator=generator)
            if child.running_var is not None:
                child.running_var.uniform_(0.5, 2, generator=generator)
    return module.eval()


def program_of(*layers: nn.Module, x: Tensor) -> Program:
    torch.manual_seed(0)
    return capture(settled(nn.Sequential(*layers)), (x,), dynamic=({0: "B"},))


CASES = {
    "1d": (lambda: [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)], (3, 9)),
    "2d": (lambda: [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)], (3, 9, 8)),
    "3d": (lambda: [nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)], (2, 5, 4, 3)),
    "grouped": (lambda: [nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding="same"), nn.BatchNorm2d(8)], (4, 9, 9)),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)], (4, 5, 5)),
    "no affine": (lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)], (3, 9, 8)),
    "linear": (lambda: [nn.Linear(5, 7), nn.BatchNorm1d(7)], (5,)),
}


@pytest.mark.parametrize("case", CASES)
def test_rewrites(case: str) -> None:
    build, shape = CASES[case]
    torch.manual_seed(1)
    before = program_of(*build(), x=torch.randn(3, *shape))
    result = run_pass(FoldConvBatchNorm(), before)
    assert result.matches == 1
    assert result.skips == []
    counts = operations(result.program)
    assert counts["batch_norm"] == 0
    assert sum(counts.values()) == 1
    assert sum(result.program.weights[name].ndim > 1 for name in result.program.weights) == 1
    for batch in (1, 2, 5):
        assert_same(before, result.program, (torch.randn(batch, *shape),))
    assert run_pass(FoldConvBatchNorm(), result.program).matches == 0


def test_half_precision_is_rounded_once() -> None:
    x = torch.randn(2, 3, 6, 6).bfloat16()
    before = program_of(nn.Conv2d(3, 4, 3).bfloat16(), nn.BatchNorm2d(4).bfloat16(), x=x)
    after = run_pass(FoldConvBatchNorm(), before).program
    assert {w.dtype for w in after.weights.values()} == {torch.bfloat16}
    assert_same(before, after, (x,), rtol=0.03)


def test_folded_weights_stay_trainable() -> None:
    x = torch.randn(2, 3, 6, 6)
    after = run_pass(FoldConvBatchNorm(), program_of(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), x=x)).program
    module = after.module()
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class SharedWeight(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.other(self.conv(x + 1))


class ChannelsElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(5, 3), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x))


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (Shared(), (3, 6, 6), "conv2d is also used by add"),
        (SharedWeight(), (3, 6, 6), "weight conv.weight is shared by 2 operations"),
        (ChannelsElsewhere(), (6, 5), "the channel is not its last"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), (3, 6, 6), "neither a convolution nor a linear layer"),
        (nn.BatchNorm2d(3, track_running_stats=False), (3, 6, 6), "training mode"),
    ],
)
def test_refuses(module: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    before = capture(settled(module), (torch.randn(3, *shape),), dynamic=({0: "B"},))
    result = run_pass(FoldConvBatchNorm(), before)
    assert result.matches == 0
    assert reason in reasons(result)


def test_refuses_computed_weight() -> None:
    class Normalized(Shared):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(torch.conv2d(x, self.conv.weight * 2))

    before = capture(settled(Normalized()), (torch.randn(3, 3, 6, 6),), canonicalize=False)
    assert "the weight of conv2d is computed by mul" in reasons(run_pass(FoldConvBatchNorm(), before))


def test_wrong_eps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from irc.passes.fuse import fold_conv_batch_norm as module

    right = module.arguments

    def broken(node: fx.Node) -> dict[str, Any]:
        return right(node) | ({"eps": 0.01} if "batch_norm" in str(node.target) else {})

    monkeypatch.setattr(module, "_fold", _with_arguments(module._fold, broken))
    before = program_of(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), x=torch.randn(3, 3, 6, 6))
    result, findings = run_with_findings(FoldConvBatchNorm(), before)
    assert result.matches == 1
    assert len(findings) == 1
    assert "differs from conv2d and batch_norm" in findings[0].problem


def _with_arguments(function: object, replacement: object) -> object:
    """The function with another `arguments` among its globals."""
    import types

    changed = {**function.__globals__, "arguments": replacement}
    return types.FunctionType(function.__code__, changed)
