"""Products of matrices in Triton's interpreter against dequantized weights, and compiled ahead of time for two GPUs."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from irc.core import formats
from irc.core.formats import QuantFormat
from irc.lowering.triton.module import import_module
from irc.lowering.triton.templates import matmul as template
from irc.lowering.triton.templates.matmul import Config, MatmulProblem

TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
TOLERANCE = 2e-6  # of the largest result: sums of f32 in another order
FEW = Config(kind="tiles", BM=16, BN=16, BK=64, SPLIT=4)
ONE = Config(kind="vector", BM=1, BN=4, BK=64)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Any:
    """Triton decides when it is imported, so kernels run here only where nothing has imported it for compiling."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from irc.lowering.triton.library.matmul import tile_of

    if type(tile_of).__name__ != "InterpretedFunction":
        pytest.skip("triton was imported in this process before TRITON_INTERPRET was set")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def run(problem: MatmulProblem, config: Config, source: str, *operands: Tensor | None) -> Tensor:
    """y [M, N] in f32. Memory holds NaN before; the row behind y has to be as before."""
    rows = operands[0].shape[0]  # type: ignore[union-attr]
    out = torch.full((rows + 1, problem.columns), math.nan)
    module = import_module(source)
    kernels = {kind: getattr(module, kind) for kind in template.KINDS}
    template.launch(problem, config, kernels, rows, (out, *(x for x in operands if x is not None), rows))
    assert out[rows].isnan().all()
    return out[:rows]


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    assert torch.isfinite(found).all()
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def quantized(
    text: str, rows: int, columns: int, depth: int, config: Config, dtype: torch.dtype, *, rounds: bool = False
) -> tuple[Tensor, Tensor]:
    """(y of the kernel, y by the reference, whose weight is rounded to the layer's type if the kernel's is)."""
    chosen = formats.parse(text)
    assert isinstance(chosen, QuantFormat)
    parts = formats.quantize_tensor(random(columns, depth), chosen, dtype)
    problem = MatmulProblem(
        columns=columns, depth=depth, activation=TYPES[dtype], weight=f"int{chosen.bits}", group=chosen.group_size,
        signed=chosen.signed, asymmetric=not chosen.symmetric, scale=TYPES[dtype],
    )  # fmt: skip
    source = template.printed_module(problem)
    if rounds:
        source = source.replace("BK, STAGES)", "BK, STAGES, True)")
    x = random(rows, depth, dtype=dtype)
    found = run(problem, config, source, x, parts.stored, parts.scale, parts.zero_point)
    exact = dtype if rounds or config.kind == "tiles" else torch.float32
    weight = chosen.dequantize(parts.stored, parts.scale, parts.zero_point, exact)
    return found, x.float() @ weight.float().T


# Rows of whole words and not; groups within a tile of 64, across two, as wide as a row, and of no power of two.
FORMATS = [
    ("int8.row", 51), ("uint8.row.asym", 52), ("int8.g16", 144), ("int8.g24.asym", 144), ("uint8.g128", 256),
    ("int4.row", 50), ("uint4.row.asym", 72), ("int4.g8.asym", 104), ("int4.g32", 160), ("uint4.g48.asym", 144),
    ("int4.g64.asym", 192), ("int4.g128", 384), ("int4.g10", 70),
]  # fmt: skip


@pytest.mark.parametrize(("text", "depth"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_of_integers(text: str, depth: int, dtype: torch.dtype) -> None:
    config = FEW if dtype == torch.float32 else replace(FEW, SPLIT=1, BK=32)
    assert_near(*quantized(text, 5, 19, depth, config, dtype))


@pytest.mark.parametrize(("text", "depth"), [f for f in FORMATS if not any(g in f[0] for g in ("g10", "g24", "g48"))])
@pytest.mark.parametrize("rounds", [False, True])
def test_one_row_of_integers(text: str, depth: int, rounds: bool) -> None:
    assert_near(*quantized(text, 1, 10, depth, ONE, torch.float16, rounds=rounds))


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_floats(rows: int, dtype: torch.dtype) -> None:
    problem = MatmulProblem(columns=37, depth=45, activation=TYPES[dtype], weight=TYPES[dtype])
    x, weight = random(rows, 45, dtype=dtype), random(37, 45, dtype=dtype)
    config = template.choose(problem, rows)
    assert config.kind == ("vector" if rows == 1 else "tiles")
    assert_near(run(problem, config, template.printed_module(problem), x, weight), x.float() @ weight.float().T)


@pytest.mark.parametrize("rows", [1, 2, 8, 15, 17, 100])
def test_chosen_for_integers(rows: int) -> None:
    """More columns than a block has, in the order that `tile_of` gives them."""
    problem = MatmulProblem(columns=300, depth=64, activation="f32", weight="int4", group=32)
    assert_near(*quantized("int4.g32", rows, 300, 64, template.choose(problem, rows, 4), torch.float32))


def test_rounding_is_that_of_conversions() -> None:
    """All ties between two bf16 or f16 numbers, what is next to them, and random numbers."""
    source = "\n".join([
        "import triton", "import triton.language as tl", "from irc.lowering.triton.library import dequantize", "",
        "@triton.jit", "def both(out, x, N: tl.constexpr):", "    at = tl.arange(0, N)", "    values = tl.load(x + at)",
        "    tl.store(out + at, dequantize.rounded(values, tl.bfloat16))",
        "    tl.store(out + N + at, dequantize.rounded(values, tl.float16))", "",
    ])  # fmt: skip
    ties = (torch.arange(0x3F80, 0x4080, dtype=torch.int32) << 16) + 0x8000
    short_ties = (torch.arange(0x3F800, 0x3F900, dtype=torch.int32) << 12) + 0x1000
    bits = torch.cat([ties - 1, ties, ties + 1, short_ties, short_ties + 1, short_ties - 1])
    x = torch.cat([bits.view(torch.float32), -bits[:256].view(torch.float32), random(256) / 50])
    out = torch.empty(2, len(x))
    import_module(source).both[(1,)](out, x, len(x))
    assert torch.equal(out[0], x.bfloat16().float())
    normal = x.abs() >= 2.0**-14
    assert torch.equal(out[1][normal], x[normal].half().float())
    assert normal.sum() > len(x) - 10


@pytest.mark.parametrize("transposed", [False, True])
def test_two_activations(transposed: bool) -> None:
    """a [B, M, K] · b by strides, as the caller numbers batches; K is known at run time."""
    source = "\n".join([
        "import triton", "import triton.language as tl", "from irc.lowering.triton.library import matmul", "",
        "@triton.jit", "def product(out, a, b, M, N, K, b_depth, b_column):", "    batch = tl.program_id(1)",
        "    m, n = matmul.tile_of(tl.program_id(0), M, N, 16, 32)",
        "    a, b = a + batch * M * K, b + batch * K * N",
        "    acc = matmul.strided_tile(a, b, m, n, M, N, K, K, 1, b_depth, b_column, 16)",
        "    tl.store(out + batch * M * N + m * N + n, acc, mask=(m < M) & (n < N))", "",
    ])  # fmt: skip
    a, b = random(2, 19, 21), random(2, 33, 21).transpose(1, 2) if transposed else random(2, 21, 33)
    out = torch.full((2, 19, 33), math.nan)
    import_module(source).product[(4, 2)](out, a, b, 19, 33, 21, b.stride(1), b.stride(2))
    assert_near(out, a @ b)


def test_refusals_name_the_reason() -> None:
    problem = MatmulProblem(columns=8, depth=51, activation="bf16", weight="int4")
    assert template.refuses(problem) == "two integers to a byte in rows of 51"
    assert template.refuses(replace(problem, weight="int8", group=32)) == "groups of 32 in rows of 51"
    assert template.refuses(replace(problem, weight="int8", scale="f64")) == "scales of f64"
    assert template.refuses(replace(problem, weight="int3")) == "weights of int3"
    assert template.refuses(replace(problem, activation="f64")) == "products of f64"
    assert template.refuses(replace(problem, weight="int8")) is None


@pytest.mark.parametrize("rows", [1, 4, 16, 17, 100, 512])
@pytest.mark.parametrize(("columns", "depth"), [(256, 2048), (2048, 5632), (32000, 2048), (50, 96)])
@pytest.mark.parametrize(("weight", "group"), [("bf16", None), ("int8", None), ("int4", 32), ("int4", 24)])
def test_choices_hold_what_kernels_need(rows: int, columns: int, depth: int, weight: str, group: int | None) -> None:
    problem = MatmulProblem(columns=columns, depth=depth, activation="bf16", weight=weight, group=group)
    for config in template.candidates(problem, rows):
        sizes = (config.BM, config.BN, config.BK, config.SPLIT)
        assert all(size & (size - 1) == 0 for size in sizes), config
        assert config.BK // config.SPLIT >= 16, config
        assert config.BN <= 256, config
        assert config.kind == "tiles" or (rows <= 4 and template.takes_vector(problem)), config
        assert config.blocks(rows, columns) * config.BM * config.BN >= rows * columns


def test_compiles_ahead_of_time() -> None:
    """For an A100 and an H100: tensor cores, 16-byte copies ahead of their use, no register spilled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_matmul.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for name, kernel in found.items():
        assert kernel["spilled"] == 0, name
        assert kernel["cvt.rn.f32."] <= 8, f"{name} converts integers, more than zero points"
        if "tiles" in name:
            product = "wgmma.mma_async" if name.endswith("512 sm_90") else "mma.sync"
            assert kernel[product] > 0, name
        if not name.startswith("odd"):
            assert kernel["cp.async, 16 bytes"] > 0, name
            assert kernel["ld.global"] == 0, f"{name} waits for memory"
    assert len(found) == 12
