"""What tests of convolutions over integers share: functions around a kernel, exact sums, results in integers."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from irc.lowering.cpp.templates.conv2d import ConvProblem
from tests.kernels.building import adding_rows, aligned, pointer, workers_function

_DTYPES = {"u8": torch.uint8, "i8": torch.int8}
_C_TYPES = {"u8": "uint8_t", "i8": "int8_t"}
_TORCH = {"uint8_t": torch.uint8, "int8_t": torch.int8, "float": torch.float32}
_SIZES = ("batch", "height", "width", "out_height", "out_width")


@dataclass(frozen=True)
class Case:
    """A problem at one size; `zero` is the zero point of its input."""

    problem: ConvProblem
    height: int
    width: int
    zero: int

    def inputs(self, generator: torch.Generator) -> tuple[Tensor, int, int]:
        """(integers [2, C, H, W], the least and the largest that there are)."""
        low, high = (0, 255) if self.problem.activation == "u8" else (-128, 127)
        shape = (2, self.problem.channels, self.height, self.width)
        return torch.randint(low, high + 1, shape, generator=generator), low, high

    def weights(self, least: int, most: int, generator: torch.Generator) -> Tensor:
        shape = (self.problem.out_channels, self.problem.channels // self.problem.groups, *self.problem.kernel)
        return torch.randint(least, most + 1, shape, generator=generator)

    def sums(self, x: Tensor, weight: Tensor) -> Tensor:
        """[2, O, OH, OW] f64, exact."""
        options = {key: getattr(self.problem, key) for key in ("stride", "padding", "dilation", "groups")}
        return torch.nn.functional.conv2d((x - self.zero).double(), weight.double(), **options)

    def stored(self, x: Tensor) -> Tensor:
        return x.to(_DTYPES[self.problem.activation]).permute(0, 2, 3, 1).contiguous()


def problem_of(channels: int, out_channels: int, kernel: tuple[int, int], **options: object) -> ConvProblem:
    known = {"activation": "u8", "weight": "i8"} | options
    return ConvProblem(channels=channels, out_channels=out_channels, kernel=kernel, **known)


def adding_function(template: ModuleType, name: str, case: Case) -> str:
    """A C function that adds the scaled sums to `out`."""
    problem = case.problem
    args = {key: key for key in ("worker", "x", "packed", "narrow", *_SIZES)} | {"zero": str(case.zero)}
    sizes = ", ".join(f"int64_t {size}" for size in _SIZES)
    parameters = f"const {_C_TYPES[problem.activation]}* x, const uint8_t* packed, {sizes}, bool narrow, float* out"
    return workers_function(name, parameters, template.call(problem, args, adding_rows(problem.out_channels)))


def packed(template: ModuleType, case: Case, weight: Tensor, scale: Tensor) -> Tensor:
    """The packed operand on a boundary of 64 bytes."""
    made = template.pack(case.problem, weight.to(torch.int8), scale, case.zero)
    assert made.numel() == template.packed_bytes(case.problem)
    return aligned(made.numel()).copy_(made)


def check_sums(template: ModuleType, kernel: object, case: Case, seed: int, least: int, extreme: bool) -> None:
    """Weights from `least` on; extreme: the largest products there are, all of one sign."""
    narrow = least >= -64
    generator = torch.Generator().manual_seed(seed)
    x, low, high = case.inputs(generator)
    weight = case.weights(least, -least if narrow else -least - 1, generator)
    if extreme:
        x, weight = torch.full_like(x, low if case.zero - low > high - case.zero else high), weight.fill_(least)
    scale = torch.rand(case.problem.out_channels, generator=generator) + 0.01
    wanted = case.sums(x, weight).float() * scale[:, None, None]
    assert template.is_narrow(weight.to(torch.int8)) == narrow
    memory, given = packed(template, case, weight, scale), case.stored(x)
    sizes = [ctypes.c_int64(size) for size in (2, case.height, case.width, *wanted.shape[2:])]
    for threads in (1, 3):
        out = torch.zeros_like(wanted.permute(0, 2, 3, 1)).contiguous()
        kernel(threads, pointer(given), pointer(memory), *sizes, narrow, pointer(out))
        assert torch.equal(out.permute(0, 3, 1, 2), wanted)


@dataclass(frozen=True)
class Ending:
    """A case whose results are integers: types in C++ of these and of what is added, and their zero point."""

    case: Case
    out: str
    added: str
    zero: int
    relu: bool


def ending_function(template: ModuleType, name: str, ending: Ending) -> str:
    """A C function that stores integers by `irc::Requantize`."""
    problem = ending.case.problem
    args = {key: key for key in ("worker", "x", "packed", *_SIZES)} | {"zero": str(ending.case.zero), "narrow": "true"}
    plain = ending.added == "irc::Nothing"
    other = "nullptr" if plain else f"static_cast<const {ending.added}*>(added)"
    return (
        f'extern "C" void {name}(int threads, const {_C_TYPES[problem.activation]}* x, const uint8_t* packed,'
        f" {', '.join(f'int64_t {size}' for size in _SIZES)}, {ending.out}* out,"
        " [[maybe_unused]] const void* added,"
        " const float* factors, const float* offsets, float factor, float least, float most, int zero) {\n"
        f"    const irc::Requantize<{ending.out}, {ending.added}> epilogue{{out, {other}, factors, offsets, factor,"
        f" least, most, {problem.out_channels}, zero}};\n"
        f"    auto body = [&](irc::Worker& worker) {{\n        give_memory(worker);\n"
        f"{template.call(problem, args, 'epilogue')}    }};\n"
        "    pool(threads).run(body);\n}"
    )


def check_ending(template: ModuleType, kernel: object, ending: Ending, seed: int) -> None:
    """Each is the exact value rounded, but where that lies in the middle between two integers within the bound."""
    case, out_zero, relu = ending.case, ending.zero, ending.relu
    generator = torch.Generator().manual_seed(seed)
    x, _, _ = case.inputs(generator)
    weight = case.weights(-64, 64, generator)
    sums = case.sums(x, weight).permute(0, 2, 3, 1).contiguous()
    channels = case.problem.out_channels
    factors, offsets = (torch.zeros(channels + 32) for _ in range(2))
    factors[:channels] = (torch.rand(channels, generator=generator) + 0.5) * 100 / sums.abs().max()
    offsets[:channels] = 20 * torch.randn(channels, generator=generator)
    added, factor = (100 * torch.randn(sums.shape, generator=generator)).clamp(0, 127), 0.37
    added = torch.zeros_like(added) if ending.added == "irc::Nothing" else added.to(_TORCH[ending.added])
    if ending.added == "float":
        added.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    parts = sums * factors[:channels].double(), offsets[:channels].double(), added.double() * factor
    wanted, size = parts[0] + parts[1] + parts[2], sum(part.abs() for part in parts)
    bounds = torch.iinfo(_TORCH[ending.out])
    least, most = max(bounds.min, out_zero if relu else -128), bounds.max
    out = torch.zeros(sums.shape, dtype=_TORCH[ending.out])
    memory, given = packed(template, case, weight, torch.ones(channels)), case.stored(x)
    sizes = [ctypes.c_int64(size) for size in (2, case.height, case.width, *sums.shape[1:3])]
    numbers = [ctypes.c_float(number) for number in (factor, least - out_zero, most - out_zero)]
    kernel(
        2, pointer(given), pointer(memory), *sizes, pointer(out), pointer(added), pointer(factors),
        pointer(offsets), *numbers, out_zero,
    )  # fmt: skip
    real = wanted.clamp(min=0) if relu else wanted
    exact = (real.round() + out_zero).clamp(least, most).nan_to_num(nan=least)
    close = ((wanted - wanted.floor() - 0.5).abs() <= 2.0**-22 * size) & ((out - exact).abs() == 1)
    assert ((out == exact) | close).all()
    assert close.float().mean() < 1e-3
    assert out.unique().numel() > 20
