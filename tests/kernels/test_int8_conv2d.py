"""Convolutions of 8-bit integers against exact sums."""

from __future__ import annotations

import ctypes

import pytest
import torch

from irc.core.errors import TargetError
from irc.lowering.cpp.templates import int8_conv2d as template
from irc.lowering.cpp.templates.conv2d import ConvProblem
from tests.kernels.building import adding_rows, aligned, build, needs_compiler, pointer, runnable_isas, workers_function


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
    sizes_text = ", ".join(f"int64_t {size}" for size in sizes)
    parameters = f"const {C_TYPES[problem.activation]}* x, const uint8_t* packed, {sizes_text}, bool narrow, float* out"
    return workers_function(name, parameters, template.call(problem, args, adding_rows(problem.out_channels)))


def _packed(problem: ConvProblem, weight: torch.Tensor, scale: torch.Tensor, zero: int) -> torch.Tensor:
    packed = template.pack(problem, weight.to(torch.int8), scale, zero)
    assert packed.numel() == template.packed_bytes(problem)
    memory = aligned(packed.numel())
    return memory.copy_(packed)


@pytest.fixture(scope="module", params=runnable_isas())
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    functions = [_function(f"case{i}", problem, zero) for i, (problem, _, _, zero) in enumerate(CASES)]
    return build(template.INCLUDES, functions, request.param)


# Weights of 8 bits; of 7, which pairs in 16 bits hold; of which fours are held now and then, and always.
@needs_compiler
@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("least", [-128, -64, -45, -32])
def test_sums_are_exact(kernels: ctypes.CDLL, index: int, extreme: bool, least: int) -> None:
    problem, height, width, zero = CASES[index]
    narrow = least >= -64
    generator = torch.Generator().manual_seed(index)
    low, high = (0, 256) if problem.activation == "u8" else (-128, 128)
    shape = (2, problem.channels, height, width)
    x = torch.randint(low, high, shape, generator=generator)
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
    memory = _packed(problem, weight, scale, zero)
    given = x.to(DTYPES[problem.activation]).permute(0, 2, 3, 1).contiguous()
    sizes = [ctypes.c_int64(size) for size in (2, height, width, *wanted.shape[2:])]
    for threads in (1, 3):
        out = torch.zeros_like(wanted.permute(0, 2, 3, 1)).contiguous()
        getattr(kernels, f"case{index}")(threads, pointer(given), pointer(memory), *sizes, narrow, pointer(out))
        assert torch.equal(out.permute(0, 3, 1, 2), wanted)


def test_where_four_products_leave_16_bits() -> None:
    """Marks of pairs of steps: two neighbours of the first four places with the same two of the last four."""

    def marks(*weights: tuple[int, int, int]) -> list[int]:
        weight = torch.zeros(40, 16, 1, 1, dtype=torch.int8)
        for channel, place, value in weights:
            weight[channel, place] = value
        problem = _problem(16, 40, (1, 1))
        packed = template.pack(problem, weight, torch.ones(40), 0)
        return packed[template.packed_bytes(problem) - 6 :].tolist()  # 3 panels of 2 steps

    assert marks((0, 0, 64), (0, 1, 64), (0, 2, 1), (1, 4, 1), (0, 5, -64)) == [0, 0, 0, 0, 0, 0]
    assert marks((0, 0, 64), (0, 1, 64), (0, 4, 1)) == [1, 0, 0, 0, 0, 0]
    assert marks((16, 10, -64), (16, 11, -64), (16, 15, -1)) == [0, 1, 0, 1, 0, 0]  # two panels go together
    assert marks((39, 10, -64), (39, 11, -64), (39, 15, -1)) == [0, 0, 0, 0, 0, 1]


# (case, type of the result, of what is added, zero point, ReLU): groups, gathered; in place.
ENDS = ((2, "int8_t", "float", -20, True), (4, "uint8_t", "uint8_t", 3, False))
TORCH = {"uint8_t": torch.uint8, "int8_t": torch.int8, "float": torch.float32}


def _ending_function(name: str, problem: ConvProblem, zero: int, out: str, added: str) -> str:
    sizes = ("batch", "height", "width", "out_height", "out_width")
    args = {key: key for key in ("worker", "x", "packed", *sizes)} | {"zero": str(zero), "narrow": "true"}
    other = f"static_cast<const {added}*>(added)"
    return (
        f'extern "C" void {name}(int threads, const {C_TYPES[problem.activation]}* x, const uint8_t* packed,'
        f" {', '.join(f'int64_t {size}' for size in sizes)}, {out}* out,"
        " const void* added,"
        " const float* factors, const float* offsets, float factor, float least, float most, int zero) {\n"
        f"    const irc::Requantize<{out}, {added}> epilogue{{out, {other}, factors, offsets, factor, least, most,"
        f" {problem.out_channels}, zero}};\n"
        f"    auto body = [&](irc::Worker& worker) {{\n{template.call(problem, args, 'epilogue')}    }};\n"
        "    pool(threads).run(body);\n}"
    )


@pytest.fixture(scope="module", params=runnable_isas())
def ending_kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    functions = [
        _ending_function(f"end{i}", CASES[case][0], CASES[case][3], out, added)
        for i, (case, out, added, _, _) in enumerate(ENDS)
    ]
    return build(template.INCLUDES, functions, request.param)


@needs_compiler
@pytest.mark.parametrize("index", range(len(ENDS)))
def test_results_in_integers(ending_kernels: ctypes.CDLL, index: int) -> None:
    """Each is the exact value rounded, but where that lies in the middle between two integers within the bound."""
    case, out_type, added_type, out_zero, relu = ENDS[index]
    problem, height, width, zero = CASES[case]
    generator = torch.Generator().manual_seed(index)
    low, high = (0, 256) if problem.activation == "u8" else (-128, 128)
    x = torch.randint(low, high, (2, problem.channels, height, width), generator=generator)
    shape = (problem.out_channels, problem.channels // problem.groups, *problem.kernel)
    weight = torch.randint(-64, 65, shape, generator=generator)
    options = {key: getattr(problem, key) for key in ("stride", "padding", "dilation", "groups")}
    sums = torch.nn.functional.conv2d((x - zero).double(), weight.double(), **options).permute(0, 2, 3, 1).contiguous()
    channels = problem.out_channels
    factors, offsets = (torch.zeros(channels + 32) for _ in range(2))
    factors[:channels] = (torch.rand(channels, generator=generator) + 0.5) * 100 / sums.abs().max()
    offsets[:channels] = 20 * torch.randn(channels, generator=generator)
    added = (100 * torch.randn(sums.shape, generator=generator)).clamp(0, 127).to(TORCH[added_type])
    factor = 0.37
    if added_type == "float":
        added.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    parts = sums * factors[:channels].double(), offsets[:channels].double(), added.double() * factor
    wanted, size = parts[0] + parts[1] + parts[2], sum(part.abs() for part in parts)
    least, most = max(torch.iinfo(TORCH[out_type]).min, out_zero if relu else -128), torch.iinfo(TORCH[out_type]).max
    out = torch.zeros(sums.shape, dtype=TORCH[out_type])
    memory = _packed(problem, weight, torch.ones(channels), zero)
    given = x.to(DTYPES[problem.activation]).permute(0, 2, 3, 1).contiguous()
    sizes = [ctypes.c_int64(size) for size in (2, height, width, *sums.shape[1:3])]
    numbers = [ctypes.c_float(number) for number in (factor, least - out_zero, most - out_zero)]
    getattr(ending_kernels, f"end{index}")(
        2, pointer(given), pointer(memory), *sizes, pointer(out), pointer(added), pointer(factors),
        pointer(offsets), *numbers, out_zero,
    )  # fmt: skip
    real = wanted.clamp(min=0) if relu else wanted
    exact = (real.round() + out_zero).clamp(least, most).nan_to_num(nan=least)
    close = ((wanted - wanted.floor() - 0.5).abs() <= 2.0**-22 * size) & ((out - exact).abs() == 1)
    assert ((out == exact) | close).all()
    assert close.float().mean() < 1e-3
    assert out.unique().numel() > 20


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
