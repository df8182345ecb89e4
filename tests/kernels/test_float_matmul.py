"""Float matmul kernels against f64, within the bound of f32 sums."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from irc.core import formats
from irc.core.errors import TargetError
from irc.lowering.cpp.templates import float_matmul as template
from irc.lowering.cpp.templates.base import C_TYPES, MatmulProblem
from tests.kernels.building import adding_rows, aligned, build, needs_compiler, pointer, runnable_isas, workers_function

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# (weight, activation, N, K): odd sizes, a depth beyond one block of k, columns beyond one block of columns.
CASES = (
    ("f32", "f32", 48, 64),
    ("f32", "f32", 33, 517),
    ("f32", "f32", 145, 31),
    ("f32", "f32", 1, 1),
    ("f32", "bf16", 40, 50),
    ("bf16", "f32", 37, 259),
    ("bf16", "bf16", 50, 301),
    ("f16", "f16", 21, 40),
    ("f8e4m3.row", "f32", 35, 70),
    ("f8e5m2.tensor", "f32", 16, 33),
    ("f8e4m3.g16", "bf16", 83, 336),
    ("f8e5m2.g96", "f32", 150, 288),
    ("f8e4m3.g3", "f16", 5, 9),
    ("bf16", "f16", 789, 259),
)
ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 16, 17, 97, 130)
# The last case has more columns than a block of many rows; so many rows are more than one.
MANY_ROWS = (24, 211)


def _problem(case: tuple[str, str, int, int]) -> MatmulProblem:
    weight, activation, columns, depth = case
    return MatmulProblem(rows="rows", columns=columns, depth=depth, weight=weight, activation=activation)


def _function(name: str, problem: MatmulProblem) -> str:
    args = {"worker": "worker", "x": "x", "stride": "stride", "packed": "packed", "scratch": "scratch"}
    operands = f"const {C_TYPES[problem.activation]}* x, int64_t stride, const uint8_t* packed"
    parameters = f"{operands}, int64_t rows, uint8_t* scratch, float* out"
    return workers_function(name, parameters, template.call(problem, args, adding_rows(problem.columns)))


@pytest.fixture(scope="module", params=runnable_isas())
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    functions = [_function(f"case{i}", _problem(case)) for i, case in enumerate(CASES)]
    return build(template.INCLUDES, functions, request.param)


def _weight(case: tuple[str, str, int, int]) -> tuple[tuple[Tensor, ...], Tensor]:
    """(arguments of pack, the weight in f64)."""
    text, _, columns, depth = case
    weight = torch.randn(columns, depth, generator=torch.Generator().manual_seed(0))
    if text in _DTYPES:
        weight = weight.to(_DTYPES[text])
        return (weight,), weight.double()
    parts = formats.quantize_tensor(weight, formats.parse(text))
    assert parts.scale is not None
    scales = parts.scale.double().repeat_interleave(depth // parts.scale.shape[1], 1)
    return (parts.stored, parts.scale), parts.stored.float().double() * scales


@needs_compiler
@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_equals_the_reference(kernels: ctypes.CDLL, index: int) -> None:
    case = CASES[index]
    problem = _problem(case)
    arguments, weight = _weight(case)
    packed = template.pack(problem, *arguments)
    assert packed.numel() == template.packed_bytes(problem)
    memory = aligned(packed.numel())
    memory.copy_(packed)
    generator = torch.Generator().manual_seed(1)
    for rows in MANY_ROWS if index == len(CASES) - 1 else ROWS:
        x = torch.randn(rows, problem.depth, generator=generator).to(_DTYPES[problem.activation])
        wide = torch.cat([x, torch.full((rows, 5), torch.nan, dtype=x.dtype)], 1).contiguous()
        wanted = x.double() @ weight.t()
        bound = (problem.depth + 4) * 2.0**-24 * (x.double().abs() @ weight.abs().t())
        for threads in (1, 3):
            out = torch.zeros(rows, problem.columns)
            scratch = aligned(template.scratch_bytes(problem, rows, threads))
            getattr(kernels, f"case{index}")(
                threads,
                pointer(wide),
                ctypes.c_int64(wide.shape[1]),
                pointer(memory),
                ctypes.c_int64(rows),
                pointer(scratch),
                pointer(out),
            )
            excess = ((out - wanted).abs() - bound).max()
            assert excess <= 0, f"{rows} rows, {threads} threads: {float(excess):.3g} beyond the bound"


@needs_compiler
def test_every_8_bit_float_is_read_exactly(kernels: ctypes.CDLL) -> None:
    """A weight of one column of k holds all bit patterns: 16 rows at a time against an activation of 1."""
    for index, dtype in ((8, torch.float8_e4m3fn), (9, torch.float8_e5m2)):
        problem = _problem(CASES[index])
        patterns = torch.arange(256, dtype=torch.uint8).view(dtype)
        patterns = patterns[patterns.float().isfinite()]
        size = problem.columns * problem.depth
        weight = torch.cat([patterns, patterns.new_zeros(size - len(patterns))]).view(problem.columns, problem.depth)
        memory = template.pack(problem, weight, torch.ones(1, 1))
        for k in range(problem.depth):
            x = torch.zeros(1, problem.depth)
            x[0, k] = 1
            out = torch.zeros(1, problem.columns)
            getattr(kernels, f"case{index}")(
                1, pointer(x), ctypes.c_int64(problem.depth), pointer(memory), ctypes.c_int64(1), None, pointer(out)
            )
            assert torch.equal(out[0], weight.float()[:, k])


@pytest.mark.parametrize(
    ("weight", "activation", "reason"),
    [
        ("int4.g32", "f32", "no float format"),
        ("f8e4m3.g24", "f32", "groups of 24 do not divide 32"),
        ("f32", "f64", "known: f32"),
        ("f33", "f32", "not a quantization format"),
    ],
)
def test_refuses(weight: str, activation: str, reason: str) -> None:
    problem = MatmulProblem(rows=1, columns=8, depth=32, weight=weight, activation=activation)
    found = template.refuses(problem, "avx2")
    assert found is not None
    assert reason in found
    with pytest.raises(TargetError):
        template.pack(problem, torch.zeros(8, 32))


def test_pack_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(TargetError, match=r"weight is \[9, 32\]"):
        template.pack(MatmulProblem(rows=1, columns=8, depth=32, weight="f32"), torch.zeros(9, 32))
    with pytest.raises(TargetError, match="the problem says bf16"):
        template.pack(MatmulProblem(rows=1, columns=8, depth=32, weight="bf16"), torch.zeros(8, 32))
    eight = MatmulProblem(rows=1, columns=8, depth=32, weight="f8e4m3.row")
    with pytest.raises(TargetError, match="NaN"):
        template.pack(eight, torch.full((8, 32), torch.nan).to(torch.float8_e4m3fn), torch.ones(8, 1))
    with pytest.raises(TargetError, match="without scales"):
        template.pack(eight, torch.zeros(8, 32).to(torch.float8_e4m3fn))
