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
SPECIAL = [0.0, math.inf, 1e-3, 0.1, 1.0, 2.0, 3.0, 19.9, 88.0, 105.0, 1e5, 1e15, 3e38]
SUBNORMAL = [] if NATIVE else [1e-45, 1e-40]


def edges(dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN, both signs of the numbers above, and some random ones of every size."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(200, generator=generator, dtype=torch.float64)
    small = some[:50] * 10 ** torch.linspace(-30, 30, 50, dtype=torch.float64)
    listed = torch.tensor([*TIES, *SPECIAL, *SUBNORMAL], dtype=torch.float64)
    return torch.cat([listed, -listed, some * 3, small, torch.tensor([math.nan])]).to(dtype)


def pairs(x: Tensor, count: int = 40) -> tuple[Tensor, Tensor]:
    """Every one of the first numbers with every other one."""
    chosen = torch.cat([x[:count], x[-count // 2 :]])
    return tuple(v.contiguous().view(-1) for v in torch.meshgrid(chosen, chosen, indexing="ij"))  # type: ignore


# Functions whose every step PyTorch rounds the same way.
EXACT: dict[str, Function] = {
    "abs": torch.abs, "neg": torch.neg, "sign": torch.sign, "sqrt": torch.sqrt, "floor": torch.floor,
    "ceil": torch.ceil, "round": torch.round, "trunc": torch.trunc, "reciprocal": torch.reciprocal,
    "relu": torch.relu, "square": torch.square, "logical_not": torch.logical_not, "isnan": torch.isnan,
    "isinf": torch.isinf, "clamp": lambda x: x.clamp(-0.1, 0.7), "relu6": F.relu6, "where": lambda x: torch.where(x > 0, x, 0.1),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1), "to bool": lambda x: x.bool(), "add number": lambda x: x + 0.1,
    "multiplied": lambda x: x * 0.7, "number less": lambda x: 0.3 - x, "divided": lambda x: x / 0.7,
    "equals": lambda x: x == 0.1, "masked": lambda x: x.masked_fill(x.isnan(), 0.1),
}  # fmt: skip
# Others, with bounds in units of the last place: (f32, f64, f32 on a GPU). e^x there is 2^(x log2 e) with a product
# rounded to f32, so its error grows with x.
ROUNDED: dict[str, tuple[Function, tuple[float, float, float]]] = {
    "exp": (torch.exp, (1, 1, 100)), "exp2": (torch.exp2, (1, 1, 4)), "expm1": (torch.expm1, (5, 5, 100)),
    "log": (torch.log, (1, 1, 4)), "log2": (torch.log2, (1, 1, 4)), "log10": (torch.log10, (3, 3, 4)),
    "log1p": (torch.log1p, (3, 3, 6)), "rsqrt": (torch.rsqrt, (1, 2, 4)), "sin": (torch.sin, (2, 1, 4)),
    "cos": (torch.cos, (2, 1, 4)), "tan": (torch.tan, (4, 3, 8)), "tanh": (torch.tanh, (6, 6, 12)),
    "sigmoid": (torch.sigmoid, (3, 3, 100)), "erf": (torch.erf, (2, 2, 4)), "sinh": (torch.sinh, (5, 5, 100)),
    "cosh": (torch.cosh, (3, 3, 100)), "atan": (torch.atan, (3, 3, 4)), "silu": (F.silu, (4, 4, 100)),
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
