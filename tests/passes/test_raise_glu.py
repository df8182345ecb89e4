from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from irc.passes import RaiseGlu
from tests.passes.raising import captured, raised
from tests.passes.running import operations, reasons, run_pass

WIDTH = 6
X = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(0))

GATED: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": ("silu", lambda g, u: F.silu(g) * u),
    "up first": ("silu", lambda g, u: u * F.silu(g)),
    "silu by hand": ("silu", lambda g, u: g * torch.sigmoid(g) * u),
    "silu by hand, other order": ("silu", lambda g, u: g * (torch.sigmoid(g) * u)),
    "gelu": ("gelu", lambda g, u: F.gelu(g) * u),
    "gelu tanh": ("gelu_tanh", lambda g, u: F.gelu(g, approximate="tanh") * u),
    "gelu tanh by hand": (
        "gelu_tanh", lambda g, u: 0.5 * g * (1 + torch.tanh(0.7978845608 * (g + 0.044715 * g.pow(3)))) * u,
    ),
    "quick gelu": ("quick_gelu", lambda g, u: g * torch.sigmoid(g * 1.702) * u),
    "relu": ("relu", lambda g, u: F.relu(g) * u),
    "sigmoid": ("sigmoid", lambda g, u: torch.sigmoid(g) * u),
}  # fmt: skip


@pytest.mark.parametrize("name", GATED)
def test_every_activation(name: str) -> None:
    activation, function = GATED[name]
    result = raised(RaiseGlu(), captured(function, (X, X.flip(0))), widths=[(WIDTH,), (WIDTH,)])
    assert operations(result.program) == {"glu": 1}
    glu = next(result.program.operations())
    assert glu.kwargs.get("activation", "silu") == activation
    assert [node.name for node in glu.args] == result.program.input_names
    assert (result.matches, list(result.skips)) == (1, [])


def test_halves_of_one_projection() -> None:
    def fused(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return up * F.silu(gate)

    assert operations(raised(RaiseGlu(), captured(fused, (X,)), widths=[(WIDTH,)]).program) == {"chunk": 1, "glu": 1}
    library = raised(RaiseGlu(), captured(lambda x: F.glu(x, -1), (X,)), widths=[(WIDTH,)])
    assert operations(library.program) == {"chunk": 1, "glu": 1}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda g, u: F.silu(g.mean(-1, keepdim=True)) * u, "have different shapes"),
        (lambda g, u: g * torch.sigmoid(g * 1.5) * u, "a swish of slope 1.5"),
        (lambda g, u: F.silu(g) * u + F.silu(g), ""),
    ],
)
def test_refuses_with_the_reason(function: Callable[..., Tensor], reason: str) -> None:
    before = captured(function, (X, X.flip(0)))
    result = run_pass(RaiseGlu(), before)
    assert reason in reasons(result)
    if reason:
        assert result.matches == 0


def test_an_activation_of_one_value_is_not_gated() -> None:
    result = run_pass(RaiseGlu(), captured(lambda x: x * torch.sigmoid(1.702 * x), (X,)))
    assert (result.matches, operations(result.program)) == (0, {"mul": 2, "sigmoid": 1})
