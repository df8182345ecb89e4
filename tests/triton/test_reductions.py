"""Reductions of printed Triton kernels: rows and columns, ties and NaN, lengths over several blocks of lanes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.triton.operations import NATIVE, Function, difference, run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EXTREMES: dict[str, Function] = {
    "amax": lambda x, d: x.amax(d), "amin": lambda x, d: x.amin(d), "argmax": lambda x, d: x.argmax(d),
    "argmin": lambda x, d: x.argmin(d), "max": lambda x, d: x.max(d).values, "max at": lambda x, d: x.max(d).indices,
    "min": lambda x, d: x.min(d).values, "min at": lambda x, d: x.min(d).indices, "any": lambda x, d: (x > 0).any(d),
    "all": lambda x, d: (x < 3).all(d),
}  # fmt: skip
SUMS: dict[str, Function] = {
    "sum": lambda x, d: x.sum(d), "mean": lambda x, d: x.mean(d), "var": lambda x, d: x.var(d),
    "std": lambda x, d: x.std(d, correction=0),
    "count": lambda x, d: (x > 0).sum(d), "softmax": lambda x, d: x.softmax(d),
    "log_softmax": lambda x, d: x.log_softmax(d), "norm": lambda x, d: x / (x * x).sum(d, keepdim=True).sqrt(),
}  # fmt: skip


def special(rows: int, length: int) -> Tensor:
    """Rows with ties, infinities, one NaN and two; the last is all the same."""
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(rows)).round(decimals=1)
    x[0, length // 2] = x[0, length - 1] = math.nan
    x[1, length // 3] = math.nan
    x[2], x[3] = math.inf, -math.inf
    x[4, length // 2], x[4, length - 1] = math.inf, -math.inf
    x[rows - 1] = 2.0
    return x


def held(functions: dict[str, Function], x: Tensor, dim: int, *, ulps: float = 0,
         others: tuple[Tensor, ...] = ()) -> None:  # fmt: skip
    """Along one axis against PyTorch in f64, for the tensor itself and for others where that axis is dynamic."""
    chosen = [lambda x, f=function: f(x, dim) for function in functions.values()]
    dynamic = ({dim % x.dim(): "S"},) if others else None
    for given in others or (x,):
        found = run(chosen, [x], others=[given], dynamic=dynamic)
        wide = given.double() if given.is_floating_point() else given
        for name, function, value in zip(functions, chosen, found, strict=True):
            fault = difference(value, function(wide).to(value.dtype), ulps)
            assert not fault, f"{name} of {list(given.shape)} along {dim}: {fault}"


@pytest.mark.parametrize(("length", "dim"), [(5, 1), (64, 1), (2500, 1), (7, 0), (1, 1)])
def test_extremes(length: int, dim: int) -> None:
    rows = special(7, length)
    held(EXTREMES, rows if dim == 1 else rows.t().contiguous(), dim)


@pytest.mark.parametrize(("length", "dim"), [(6, 1), (2500, 1), (7, 0)])
def test_sums(length: int, dim: int) -> None:
    rows = 1 + torch.rand(6, length, generator=torch.Generator().manual_seed(0))
    held(SUMS, rows if dim == 1 else rows.t().contiguous(), dim, ulps=500 if NATIVE else 64)


def test_lengths_known_only_at_run_time() -> None:
    example = 1 + torch.rand(6, 9, generator=torch.Generator().manual_seed(0))
    lengths = tuple(special(6, n) for n in (6, 1030))
    held(EXTREMES, example, 1, others=lengths)
    held(SUMS, example, 1, others=(example[:, :2], example.repeat(1, 120)),
         ulps=500 if NATIVE else 64)  # fmt: skip
    held(EXTREMES, example.t().contiguous(), 0, others=tuple(x.t().contiguous() for x in lengths[:1]))


def test_sums_up_to_each_element() -> None:
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    for dim in (0, 1):
        held({"cumsum": lambda x, d: x.cumsum(d)}, x, dim, ulps=1000)
    held({"cumsum": lambda x, d: x.cumsum(d)}, x, 1, ulps=1000, others=(x[:, :1], x.repeat(1, 2)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.bool, torch.float64], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    x = torch.randint(-3, 4, (5, 37), generator=torch.Generator().manual_seed(0)).to(dtype)
    functions: dict[str, Function] = {
        "sum": lambda x, d: x.sum(d), "any": lambda x, d: x.any(d), "all": lambda x, d: x.all(d),
        "mean": lambda x, d: x.float().mean(d),
    }  # fmt: skip
    if dtype != torch.bool:
        functions |= EXTREMES
    else:
        functions |= {"amax": lambda x, d: x.amax(d), "amin": lambda x, d: x.amin(d)}
    for dim in (0, 1):
        held(functions, x, dim, ulps=1)


def test_products() -> None:
    """Triton's interpreter takes them element by element: few."""
    for dtype in (torch.float32, torch.int64):
        x = torch.arange(1, 13).view(3, 4).to(dtype)
        for dim in (0, 1):
            held({"prod": lambda x, d: x.prod(d)}, x, dim)


def test_several_axes_and_none() -> None:
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    functions: list[Function] = [
        lambda x: x.sum(), lambda x: x.amax((1, 3)), lambda x: x.mean((0, 2), keepdim=True), lambda x: x.max(),
        lambda x: x.argmax(), lambda x: x.flatten(1, 2).sum(1), lambda x: (x > 0).any(), lambda x: x.amin((0, 1, 2, 3)),
        lambda x: F.layer_norm(x, (5, 6)), lambda x: F.group_norm(x, 2), lambda x: x.transpose(1, 3).sum(-1),
        lambda x: x.sum(1) * x.amax(), lambda x: x - x.mean((2, 3), keepdim=True),
        lambda x: x.permute(3, 1, 0, 2).softmax(1),
    ]  # fmt: skip
    for function, value in zip(functions, run(functions, [x]), strict=True):
        torch.testing.assert_close(value, function(x.double()).to(value.dtype), rtol=1e-5, atol=1e-5)


def test_nothing_to_reduce() -> None:
    x = torch.randn(4, 6)
    functions: list[Function] = [
        lambda x: x[:, :0].sum(1), lambda x: x[:, :0].prod(1), lambda x: (x[:, :0] > 0).any(1), lambda x: x[:0].sum(1),
        lambda x: (x[:, :0] > 0).all(1), lambda x: x[:, :0].mean(1), lambda x: x[:0].all(0), lambda x: x[:, :0] + 1,
    ]  # fmt: skip
    for function, value in zip(functions, run(functions, [x]), strict=True):
        torch.testing.assert_close(value, function(x), equal_nan=True)


def test_rows_that_are_read_again() -> None:
    """A normalized sum and the sum itself: one kernel, which reads what it wrote."""
    x, y = (torch.randn(5, 300, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    functions: list[Function] = [
        lambda x, y: x + y, lambda x, y: F.layer_norm(x + y, (300,)), lambda x, y: (x + y).amax(1),
        lambda x, y: torch.ops.irc.rms_norm(x + y, y[0], 1e-6), lambda x, y: ((x + y) * 0.5).softmax(1).cumsum(1),
    ]  # fmt: skip
    for function, value in zip(functions, run(functions, [x, y]), strict=True):
        torch.testing.assert_close(value, function(x.double(), y.double()).float(), rtol=1e-5, atol=1e-6)
    halves = [x.bfloat16(), y.bfloat16()]
    for function, value in zip(functions[:4], run(functions[:4], halves), strict=True):
        torch.testing.assert_close(value, function(*halves), rtol=2**-7, atol=2**-7)
