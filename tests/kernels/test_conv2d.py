"""Convolution kernels against f64, within the bound of f32 sums."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from irc.core.errors import TargetError
from irc.lowering.cpp.templates import conv2d as template
from irc.lowering.cpp.templates.base import C_TYPES
from irc.lowering.cpp.templates.conv2d import ConvProblem
from tests.kernels.building import adding_rows, aligned, build, needs_compiler, pointer, runnable_isas, workers_function

# (problem, height, width): one pixel, rows longer and shorter than a panel, more places and channels than a block, rows
# read where they lie and gathered.
CASES = (
    (ConvProblem(channels=3, out_channels=20, kernel=(7, 7), stride=(2, 2), padding=(3, 3)), 21, 30),
    (ConvProblem(channels=40, out_channels=13, kernel=(3, 3), padding=(1, 1)), 18, 37),
    (ConvProblem(channels=31, out_channels=200, kernel=(1, 1)), 7, 7),
    (ConvProblem(channels=8, out_channels=12, kernel=(1, 1), stride=(2, 2)), 9, 8),
    (ConvProblem(channels=12, out_channels=18, kernel=(3, 2), padding=(2, 1), dilation=(2, 3), groups=6), 15, 19),
    (ConvProblem(channels=6, out_channels=6, kernel=(3, 3), padding=(1, 1), groups=6), 20, 50),
    (ConvProblem(channels=5, out_channels=3, kernel=(4, 4)), 4, 4),
    (
        ConvProblem(
            channels=67, out_channels=67, kernel=(3, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=67
        ),
        9,
        7,
    ),
    (ConvProblem(channels=96, out_channels=300, kernel=(3, 3), stride=(2, 2), padding=(1, 1), groups=2), 11, 12),
    (ConvProblem(channels=8, out_channels=16, kernel=(1, 1), padding=(1, 0), groups=8), 5, 6),
    (ConvProblem(channels=33, out_channels=40, kernel=(3, 5), padding=(3, 4), activation="bf16", weight="bf16"), 6, 5),
    (ConvProblem(channels=20, out_channels=20, kernel=(3, 3), groups=20, activation="f16", weight="f16"), 8, 8),
    (ConvProblem(channels=600, out_channels=70, kernel=(2, 2), padding=(1, 1)), 4, 5),
    (ConvProblem(channels=48, out_channels=70, kernel=(3, 3), padding=(1, 1), winograd=True), 11, 14),
    (ConvProblem(channels=272, out_channels=40, kernel=(3, 3), padding=(0, 2), winograd=True), 5, 3),
    (ConvProblem(channels=32, out_channels=35, kernel=(3, 3), winograd=True, activation="bf16", weight="bf16"), 6, 9),
    (ConvProblem(channels=300, out_channels=40, kernel=(1, 1), activation="bf16", weight="bf16"), 9, 11),
    (ConvProblem(channels=66, out_channels=21, kernel=(3, 3), padding=(1, 1), weight="bf16"), 7, 6),
    (ConvProblem(channels=600, out_channels=42, kernel=(1, 1), groups=2), 9, 11),
    # Narrow groups.
    (ConvProblem(channels=80, out_channels=80, kernel=(3, 3), stride=(1, 2), padding=(1, 1), groups=20), 7, 13),
    (ConvProblem(channels=48, out_channels=48, kernel=(2, 5), padding=(2, 3), groups=6, activation="bf16"), 5, 9),
    (ConvProblem(channels=32, out_channels=32, kernel=(3, 1), stride=(2, 1), groups=8, activation="f16"), 6, 3),
)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def _function(name: str, problem: ConvProblem) -> str:
    sizes = ("batch", "height", "width", "out_height", "out_width")
    args = {key: key for key in ("worker", "x", "packed", "scratch", *sizes)}
    sizes_text = ", ".join(f"int64_t {size}" for size in sizes)
    operands = f"const {C_TYPES[problem.activation]}* x, const uint8_t* packed"
    parameters = f"{operands}, {sizes_text}, float* out, [[maybe_unused]] uint8_t* scratch"
    return workers_function(name, parameters, template.call(problem, args, adding_rows(problem.out_channels)))


@pytest.fixture(scope="module", params=runnable_isas())
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    functions = [_function(f"case{i}", problem) for i, (problem, _, _) in enumerate(CASES)]
    return build(template.INCLUDES, functions, request.param)


def _bound(problem: ConvProblem, x: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
    """Largest error of each output that irc/conv.h and irc/winograd.h allow."""
    if not problem.winograd:
        return (problem.places + 4) * 2.0**-24 * torch.nn.functional.conv2d(x, weight, **options)
    inputs = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]], dtype=torch.float64)
    sides = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    outputs = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.float64)
    (across_y, across_x), (height, width) = problem.padding, x.shape[2:]
    size = [height + 2 * across_y - 2, width + 2 * across_x - 2]
    even = torch.nn.functional.pad(x, (across_x, across_x + size[1] % 2, across_y, across_y + size[0] % 2))
    tiles = even.unfold(2, 4, 2).unfold(3, 4, 2)
    spread = torch.einsum("ai,bcyxij,dj->bcyxad", inputs, tiles, inputs)
    filters = torch.einsum("ai,ocij,dj->ocad", sides, weight, sides)
    sums = torch.einsum("bcyxad,ocad->boyxad", spread, filters)
    found = torch.einsum("ia,boyxad,jd->boyixj", outputs, sums, outputs).flatten(4, 5).flatten(2, 3)
    return (problem.channels + 12) * 2.0**-24 * found[:, :, : size[0], : size[1]]


@needs_compiler
@pytest.mark.parametrize("index", range(len(CASES)))
def test_equals_the_reference(kernels: ctypes.CDLL, index: int) -> None:
    problem, height, width = CASES[index]
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(2, problem.channels, height, width, generator=generator).to(DTYPES[problem.activation])
    channels = problem.channels // problem.groups
    weight = torch.randn(problem.out_channels, channels, *problem.kernel, generator=generator).to(
        DTYPES[problem.weight]
    )
    options = {key: getattr(problem, key) for key in ("stride", "padding", "dilation", "groups")}
    wanted = torch.nn.functional.conv2d(x.double(), weight.double(), **options)
    bound = _bound(problem, x.double().abs(), weight.double().abs(), options)
    packed = template.pack(problem, weight)
    assert packed.numel() == template.packed_bytes(problem)
    memory = aligned(packed.numel())
    memory.copy_(packed)
    sizes = [ctypes.c_int64(size) for size in (2, height, width, *wanted.shape[2:])]
    x = x.permute(0, 2, 3, 1).contiguous()
    for threads in (1, 3):
        out = torch.zeros_like(wanted.permute(0, 2, 3, 1), dtype=torch.float32).contiguous()
        scratch = aligned(template.scratch_bytes(problem, 0, threads))
        arguments = (pointer(x), pointer(memory), *sizes, pointer(out), pointer(scratch))
        getattr(kernels, f"case{index}")(threads, *arguments)
        excess = ((out.permute(0, 3, 1, 2) - wanted).abs() - bound).max()
        assert excess <= 0, f"{threads} threads: {float(excess):.3g} beyond the bound"


def test_minimal_filtering_where_it_pays() -> None:
    def pays(**options: Any) -> bool:
        return template.winograd_pays(ConvProblem(**{"channels": 64, "out_channels": 64, "kernel": (3, 3), **options}))

    assert pays()
    assert pays(activation="bf16", weight="bf16")
    for options in (
        {"kernel": (3, 1)}, {"stride": (2, 2)}, {"dilation": (2, 2)}, {"groups": 2}, {"channels": 56},
        {"out_channels": 16}, {"weight": "f8e4m3"}, {"channels": 512, "out_channels": 512},
    ):  # fmt: skip
        assert not pays(**options), options
    problem = ConvProblem(channels=64, out_channels=64, kernel=(1, 1), winograd=True)
    with pytest.raises(TargetError, match="minimal filtering"):
        template.pack(problem, torch.zeros(64, 64, 1, 1))


def test_refuses() -> None:
    problem = ConvProblem(channels=4, out_channels=4, kernel=(1, 1), activation="f64")
    assert "in f64" in (template.refuses(problem, "avx2") or "")
    problem = ConvProblem(channels=4, out_channels=4, kernel=(1, 1), groups=3)
    assert "do not divide" in (template.refuses(problem, "avx2") or "")
    with pytest.raises(TargetError, match="do not divide"):
        template.pack(problem, torch.zeros(4, 1, 1, 1))
    with pytest.raises(TargetError, match=r"\[4, 3, 1, 1\]"):
        template.pack(ConvProblem(channels=4, out_channels=4, kernel=(1, 1)), torch.zeros(4, 3, 1, 1))
