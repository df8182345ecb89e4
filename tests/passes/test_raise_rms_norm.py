from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from irc.core.program import Program
from irc.frontend import capture
from irc.passes import FoldConstants, RaiseRmsNorm
from tests.passes.raising import Function, captured, raised
from tests.passes.running import operations, reasons, run_pass

E = 6
WEIGHT = torch.linspace(0.5, 2.0, E)


SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pow-rsqrt": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w,
    "weight-first": lambda x, w: w * (x * torch.rsqrt(1e-5 + x.pow(2).mean(-1, keepdim=True))),
    "product": lambda x, w: x * torch.rsqrt((x * x).mean(2, keepdim=True) + 1e-5) * w,
    "square-sqrt": lambda x, w: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w,
    "inverse": lambda x, w: x * (1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)) * w,
    "power": lambda x, w: x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).pow(-0.5) * w,
    "library": lambda x, w: F.rms_norm(x, (E,), w, 1e-5),
    "casts": lambda x, w: (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w,
}


def program(function: Callable[..., Tensor], *weights: Tensor, dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    return captured(function, (torch.randn(3, 4, E).to(dtype),), *weights)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(spelling: str) -> None:
    result = raised(RaiseRmsNorm(), program(SPELLINGS[spelling], WEIGHT), widths=[(E,)])
    assert operations(result.program) == {"rms_norm": 1}
    norm = next(result.program.operations())
    assert norm.args[2] == 1e-5
    assert str(norm.args[1].target).endswith("w0")
    assert (result.matches, list(result.skips)) == (1, [])


def test_without_weight_and_default_eps() -> None:
    result = raised(RaiseRmsNorm(), program(lambda x: F.rms_norm(x, (E,))), widths=[(E,)])
    assert operations(result.program) == {"rms_norm": 1}
    assert next(result.program.operations()).args[1:] == (None, torch.finfo(torch.float32).eps)


def test_gemma_weight_is_folded() -> None:
    def gemma(x: Tensor, w: Tensor) -> Tensor:
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).type_as(x)

    result = raised(RaiseRmsNorm(), program(gemma, WEIGHT), widths=[(E,)])
    folded = run_pass(FoldConstants(), result.program)
    assert operations(folded.program) == {"rms_norm": 1}
    torch.testing.assert_close(next(iter(folded.program.weights.values())), 1 + WEIGHT)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_half_types(weight_dtype: torch.dtype) -> None:
    def after(x: Tensor, w: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    def before(x: Tensor, w: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return (w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5))).to(x.dtype)

    for function, in_f32 in ((after, False), (before, True)):
        before_pass = program(function, WEIGHT.to(weight_dtype), dtype=torch.bfloat16)
        result = raised(RaiseRmsNorm(), before_pass, widths=[(E,)], dtype=torch.bfloat16)
        assert operations(result.program) == {"rms_norm": 1}
        assert next(result.program.operations()).kwargs.get("weight_in_f32", False) is in_f32


REFUSED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str]] = {
    "other dimension": (
        lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5), (), "dim",
    ),
    "eps is a tensor": (
        lambda x, e: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e), (torch.full((1,), 1e-5),),
        "expected a float",
    ),
    "another value": (
        lambda x: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), (), "elsewhere in the pattern",
    ),
    "two dimensions": (lambda x: F.rms_norm(x, (4, E)), (), "over 2 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_the_reason(name: str) -> None:
    function, weights, reason = REFUSED[name]
    x = torch.randn(3, 4, E)
    before = _static(function, x) if name == "two dimensions" else captured(function, (x,), *weights)
    result = run_pass(RaiseRmsNorm(), before)
    assert result.matches == 0
    assert reason in reasons(result)
    assert operations(result.program) == operations(before)


def _static(function: Callable[..., Tensor], x: Tensor) -> Program:
    """Only the batch is dynamic: the normalized sizes must be fixed."""
    return capture(Function(function), (x,), dynamic=(({0: "B"},),), canonicalize=False)


def test_a_value_used_elsewhere_is_refused() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return x * inverse * w + inverse

    result = run_pass(RaiseRmsNorm(), program(function, WEIGHT))
    assert result.matches == 0
    assert "is also used by add" in reasons(result)


def test_weight_of_another_shape_stays_outside() -> None:
    result = raised(
        RaiseRmsNorm(), program(lambda x, w: SPELLINGS["pow-rsqrt"](x, w), torch.tensor([2.0])), widths=[(E,)]
    )
    assert operations(result.program) == {"rms_norm": 1, "mul": 1}
    assert "the weight has shape [1], expected [6]" in reasons(result)
