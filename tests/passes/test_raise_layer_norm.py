from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from irc.passes import RaiseLayerNorm
from tests.passes.raising import captured, raised
from tests.passes.running import operations, reasons, run_pass

E = 6
X = torch.randn(3, 4, E, generator=torch.Generator().manual_seed(0))
WEIGHT, BIAS = torch.linspace(0.5, 2.0, E), torch.linspace(-1.0, 1.0, E)


def centered(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "pow": lambda x: centered(x) * torch.rsqrt(centered(x).pow(2).mean(-1, keepdim=True) + 1e-5),
    "product": lambda x: centered(x) / torch.sqrt((centered(x) * centered(x)).mean(-1, keepdim=True) + 1e-5),
    "var": lambda x: centered(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5),
    "correction": lambda x: centered(x) * (torch.var(x, -1, correction=0, keepdim=True) + 1e-5).pow(-0.5),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(spelling: str) -> None:
    function = SPELLINGS[spelling]
    result = raised(RaiseLayerNorm(), captured(lambda x, w, b: function(x) * w + b, (X,), WEIGHT, BIAS), widths=[(E,)])
    assert operations(result.program) == {"layer_norm": 1}
    assert (result.matches, list(result.skips)) == (1, [])
    assert next(result.program.operations()).args[4] == 1e-5


@pytest.mark.parametrize(
    ("affine", "left"),
    [
        (lambda y, w, b: y, {}),
        (lambda y, w, b: w * y, {}),
        (lambda y, w, b: y + b, {}),
        (lambda y, w, b: y * 2.0, {"mul": 1}),
    ],
)
def test_weight_and_bias_are_optional(affine: Callable[..., Tensor], left: dict[str, int]) -> None:
    before = captured(lambda x, w, b: affine(SPELLINGS["pow"](x), w, b), (X,), WEIGHT, BIAS)
    assert operations(raised(RaiseLayerNorm(), before, widths=[(E,)]).program) == {"layer_norm": 1, **left}


def test_weight_a_head_stays_outside() -> None:
    before = captured(lambda x, w: SPELLINGS["pow"](x) * w, (torch.randn(3, 4, 2, E),), torch.randn(2, E))
    result = raised(RaiseLayerNorm(), before, widths=[(2, E)])
    assert operations(result.program) == {"layer_norm": 1, "mul": 1}
    assert "the weight has shape [2, 6], expected [6]" in reasons(result)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: centered(x) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5), "expected mean, found var"),
        (
            lambda x: (x - 1) * torch.rsqrt(centered(x).pow(2).mean(-1, keepdim=True) + 1e-5),
            "",  # too little of it is there to call it a near miss
        ),
    ],
)
def test_refuses_with_the_reason(function: Callable[..., Tensor], reason: str) -> None:
    before = captured(function, (X,))
    result = run_pass(RaiseLayerNorm(), before)
    assert (result.matches, operations(result.program)) == (0, operations(before))
    assert reason in reasons(result)
