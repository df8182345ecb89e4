"""Quantized matmul kernels against the same arithmetic in PyTorch: exact integers, f32 sums of groups."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from irc.core import formats
from irc.core.errors import TargetError
from irc.lowering.cpp.templates import quantized_matmul as template
from irc.lowering.cpp.templates.base import MatmulProblem
from tests.kernels.building import adding_rows, aligned, build, needs_compiler, pointer, runnable_isas, workers_function

# (format, scale, N, K): every kind of layout, odd sizes, groups of one line and beyond a segment.
CASES = (
    ("int4.g32", "f16", 48, 96),
    ("uint4.g32.asym", "f16", 33, 64),
    ("int4.g32", "f32", 70, 576),
    ("int4.g8", "f32", 16, 24),
    ("uint4.g24.asym", "f32", 5, 72),
    ("int4.g128", "f16", 100, 256),
    ("uint4.g40.asym", "f32", 17, 80),
    ("int4.row", "f32", 31, 101 * 2),
    ("uint3.g16.asym", "f32", 20, 48),
    ("int8.g32", "f16", 64, 64),
    ("int8.row", "f32", 47, 333),
    ("uint8.g64.asym", "f32", 40, 192),
    ("uint8.row.asym", "f16", 19, 77),
    ("int8.tensor", "f32", 32, 40),
    ("int6.g16", "f32", 35, 32),
)
ROWS = (1, 2, 3, 5, 6, 7, 8, 12, 13, 16, 17, 100)


def _problem(case: tuple[str, str, int, int], activation: str = "f32") -> MatmulProblem:
    text, scale, columns, depth = case
    asymmetric = text.endswith("asym")
    return MatmulProblem(
        rows="rows",
        columns=columns,
        depth=depth,
        weight=text,
        scale=scale,
        asymmetric=asymmetric,
        activation=activation,
    )


def _function(name: str, problem: MatmulProblem) -> str:
    args = {"worker": "worker", "x": "x", "stride": "stride", "packed": "packed", "scratch": "scratch"}
    c_type = {"f32": "float", "bf16": "irc::bf16", "f16": "irc::f16"}[problem.activation]
    parameters = f"const {c_type}* x, int64_t stride, const uint8_t* packed, int64_t rows, uint8_t* scratch, float* out"
    return workers_function(name, parameters, template.call(problem, args, adding_rows(problem.columns)))


@pytest.fixture(scope="module", params=runnable_isas())
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    functions = [_function(f"case{i}", _problem(case)) for i, case in enumerate(CASES)]
    functions.append(_function("halves", _problem(CASES[0], "bf16")))
    return build(template.INCLUDES, functions, request.param)


def _run(kernels: ctypes.CDLL, name: str, problem: MatmulProblem, x: Tensor, packed: Tensor, threads: int) -> Tensor:
    """Calls the kernel; the epilogue adds, so that an element reached twice or never shows."""
    rows = x.shape[0]
    # A row stride beyond the row, and memory that ends where the last row does.
    wide = torch.cat([x, torch.full((rows, 3), torch.nan, dtype=x.dtype)], 1).contiguous()
    memory = aligned(packed.numel())
    memory.copy_(packed)
    out = torch.zeros(rows, problem.columns)
    scratch = aligned(template.scratch_bytes(problem, rows, threads))
    long = ctypes.c_int64
    getattr(kernels, name)(
        threads, pointer(wide), long(wide.shape[1]), pointer(memory), long(rows), pointer(scratch), pointer(out)
    )
    return out


def _reference(x: Tensor, parts: formats.Parts, chosen: formats.QuantFormat) -> tuple[Tensor, Tensor]:
    """(y, bound): exact sums a group, everything else in f64; bound: of f32's sum over the groups."""
    largest = x.float().abs().amax(1, keepdim=True)
    token_scale = torch.where(largest == 0, torch.ones_like(largest), largest / 127)
    quantized = torch.round(x.float() / token_scale).double()
    assert parts.scale is not None
    weights = chosen.unpack(parts.stored).double().unflatten(1, (parts.scale.shape[1], -1))
    if parts.zero_point is not None:
        weights = weights - parts.zero_point.double().unsqueeze(-1)
    groups = quantized.unflatten(1, (weights.shape[1], -1))
    sums = torch.einsum("mgk,ngk->mng", groups, weights) * parts.scale.double()
    bound = (weights.shape[1] + 2) * 2.0**-24 * sums.abs().sum(-1)
    return sums.sum(-1) * token_scale, bound * token_scale


def _weights(case: tuple[str, str, int, int], seed: int = 0) -> tuple[formats.QuantFormat, formats.Parts]:
    text, scale, columns, depth = case
    chosen = formats.parse(text)
    assert isinstance(chosen, formats.QuantFormat)
    weight = torch.randn(columns, depth, generator=torch.Generator().manual_seed(seed))
    dtype = torch.float16 if scale == "f16" else torch.float32
    return chosen, formats.quantize_tensor(weight, chosen, dtype)


@needs_compiler
@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{c[0]}-{c[1]}-{c[2]}x{c[3]}" for c in CASES])
def test_equals_the_reference(kernels: ctypes.CDLL, index: int) -> None:
    chosen, parts = _weights(CASES[index])
    problem = _problem(CASES[index])
    packed = template.pack(problem, *parts)
    assert packed.numel() == template.packed_bytes(problem)
    generator = torch.Generator().manual_seed(1)
    for rows in ROWS:
        x = torch.randn(rows, problem.depth, generator=generator) * torch.rand(rows, 1, generator=generator) * 10
        wanted, bound = _reference(x, parts, chosen)
        for threads in (1, 3):
            found = _run(kernels, f"case{index}", problem, x, packed, threads)
            excess = ((found - wanted).abs() - bound).max()
            assert excess <= 0, f"{rows} rows, {threads} threads: {float(excess):.3g} beyond the bound"


@needs_compiler
@pytest.mark.parametrize("index", [0, 1, 5, 9, 11], ids=lambda i: CASES[i][0])
def test_integer_sums_are_exact_at_the_extremes(kernels: ctypes.CDLL, index: int) -> None:
    """Largest weights against largest activations, all of one sign, with scales of 1: every sum is a whole number."""
    chosen, parts = _weights(CASES[index])
    problem = _problem(CASES[index])
    assert parts.scale is not None
    ones = torch.ones_like(parts.scale)
    for weight in (chosen.lowest_stored, chosen.high):
        values = torch.full((problem.columns, problem.depth), weight, dtype=torch.int16)
        for zero in (None,) if chosen.symmetric else (chosen.low, chosen.high):
            zero_point = None if zero is None else torch.full_like(ones, zero).to(chosen.zero_point_dtype)
            packed = template.pack(problem, chosen.pack(values), ones, zero_point)
            for sign in (1.0, -1.0):
                x = torch.full((7, problem.depth), 127.0 * sign)
                found = _run(kernels, f"case{index}", problem, x, packed, 2)
                assert torch.equal(found, torch.full_like(found, 127 * sign * (weight - (zero or 0)) * problem.depth))
                found = _run(kernels, f"case{index}", problem, x[:1], packed, 2)
                assert torch.equal(found, torch.full_like(found, 127 * sign * (weight - (zero or 0)) * problem.depth))


@needs_compiler
def test_activations_in_bf16(kernels: ctypes.CDLL) -> None:
    chosen, parts = _weights(CASES[0])
    problem = _problem(CASES[0], "bf16")
    x = torch.randn(9, problem.depth, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted, bound = _reference(x, parts, chosen)
    found = _run(kernels, "halves", problem, x, template.pack(problem, *parts), 2)
    assert bool(((found - wanted).abs() <= bound).all())


@needs_compiler
def test_zeros_ties_and_numbers_that_are_none(kernels: ctypes.CDLL) -> None:
    chosen, parts = _weights(CASES[0])
    problem = _problem(CASES[0])
    packed = template.pack(problem, *parts)
    x = torch.randn(4, problem.depth, generator=torch.Generator().manual_seed(3))
    x[0] = 0
    x[1] = torch.arange(problem.depth) / 2 - 20  # halves, once the scale is 1
    x[1, -1] = 127
    x[2, 5] = torch.nan
    x[3, 70] = -torch.inf
    for rows in (x, x[1:2], x[2:3], x[3:]):
        found = _run(kernels, "case0", problem, rows, packed, 2)
        finite = rows.isfinite().all(1)
        wanted, bound = _reference(torch.where(finite[:, None], rows, 0), parts, chosen)
        assert bool(((found - wanted).abs() <= bound)[finite].all())
        assert bool(found[~finite].isnan().all())


def test_gguf_blocks_are_packed_as_integers() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    for text, same in (("q4_0", "int4.g32"), ("q8_0", "int8.g32")):
        blocks = formats.quantize_tensor(weight, formats.parse(text))
        problem = MatmulProblem(rows=1, columns=32, depth=64, weight=text, scale="f16")
        parts = formats.repack(*blocks[:3], formats.parse(text), formats.parse(same))
        plain = MatmulProblem(rows=1, columns=32, depth=64, weight=same, scale="f16")
        assert torch.equal(template.pack(problem, *blocks), template.pack(plain, *parts))


def test_packing_loses_nothing() -> None:
    """Every nibble, scale and zero point is found where the layout in irc/qmatmul.h says."""
    problem = _problem(("uint4.g32.asym", "f16", 33, 64))
    chosen, parts = _weights(("uint4.g32.asym", "f16", 33, 64))
    panels = template.pack(problem, *parts).view(3, 2, 256 + 32 + 16)
    assert parts.scale is not None
    assert parts.zero_point is not None
    values = chosen.unpack(parts.stored)
    for n, k in ((0, 0), (5, 37), (32, 63), (17, 31)):
        line = panels[n // 16, k // 32, k % 32 // 8 * 64 :]
        byte = int(line[n % 16 * 4 + k % 4])
        assert (byte >> 4 if k % 8 >= 4 else byte & 15) == values[n, k]
        scales = panels[n // 16, k // 32, 256:288].contiguous().view(torch.float16)
        assert scales[n % 16] == parts.scale[n, k // 32]
        assert panels[n // 16, k // 32, 288 + n % 16] == parts.zero_point[n, k // 32]


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (MatmulProblem(rows=1, columns=8, depth=64, weight="f8e4m3.row"), "no integer format"),
        (MatmulProblem(rows=1, columns=8, depth=64, weight="int4.g4"), "no multiple of 8"),
        (MatmulProblem(rows=1, columns=8, depth=60, weight="int4.g32"), "does not divide"),
        (MatmulProblem(rows=1, columns=8, depth=64, weight="int4.g32", scale="bf16"), "f16 and f32"),
        (MatmulProblem(rows=1, columns=8, depth=64, weight="int4.g32", activation="f64"), "known: f32"),
        (MatmulProblem(rows=1, columns=8, depth=1 << 17, weight="int4.g32"), "overflow"),
        (MatmulProblem(rows=1, columns=8, depth=64, weight="none"), "not a quantization format"),
    ],
)
def test_refuses(problem: MatmulProblem, reason: str) -> None:
    found = template.refuses(problem, "avx2")
    assert found is not None
    assert reason in found
    with pytest.raises(TargetError):
        template.pack(problem, torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 2))


def test_pack_refuses_what_it_cannot_hold() -> None:
    problem = MatmulProblem(rows=1, columns=8, depth=64, weight="int4.g32", scale="f16")
    stored = torch.zeros(8, 32, dtype=torch.uint8)
    with pytest.raises(TargetError, match="not exact in f16"):
        template.pack(problem, stored, torch.full((8, 2), 0.1))
    with pytest.raises(TargetError, match="zero point"):
        template.pack(problem, stored, torch.ones(8, 2), torch.ones(8, 2, dtype=torch.uint8))
    with pytest.raises(TargetError, match=r"weight is \[9, 64\]"):
        template.pack(problem, torch.zeros(9, 32, dtype=torch.uint8), torch.ones(9, 2))
    asymmetric = MatmulProblem(rows=1, columns=8, depth=64, weight="uint4.g32.asym", asymmetric=True)
    with pytest.raises(TargetError, match="0 to 16"):
        template.pack(asymmetric, stored, torch.ones(8, 2), torch.full((8, 2), 17, dtype=torch.uint8))
