"""Every operation that kernels in Triton may hold, against PyTorch, at the edges of what it takes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from irc.lowering.kernels.ops.pointwise import _BINARY, _UNARY
from irc.lowering.triton.expressions import known_operation
from tests.triton.operations import NATIVE, Function, compare

# NumPy, which the interpreter computes with, warns of the infinities and NaN that are wanted here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TIES = [0.5, 1.5, 2.5, 3.5, 4194303.5, 4194304.5, 4194305.5, 8388607.5, 8388609.0]
SPECIAL = [0.0, math.inf, 1e-3, 0.1, 1.0, 2.0, 3.0, 19.9, 88.0, 89.0, 105.0, 1e5, 1e15, 3e38]
SUBNORMAL = [] if NATIVE else [1e-45, 1e-40]


def edges(dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN, both signs of the numbers above, and some random ones of every size."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(200, generator=generator, dtype=torch.float64)
    small = some[:50] * 10 ** torch.linspace(-30, 30, 50, dtype=torch.float64)
    listed = torch.tensor([*TIES, *SPECIAL, *SUBNORMAL], dtype=torch.float64)
    return torch.cat([listed, -listed, some * 3, small, torch.tensor([math.nan])]).to(dtype)


def pairs(x: Tensor, count: int = 40) -> tuple[Tensor, Tensor]:
    """Every one of the first numbers with every other one; none is subnormal: PyTorch's own fmod is off there."""
    if x.is_floating_point():
        x = x[(x == 0) | ~(x.abs() < torch.finfo(x.dtype).tiny)]
    chosen = torch.cat([x[:count], x[-count // 2 :]])
    return tuple(v.contiguous().view(-1) for v in torch.meshgrid(chosen, chosen, indexing="ij"))  # type: ignore


# Functions whose every step PyTorch rounds the same way.
EXACT: dict[str, Function] = {
    "abs": torch.abs, "neg": torch.neg, "sign": torch.sign, "floor": torch.floor,
    "ceil": torch.ceil, "round": torch.round, "trunc": torch.trunc, "reciprocal": torch.reciprocal,
    "relu": torch.relu, "square": torch.square, "logical_not": torch.logical_not, "isnan": torch.isnan,
    "isinf": torch.isinf, "clamp": lambda x: x.clamp(-0.1, 0.7), "relu6": F.relu6,
    "where": lambda x: torch.where(x > 0, x, 0.1),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1), "to bool": lambda x: x.bool(), "add number": lambda x: x + 0.1,
    "multiplied": lambda x: x * 0.7, "number less": lambda x: 0.3 - x, "divided": lambda x: x / 0.7,
    "equals": lambda x: x == 0.1, "masked": lambda x: x.masked_fill(x.isnan(), 0.1),
}  # fmt: skip
# Others, with bounds in units of the last place: (f32, f64, f32 on a GPU). e^x there is 2^(x log2 e) with a product
# rounded to f32, so its error grows with x.
ROUNDED: dict[str, tuple[Function, tuple[float, float, float]]] = {
    "exp": (torch.exp, (2, 2, 100)), "exp2": (torch.exp2, (2, 2, 4)), "expm1": (torch.expm1, (5, 5, 100)),
    "log": (torch.log, (2, 2, 4)), "log2": (torch.log2, (2, 2, 4)), "log10": (torch.log10, (3, 3, 4)),
    "log1p": (torch.log1p, (3, 3, 6)), "sqrt": (torch.sqrt, (1, 1, 1)), "rsqrt": (torch.rsqrt, (1, 2, 4)),
    "sin": (torch.sin, (2, 1, 4)),
    "cos": (torch.cos, (2, 1, 4)), "tan": (torch.tan, (4, 3, 8)), "tanh": (torch.tanh, (6, 6, 12)),
    "sigmoid": (torch.sigmoid, (3, 3, 100)), "erf": (torch.erf, (2, 2, 4)), "sinh": (torch.sinh, (5, 5, 100)),
    "cosh": (torch.cosh, (5, 5, 100)), "atan": (torch.atan, (3, 3, 4)),
    "silu": (lambda x: F.silu(x.clamp(min=-80)), (4, 4, 100)),
    "elu": (lambda x: F.elu(x, 1.3), (6, 6, 100)), "hardswish": (F.hardswish, (4, 4, 4)),
    "hardsigmoid": (F.hardsigmoid, (3, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_functions_of_one_number(dtype: torch.dtype) -> None:
    compare(EXACT, [edges(dtype)])
    column = 1 if dtype == torch.float64 else 2 if NATIVE else 0
    bounds = {name: bound[column] for name, (_, bound) in ROUNDED.items()}
    functions = {name: function for name, (function, _) in ROUNDED.items()}
    compare(functions, [edges(dtype)], bounds, exact_in=torch.float64)


BINARY_EXACT: dict[str, Function] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum,
    "minimum": torch.minimum, "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt,
    "ge": torch.ge, "logical_and": torch.logical_and, "logical_or": torch.logical_or, "logical_xor": torch.logical_xor,
    "where": lambda a, b: torch.where(a > b, a, b * 0.5),
    "clamp": lambda a, b: a.clamp(min=b, max=b.abs()), "scaled": lambda a, b: torch.add(a, b, alpha=0.5),
}  # fmt: skip
# Rounded by more than one step, or nearer than PyTorch's in f32 (fmod): (f32, f64, f32 on a GPU).
BINARY_ROUNDED: dict[str, tuple[Function, tuple[float, float, float]]] = {
    "atan2": (torch.atan2, (3, 3, 4)), "pow": (torch.pow, (1, 1500, 2)),
    "pow number": (lambda a, b: a.abs() ** 1.75 + b * 0, (1, 1500, 2)),
    "number pow": (lambda a, b: 1.25**b, (1, 1500, 2)), "fmod": (torch.fmod, (0, 0, 0)),
    "remainder": (torch.remainder, (0, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_functions_of_two_numbers(dtype: torch.dtype) -> None:
    a, b = pairs(edges(dtype))
    compare(BINARY_EXACT, [a, b])
    column = 1 if dtype == torch.float64 else 2 if NATIVE else 0
    bounds = {name: bound[column] for name, (_, bound) in BINARY_ROUNDED.items()}
    functions = {name: function for name, (function, _) in BINARY_ROUNDED.items()}
    compare(functions, [a, b], bounds, exact_in=torch.float64)


def test_quotients_as_whole_numbers() -> None:
    """⌊a / b⌋ of floats, where a / b is not so near a whole number that its rounding decides."""
    a = torch.tensor([7.5, -7.5, 7.5, -7.5, 0.3, 8.0, math.nan, 1e30, 5.0, -5.0])
    b = torch.tensor([2.0, 2.0, -2.0, -2.0, 7.0, 2.0, 1.0, 3.0, 0.0, 0.0])
    functions: dict[str, Function] = {
        "floor": lambda a, b: torch.div(a, b, rounding_mode="floor"), "floor_divide": torch.floor_divide,
        "trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    }  # fmt: skip
    for dtype in (torch.float32, torch.float64):
        compare(functions, [a.to(dtype), b.to(dtype)])


WIDE = [-(2**40) - 7, -(2**31), 2**31 + 1, 2**40 + 3]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_whole_numbers(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    listed = [limits.min, limits.max, 0, 1, 2, 3, 7, 8, 100, *(WIDE if dtype == torch.int64 else [])]
    listed += [] if dtype == torch.uint8 else [-1, -2, -3, -7, -8, -100]
    a, b = pairs(torch.tensor(listed, dtype=dtype))
    functions: dict[str, Function] = {
        "add": torch.add, "sub": torch.sub, "mul": torch.mul, "maximum": torch.maximum, "minimum": torch.minimum,
        "eq": torch.eq, "lt": torch.lt, "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor,
        "not": lambda a, b: torch.bitwise_not(a), "abs": lambda a, b: torch.abs(a), "neg": lambda a, b: torch.neg(a),
        "sign": lambda a, b: torch.sign(a), "floor": lambda a, b: torch.floor(a), "relu": lambda a, b: torch.relu(a),
        "logical_and": torch.logical_and, "logical_or": torch.logical_or, "logical_xor": torch.logical_xor,
        "logical_not": lambda a, b: torch.logical_not(a), "where": lambda a, b: torch.where(a > b, a, 3),
        "clamp": lambda a, b: a.clamp(2, 9), "square": lambda a, b: torch.square(a), "more": lambda a, b: a + 1,
        "div": lambda a, b: a.double() / b, "to float": lambda a, b: a.float(),
        "to half": lambda a, b: a.clamp(max=99).clamp(min=1).half(),
        "to bool": lambda a, b: a.bool(), "to i8": lambda a, b: a.to(torch.int8),
        "to i16": lambda a, b: a.to(torch.int16),
        "to u8": lambda a, b: a.to(torch.uint8), "to i32": lambda a, b: a.int(), "to i64": lambda a, b: a.long(),
        "cubed": lambda a, b: a**3, "power": lambda a, b: (a % 11) ** (b % 7),
    }  # fmt: skip
    compare(functions, [a, b])
    kept = (b != 0) & ~((b == -1) & (a == limits.min))  # PyTorch refuses these, or overflows
    functions = {
        "floor_div": lambda a, b: torch.div(a, b, rounding_mode="floor"), "remainder": torch.remainder,
        "trunc_div": lambda a, b: torch.div(a, b, rounding_mode="trunc"), "fmod": torch.fmod,
        "by 3": lambda a, b: a // 3, "rest of 3": lambda a, b: a % 3, "rest of -3": lambda a, b: torch.fmod(a, 3),
        "floor_divide": torch.floor_divide,
    }  # fmt: skip
    compare(functions, [a[kept], b[kept]])


def test_truth_values() -> None:
    a, b = torch.tensor([False, False, True, True]), torch.tensor([False, True, False, True])
    functions: dict[str, Function] = {
        "and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor, "bit and": torch.bitwise_and,
        "bit or": torch.bitwise_or, "bit xor": torch.bitwise_xor, "not": lambda a, b: ~a, "add": torch.add,
        "mul": torch.mul, "eq": torch.eq, "ne": torch.ne, "lt": torch.lt,
        "logical_not": lambda a, b: torch.logical_not(a),
        "where": lambda a, b: torch.where(a, b, True), "maximum": torch.maximum, "minimum": torch.minimum,
        "to float": lambda a, b: a.float() * 3, "to int": lambda a, b: a.long() + b, "to half": lambda a, b: a.half(),
        "masked": lambda a, b: a.masked_fill(b, True), "number": lambda a, b: a * 2.5,
    }  # fmt: skip
    compare(functions, [a, b])


HALVES: dict[str, Function] = {
    "same": lambda x: x, "doubled": lambda x: x + x, "third": lambda x: x * 0.3, "to f32": lambda x: x.float(),
    "to f64": lambda x: x.double(), "to f16": lambda x: x.half(), "to bf16": lambda x: x.bfloat16(),
    "twice": lambda x: (x * 0.3).bfloat16().float() + 1, "clamp": lambda x: x.clamp(-0.1, 0.1),
    "eq": lambda x: x == 0.1,
    "larger": lambda x: torch.maximum(x, -x), "relu": torch.relu, "neg": torch.neg, "less": lambda x: 1 - x,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["f16", "bf16", "f32"])
def test_half_floats_are_rounded_as_pytorch_does(dtype: torch.dtype) -> None:
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F818001, 0x7F800000, 0x7F7FFFFF, 0x7FC00000, 0x38800000, 0x33800000,
                         0x47800000, 0x477FE000, 0x477FF000, 0x38801000, 0x38803000])  # fmt: skip
    special = bits.to(torch.int32).view(torch.float32)
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(300, generator=generator) * 10 ** torch.linspace(-4, 4, 300)
    compare(HALVES, [torch.cat([special, -special, some]).to(dtype)])


def test_every_operation_that_is_printed_was_compared() -> None:
    defined = {*_UNARY, *_BINARY}
    assert not {name for name in defined if not known_operation(name)}
    compared = {
        *EXACT,
        *ROUNDED,
        *BINARY_EXACT,
        *BINARY_ROUNDED,
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "bitwise_not",
    }
    assert not defined - compared
