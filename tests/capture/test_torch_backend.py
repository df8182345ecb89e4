"""`torch.compile(model, backend="irc")`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from irc import torch_backend
from irc.core.errors import CaptureError
from tests.zoo import built, token_ids


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Broken(nn.Module):
    """A graph break, several outputs, a number as argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, k: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.linear(x)
        if y.sum() > 0:
            y = y * k
        else:
            y = y - k
        return y, {"mean": y.mean()}


def test_new_sizes_reuse_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[dict[str, object]] = []
    original = torch_backend.CompiledGraph._capture

    def counting(self: torch_backend.CompiledGraph, inputs: tuple[Tensor, ...]) -> object:
        program = original(self, inputs)
        captured.append(program.dims)
        return program

    monkeypatch.setattr(torch_backend.CompiledGraph, "_capture", counting)
    model = built("nanogpt")
    compiled = torch.compile(model, backend="irc")
    for size in ((3, 11), (2, 7), (4, 9), (1, 1), (5, 20)):
        ids = token_ids(*size)
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-5, atol=1e-5)
    assert [len(dims) for dims in captured] == [0, 2, 0]  # static, then dynamic for all, and size 1


# Dynamo itself looks at the .grad of a value between two graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graph_breaks_structures_and_gradients() -> None:
    torch.manual_seed(0)
    model = Broken()
    compiled = torch.compile(model, backend="irc")
    for k in (2, 3, 4):
        x = torch.randn(3, 4)
        expected, result = model(x, k), compiled(x, k)
        torch.testing.assert_close(result, expected)
        model.zero_grad()
        expected[0].square().sum().backward()
        wanted = model.linear.weight.grad
        model.zero_grad()
        result[0].square().sum().backward()
        torch.testing.assert_close(model.linear.weight.grad, wanted)


def test_updates_of_weights_are_seen() -> None:
    model = nn.Linear(3, 3)
    compiled = torch.compile(model, backend="irc")
    x = torch.randn(2, 3)
    compiled(x)
    with torch.no_grad():
        model.weight.mul_(2)
    assert torch.equal(compiled(x), model(x))


def test_running_statistics_are_refused() -> None:
    compiled = torch.compile(nn.BatchNorm1d(3).train(), backend="irc")
    with pytest.raises(CaptureError, match=r"(?s)writes into its input .*model.eval\(\)"):
        compiled(torch.randn(4, 3))
