"""Compiled round-to-nearest gives the numbers of PyTorch, to the bit, and finds the same groups wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from irc.core import formats
from irc.core.formats import QuantFormat
from irc.core.toolchain import find_compiler, supported_isas
from irc.passes.quantize import _compiled_rounding as compiled
from irc.passes.quantize import _round_to_nearest as rounding

pytestmark = pytest.mark.skipif(
    find_compiler() is None or "avx2" not in supported_isas(), reason="needs a compiler and AVX2"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = (
    "int4.g32", "int4.g8", "int4.g40", "int4.row.asym", "uint4.g32.asym", "int8.g32", "int8.row", "uint8.row.asym",
    "uint8.g8", "int2.g16", "int3.g64.asym", "uint3.g40.asym", "int5.g40",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    compiled.start_building()
    assert compiled._building().result(timeout=120) is not None
    assert compiled.ready() is not None


def weights(dtype: torch.dtype, size: float) -> Tensor:
    """[208, 320]: random rows, one of zeros, one of positive numbers and one of ones and others."""
    torch.manual_seed(0)
    weight = torch.randn(208, 320) * size
    weight[3], weight[4, :160], weight[5] = 0, 1, weight[5].abs()
    return weight.to(dtype)


def by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "ready", lambda: None)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_the_same_numbers(text: str, scale_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = formats.parse(text)
    assert isinstance(chosen, QuantFormat)
    for dtype in DTYPES:
        # The smallest lose their scale in f16.
        for size in (1.0, 1e-7, 1e-30, 1e4):
            weight = weights(dtype, size)
            made = rounding.round_to_nearest(weight, chosen, scale_dtype)
            taken = [torch.empty_like(part) if part is not None else None for part in made]
            stored, scale, zero = taken
            assert stored is not None
            assert scale is not None
            assert compiled.quantize_rows(weight, chosen, stored, scale, zero), "not done by compiled code"
            with monkeypatch.context() as without:
                by_pytorch(without)
                expected = rounding.round_to_nearest(weight, chosen, scale_dtype)
                worst = rounding.worst_group(weight, *expected, chosen, dtype)
            for one, other in zip(expected, taken, strict=True):
                assert one is None or (other is not None and torch.equal(one, other)), (dtype, size)
            assert rounding.worst_group(weight, *expected, chosen, dtype) == worst


@pytest.mark.parametrize("text", FORMATS)
def test_a_wrong_number_is_found(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = formats.parse(text)
    assert isinstance(chosen, QuantFormat)
    weight = weights(torch.float32, 1.0)
    stored, scale, zero = rounding.round_to_nearest(weight, chosen, torch.float16)
    stored[101, 7] ^= 2
    found = rounding.worst_group(weight, stored, scale, zero, chosen, torch.float32)
    share = compiled.worst_error(weight, chosen, stored, scale, zero, torch.float32)
    by_pytorch(monkeypatch)
    expected = rounding.worst_group(weight, stored, scale, zero, chosen, torch.float32)
    assert found == expected is not None
    assert share == pytest.approx(expected[0], rel=1e-6)


def test_numbers_that_are_not_finite_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = formats.parse("int4.g32")
    assert isinstance(chosen, QuantFormat)
    for value in (torch.inf, torch.nan):
        weight = weights(torch.float32, 1.0)
        stored, scale, _ = rounding.round_to_nearest(weight, chosen, torch.float32)
        weight[200, 319] = value
        assert not compiled.quantize_rows(weight, chosen, stored, scale, None)
        assert compiled.worst_error(weight, chosen, stored, scale, None, torch.float32) == torch.inf


@pytest.mark.parametrize("why", ["small", "double", "groups of 12", "turned"])
def test_what_is_left_to_pytorch(why: str) -> None:
    chosen = QuantFormat(8, 12 if why == "groups of 12" else 16)
    weight = torch.randn(*((16, 48) if why == "small" else (240, 480)))
    weight = weight.double() if why == "double" else weight.t().contiguous().t() if why == "turned" else weight
    stored = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], weight.shape[1] // (chosen.group_size or 1))
    assert not compiled.quantize_rows(weight, chosen, stored, scale, None)


def test_a_large_model_makes_the_pass_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    import irc
    from irc import compiler
    from irc.passes.quantize.quantize_weights import QuantizeWeights

    told = []
    monkeypatch.setattr(QuantizeWeights, "get_ready", lambda self, numbers, size: told.append(self.bits) or size)
    monkeypatch.setattr(compiler, "_LARGE", 64 * 64 * 4)
    for width in (32, 64):
        model = torch.nn.Linear(width, width, bias=False)
        irc.compile(model, "quantize-weights{bits=4,group-size=32}", example_inputs=torch.randn(1, width))
    assert told == [4]
