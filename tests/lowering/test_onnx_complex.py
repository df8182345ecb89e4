"""Complex numbers in ONNX: rotary positions as products of them are written as pairs; what is not known is refused."""

import pytest
import torch
from torch import Tensor, nn

from irc.core.errors import TargetError
from irc.core.program import Program
from irc.core.target import get_target
from irc.frontend import capture

ONNX = get_target("onnx")


class Turn(nn.Module):
    """Numbers turned by angles of positions, by a table, and scaled, as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(16)[:, None] * torch.tensor([1.0, 0.1])
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * torch.tensor([0.5, 0.3])
        numbers = torch.view_as_complex(x.reshape(*x.shape[:2], 2, 2))
        turned = numbers * torch.polar(torch.ones_like(angles), angles).unsqueeze(-3) * x[..., :1]
        return torch.view_as_real(turned * self.table[: x.shape[1]].unsqueeze(0)).flatten(2)


class Conjugate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x).conj_physical()).flatten(1)


def program(model: nn.Module, *shape: int) -> Program:
    return capture(model.eval(), (torch.randn(*shape),), dynamic=({0: "B", 1: "S"},) if len(shape) == 3 else None)


def test_products_become_products_of_pairs() -> None:
    source = program(Turn(), 2, 5, 4)
    assert any(node.target is torch.ops.aten.view_as_complex.default for node in source.operations())
    check = ONNX.lower(source).verify(source)
    assert check.passed, str(check)
    assert check.relative < 1e-6


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(TargetError, match="ONNX has no c64 arithmetic"):
        ONNX.lower(program(Conjugate(), 3, 2))
