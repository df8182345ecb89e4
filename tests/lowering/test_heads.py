"""What decoders do around attention, on the targets that generate code: norms over heads, biases that are slices, and
the choice of experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import irc
from irc.core.target import get_target
from irc.lowering.cpp.build import find_compiler
from irc.lowering.triton.module import installed

MISSING = {
    "cpu": "needs a C++ compiler (g++ or clang++)" if find_compiler() is None else "",
    "triton": "" if installed() else "triton is not installed",
}


class NormedHeads(nn.Module):
    """Qwen3's queries: a norm over each head, then rotary positions, which read the other half of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 16))
        angles = torch.arange(8)[:, None] * 0.3 ** torch.arange(8)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.ops.irc.rms_norm(x.unflatten(-1, (4, 16)), self.weight, 1e-6).transpose(1, 2)
        length = x.shape[1]
        turned = torch.ops.irc.rope(heads, self.cos[:length], self.sin[:length])
        return nn.functional.scaled_dot_product_attention(turned, turned, heads)


class SlicedBias(nn.Module):
    """MPT's attention: the last columns of a table of biases, one for each head and distance."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "bias", torch.linspace(-3, 0, 64).expand(1, 2, 1, 64) * torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, length = x.unflatten(-1, (2, 16)).transpose(1, 2), x.shape[1]
        first_row, first = torch.sym_max(0, 1 - length), torch.sym_max(0, 64 - length)
        return nn.functional.scaled_dot_product_attention(q, q, q + 1, attn_mask=self.bias[:, :, first_row:, first:])


@pytest.mark.parametrize("target", ["cpu", "triton"])
def test_the_largest_few(target: str) -> None:
    if MISSING[target]:
        pytest.skip(MISSING[target])

    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (*x.topk(3), *x.transpose(1, 2).topk(2, dim=1, largest=False))

    x = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    x[0, 0, 3], x[1, 2, 4], x[1, 3, 5] = float("nan"), float("inf"), float("-inf")
    program = irc.capture(Chosen(), (x,), dynamic=({0: "B", 1: "S"},))
    for found, wanted in zip(get_target(target).lower(program).run(x), Chosen()(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", ["cpu", "triton"])
@pytest.mark.parametrize("model", [NormedHeads, SlicedBias])
def test_same_numbers(model: type[nn.Module], target: str) -> None:
    if MISSING[target]:
        pytest.skip(MISSING[target])
    module = model().eval()
    x = torch.randn(2, 5, 64 if model is NormedHeads else 32, generator=torch.Generator().manual_seed(0))
    program = irc.capture(module, (x,), dynamic=({0: "B", 1: "S"},))
    artifact = get_target(target).lower(program)
    torch.testing.assert_close(artifact.run(x)[0], module(x), rtol=1e-5, atol=1e-5)
