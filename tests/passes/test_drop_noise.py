"""f(x) → x, for every f that the types prove to be the identity."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from irc.core.contract import PassContext, PassResult
from irc.frontend import capture
from irc.passes import DropNoise
from tests.zoo import captured


class Fn(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) * 2


def dropped(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[list[str], PassResult]:
    program = capture(Fn(function), x, canonicalize=False)
    expected = program.run(x)
    result = DropNoise().run(program.copy(), PassContext())
    assert torch.equal(result.program.run(x)[0], expected[0])
    return [str(node.target) for node in result.program.operations()], result


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.float(),
        lambda x: x.to(torch.float32).clone(),
        lambda x: x[:, :],
        lambda x: x.expand(-1, 6),
        lambda x: x.view(x.shape[0], 6),
        lambda x: x.squeeze(1),
        lambda x: torch.dropout(x, 0.5, False),
        lambda x: torch.dropout(x, 0.0, True),
        lambda x: x.detach(),
    ],
)
def test_identities_go(function: Callable[[Tensor], Tensor]) -> None:
    targets, result = dropped(function, torch.randn(3, 6))
    assert targets == ["aten.mul.Tensor"]
    assert result.matches >= 1


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x: x.double(), "aten.to.dtype"),
        (lambda x: x[:, 1:], "aten.slice.Tensor"),
        (lambda x: x[:, ::2], "aten.slice.Tensor"),
        (lambda x: x[None].expand(2, -1, -1), "aten.expand.default"),
        (lambda x: x.view(-1, 3), "aten.reshape.default"),
    ],
)
def test_what_changes_something_stays(function: Callable[[Tensor], Tensor], kept: str) -> None:
    assert kept in dropped(function, torch.randn(3, 6))[0]


def test_active_dropout_is_skipped_with_its_reason() -> None:
    program = capture(Fn(lambda x: torch.dropout(x, 0.5, True)), torch.randn(3, 6), canonicalize=False)
    result = DropNoise().run(program.copy(), PassContext())
    assert result.matches == 0
    assert [skip.reason for skip in result.skips] == [
        "dropout is active (train=True): capture the model in evaluation mode"
    ]


def test_a_dropped_copy_does_not_break_a_view() -> None:
    targets, _ = dropped(lambda x: x.t().contiguous().view(-1), torch.randn(3, 6))
    assert targets == ["aten.t.default", "aten.reshape.default", "aten.mul.Tensor"]


@pytest.mark.parametrize("name", ["llama", "cnn", "alibi"])
def test_models(name: str) -> None:
    before = captured(name, canonicalize=False)
    result = DropNoise().run(before.copy(), PassContext())
    assert before.example_inputs is not None
    expected, outputs = before.run(*before.example_inputs), result.program.run(*before.example_inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True))
    types = [str(node.meta["val"]) for node in result.program.operations()]
    result.program.infer_types()
    assert [str(node.meta["val"]) for node in result.program.operations()] == types
    assert DropNoise().run(result.program, PassContext()).matches == 0
