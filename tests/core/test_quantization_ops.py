"""Operators that quantize, dequantize and round, against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from irc.core import formats
from irc.core.errors import OptionError
from irc.core.ops import all_ops
from tests.core.op_examples import close, rand


def test_quantize_formula() -> None:
    x, scale = rand(3, 8), rand(3, 2).abs() + 0.05
    made = torch.ops.irc.quantize(x, scale, None, format="int3.g4")
    assert torch.equal(made, (x.view(3, 2, 4) / scale[..., None]).round().clamp(-3, 3).view(3, 8).to(torch.int8))
    back = torch.ops.irc.dequantize(made, scale, None, format="int3.g4", dtype=torch.float64)
    close(back, (made.view(3, 2, 4) * scale[..., None]).view(3, 8).double())


@pytest.mark.parametrize(
    ("text", "given", "reason"),
    [
        ("int4.g4", {}, "format int4.g4 needs a scale"),
        ("q4_0", {"scale": torch.ones(1)}, "format q4_0 has no scale"),
        ("nvfp4", {"scale": torch.ones(1)}, "format nvfp4 needs a tensor_scale"),
        ("nvfp4", {}, "format nvfp4 needs a scale and needs a tensor_scale"),
        ("int8.row", {"scale": torch.ones(1), "tensor_scale": torch.ones(1)}, "format int8.row has no tensor_scale"),
        ("mxfp4", {"scale": torch.ones(1), "zero_point": torch.ones(1)}, "format mxfp4 has no zero_point"),
    ],
)
@pytest.mark.parametrize("op", ["quantize", "dequantize"])
def test_missing_parts_of_a_format_are_named(op: str, text: str, given: dict[str, Tensor], reason: str) -> None:
    parts = {"scale": None, "zero_point": None, "tensor_scale": None} | given
    for function in (all_ops()[op].reference, all_ops()[op].fake):
        with pytest.raises(OptionError) as caught:
            function(torch.zeros(1, 64), **parts, format=text)
        assert str(caught.value) == reason


def test_dynamic_scale_formula() -> None:
    x = rand(3, 5, 8)
    x[1, 2] = 0
    scale = torch.ops.irc.dynamic_scale(x, format="int8.row")
    expected = x.abs().amax(-1, keepdim=True) / 127
    expected[1, 2] = 1
    assert torch.equal(scale, expected)
    grouped = torch.ops.irc.dynamic_scale(x.bfloat16(), format="int4.g4")
    assert grouped.dtype == torch.float32
    assert torch.equal(grouped[0], x[0].bfloat16().float().view(5, 2, 4).abs().amax(-1) / 7 + 0.0)
    assert float(torch.ops.irc.dynamic_scale(x, format="int8.tensor")) == float(x.abs().max() / 127)


def test_dynamic_scale_lets_nan_through() -> None:
    x = rand(2, 8)
    x[0, 3] = torch.nan
    scale = torch.ops.irc.dynamic_scale(x, format="int8.row")
    stored = torch.ops.irc.quantize(x, scale, None, format="int8.row")
    back = torch.ops.irc.dequantize(stored, scale, None, format="int8.row")
    assert bool(back[0].isnan().all())
    assert bool(back[1].isfinite().all())


@pytest.mark.parametrize("text", ["uint8.row.asym", "mxfp4", "q8_0"])
def test_dynamic_scale_needs_a_format_with_one_float_scale(text: str) -> None:
    with pytest.raises(OptionError, match=rf"needs a symmetric format with a float scale, not {text}"):
        torch.ops.irc.dynamic_scale(rand(2, 32), format=text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["row", "tensor", "g4", "row.asym", "tensor.asym"])
def test_fake_quantize_is_quantize_then_dequantize(kind: str, bits: int, dtype: torch.dtype) -> None:
    """Bit for bit, far outside the range and at half steps too."""
    form = formats.parse(f"{'u' if 'asym' in kind else ''}int{bits}.{kind}")
    x = (rand(6, 8, dtype=torch.float64) * torch.logspace(-3, 6, 6).unsqueeze(1)).to(dtype)
    scale = rand(*form.scale_shape((6, 8))).abs() + 0.1
    scale = scale.double() if dtype == torch.float64 else scale
    x[0] = ((torch.arange(8) - 3.5) * scale[0, 0]).to(dtype)
    zero = None if form.symmetric else torch.full_like(scale, form.high // 3, dtype=torch.uint8)
    stored = form.quantize(x, scale, zero)
    expected = torch.ops.irc.dequantize(stored, scale, zero, format=str(form), dtype=dtype)
    for learned in (False, True):
        made = torch.ops.irc.fake_quantize(x, scale, zero, format=str(form), learned=learned)
        assert made.dtype == dtype
        assert torch.equal(made, expected)


@pytest.mark.parametrize("learned", [False, True])
def test_fake_quantize_gradients(learned: bool) -> None:
    """Straight through within the range, nothing outside; the step's gradient as in LSQ, equation 3."""
    values = [-3.0, -0.26, 0.0, 0.24, 0.6, 9.0, 0.1, -0.4]
    x = torch.tensor([values], requires_grad=True)
    scale, upstream = torch.tensor([[0.2]], requires_grad=True), torch.arange(1.0, 9.0).view(1, 8)
    made = torch.ops.irc.fake_quantize(x, scale, None, format="int3.row", learned=learned)
    made.backward(upstream)
    inside = [abs(v / 0.2) <= 3 for v in values]
    assert x.grad is not None
    assert torch.equal(x.grad, upstream * torch.tensor([inside]).float())
    if not learned:
        assert scale.grad is None
        return
    slopes = [round(v / 0.2) - v / 0.2 if i else math.copysign(3, v) for v, i in zip(values, inside, strict=True)]
    expected = (torch.tensor([slopes]) * upstream).sum() / math.sqrt(8 * 3)
    torch.testing.assert_close(scale.grad, expected.view(1, 1))
