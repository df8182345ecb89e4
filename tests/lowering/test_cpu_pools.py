"""Average pools on target cpu: what a window's sum is divided by at the edges of an image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from irc.core.target import get_target
from irc.frontend import capture
from irc.lowering.cpp.build import find_compiler

CPU = get_target("cpu")
QUICK = {"threads": 1, "flags": ("-O1",)}
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler (g++ or clang++)")


class Pools(nn.Module):
    """Some pools of an image, and one of its first row."""

    def __init__(self, *pools: nn.Module) -> None:
        super().__init__()
        self.pools = nn.ModuleList(pools)
        self.line = nn.AvgPool1d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (*(pool(x) for pool in self.pools), self.line(x[:, :, 0]))


# Windows that end in the padding, behind it, or are larger than the image; of these, a last one never starts behind it.
OF_ANY_SIZE = (
    nn.AvgPool2d(3, stride=2, padding=1),
    nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, divisor_override=5),
    nn.AvgPool2d((4, 5), stride=(3, 2), padding=(1, 2), ceil_mode=True),
    nn.AvgPool2d((4, 5), stride=(3, 2), padding=(1, 2), ceil_mode=True, count_include_pad=False),
    nn.AvgPool2d(2000, stride=2000, ceil_mode=True),
    nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
)
OF_KNOWN_SIZE = (
    nn.AvgPool2d((2, 3), stride=(4, 3), ceil_mode=True),
    nn.AvgPool2d(4, stride=3, padding=2, ceil_mode=True),
    nn.AvgPool2d(4, stride=3, padding=2, ceil_mode=True, count_include_pad=False),
    nn.MaxPool2d(2, stride=3, padding=1, ceil_mode=True),
)


@pytest.mark.parametrize(
    ("pools", "dynamic"), [((*OF_ANY_SIZE, *OF_KNOWN_SIZE), {0: "B"}), (OF_ANY_SIZE, {0: "B", 2: "H"})]
)
def test_partial_windows(pools: tuple[nn.Module, ...], dynamic: dict[int, str]) -> None:
    torch.manual_seed(0)
    model = Pools(*pools).eval()
    program = capture(model, (torch.randn(2, 3, 10, 12),), dynamic=(dynamic,))
    artifact = CPU.lower(program, QUICK)
    assert "2000" not in artifact.source or 2 in dynamic  # of a huge window, only the image is walked
    for height in (10, 9, 8, 7) if 2 in dynamic else (10,):
        x = torch.randn(3, 3, height, 12)
        for wanted, found in zip(model(x), artifact.run(x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pool", OF_KNOWN_SIZE)
def test_refuses_windows_that_may_be_dropped(pool: nn.Module) -> None:
    program = capture(pool, (torch.randn(2, 3, 11, 12),), dynamic=({2: "H"},))
    assert "ceil_mode" in str(CPU.check(program))
