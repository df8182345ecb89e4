"""Convolutions of 8-bit integers against exact sums."""

from __future__ import annotations

import ctypes

import pytest
import torch

from irc.core.errors import TargetError
from irc.lowering.cpp.templates import int8_conv2d as template
from irc.lowering.cpp.templates.conv2d import ConvProblem
from tests.kernels.building import aligned, build, needs_compiler, pointer, runnable_isas


def _problem(channels: int, out_channels: int, kernel: tuple[int, int], **options: object) -> ConvProblem:
    known = {"activation": "u8", "weight": "i8"} | options
    return ConvProblem(channels=channels, out_channels=out_channels, kernel=kernel, **known)


# (problem, height, width, zero point): odd depths, groups at the edge, more places than a block, a linear layer.
CASES = (
    (_problem(3, 20, (7, 7), stride=(2, 2), padding=(3, 3)), 21, 30, 131),
    (_problem(40, 300, (3, 3), padding=(1, 1)), 9, 17, 0),
    (_problem(12, 18, (3, 2), padding=(2, 1), dilation=(2, 3), groups=6, activation="i8"), 15, 19, -7),
    (_problem(517, 33, (1, 1)), 1, 1, 255),
    (_problem(1024, 33, (1, 2), padding=(0, 1)), 3, 2, 17),
)
DTYPES = {"u8": torch.uint8, "i8": torch.int8}
C_TYPES = {"u8": "uint8_t", "i8": "int8_t"}


def _function(name: str, problem: ConvProblem, zero: int) -> str:
    sizes = ("batch", "height", "width", "out_height", "out_width")
    args = {key: key for key in ("worker", "x", "packed", "narrow", *sizes)} | {"zero": str(zero)}
    epilogue = (
        f"[&](int64_t m, int64_t n0, int64_t n1, const float* values) {{ for (int64_t n = n0; n < n1; ++n)"
        f" out[m * {problem.out_channels} + n] += values[n - n0]; }}"
    )
    return (
        f'extern "C" void {name}(int threads, const {C_TYPES[problem.activation]}* x, const uint8_t* packed,'
        f" {', '.join(f'int64_t {size}' for size in sizes)}, bool narrow, float* out) {{\n"
        f"    auto body = [&](irc::Worker& worker) {{\n{template.call(problem, args, epilogue)}    }};\n"
        "    pool(threads).run(body);\n}"
    )


@pytest.fixture(scope="module", params=runnable_isas())
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    functions = [_function(f"case{i}", problem, zero) for i, (problem, _, _, zero) in enumerate(CASES)]
    return build(template.INCLUDES, functions, request.param)


@needs_compiler
@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_sums_are_exact(kernels: ctypes.CDLL, index: int, extreme: bool, narrow: bool) -> None:
    problem, height, width, zero = CASES[index]
    generator = torch.Generator().manual_seed(index)
    low, high = (0, 256) if problem.activation == "u8" else (-128, 128)
    shape = (2, problem.channels, height, width)
    x = torch.randint(low, high, shape, generator=generator)
    least = -64 if narrow else -128
    weight = torch.randint(
        least,
        -least + int(narrow),
        (problem.out_channels, problem.channels // problem.groups, *problem.kernel),
        generator=generator,
    )
    if extreme:  # the largest products there are, all of one sign
        x, weight = (
            torch.full_like(x, low if zero - low > high - 1 - zero else high - 1),
            torch.full_like(weight, least),
        )
    options = {key: getattr(problem, key) for key in ("stride", "padding", "dilation", "groups")}
    sums = torch.nn.functional.conv2d((x - zero).double(), weight.double(), **options)
    scale = torch.rand(problem.out_channels, generator=generator) + 0.01
    wanted = sums.float() * scale[:, None, None]
    assert template.is_narrow(weight.to(torch.int8)) == narrow
    packed = template.pack(problem, weight.to(torch.int8), scale, zero)
    assert packed.numel() == template.packed_bytes(problem)
    memory = aligned(packed.numel())
    memory.copy_(packed)
    given = x.to(DTYPES[problem.activation]).permute(0, 2, 3, 1).contiguous()
    sizes = [ctypes.c_int64(size) for size in (2, height, width, *wanted.shape[2:])]
    for threads in (1, 3):
        out = torch.zeros_like(wanted.permute(0, 2, 3, 1)).contiguous()
        getattr(kernels, f"case{index}")(threads, pointer(given), pointer(memory), *sizes, narrow, pointer(out))
        assert torch.equal(out.permute(0, 3, 1, 2), wanted)


def test_refuses() -> None:
    def reason(**options: object) -> str:
        sizes = {"channels": 4, "out_channels": 4, "kernel": (1, 1)} | options
        return template.refuses(_problem(**sizes), "avx2") or ""

    assert "products of f32 with i8" in reason(activation="f32")
    assert "do not divide" in reason(groups=3)
    assert "depthwise" in reason(groups=4)
    assert "65792" in reason(channels=70000)
    problem = _problem(4, 4, (1, 1))
    with pytest.raises(TargetError, match=r"\[4, 4, 1, 1\]"):
        template.pack(problem, torch.zeros(4, 1, 1, 1, dtype=torch.int8), torch.ones(4), 0)
    with pytest.raises(TargetError, match="scale is"):
        template.pack(problem, torch.zeros(4, 4, 1, 1, dtype=torch.int8), torch.ones(1), 0)
