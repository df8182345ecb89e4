"""Max pooling against PyTorch: equal, NaN and infinity included."""

from __future__ import annotations

import ctypes

import pytest
import torch

from irc.core.errors import TargetError
from irc.lowering.cpp.templates import max_pool2d as template
from irc.lowering.cpp.templates.base import C_TYPES
from irc.lowering.cpp.templates.conv2d import ConvProblem
from tests.kernels.building import adding_rows, build, needs_compiler, pointer, runnable_isas, workers_function


def _problem(channels: int, **options: object) -> ConvProblem:
    return ConvProblem(channels=channels, out_channels=channels, groups=channels, **options)


CASES = (
    (_problem(70, kernel=(3, 3), stride=(2, 2), padding=(1, 1)), 9, 12),
    (_problem(3, kernel=(2, 4), stride=(1, 3), padding=(1, 2), dilation=(2, 1)), 7, 8),
    (_problem(64, kernel=(2, 2), stride=(2, 2), activation="bf16"), 4, 4),
    (_problem(70, kernel=(3, 3), stride=(2, 2), padding=(1, 1), activation="u8"), 9, 12),
    (_problem(70, kernel=(3, 2), padding=(1, 1), activation="i8"), 5, 6),
)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "u8": torch.uint8, "i8": torch.int8}
TYPES = {**C_TYPES, "u8": "uint8_t", "i8": "int8_t"}


def _function(name: str, problem: ConvProblem) -> str:
    sizes = ("batch", "height", "width", "out_height", "out_width")
    call = template.call(problem, {key: key for key in ("worker", "x", *sizes)}, adding_rows(problem.channels))
    sizes_text = ", ".join(f"int64_t {size}" for size in sizes)
    parameters = f"const {TYPES[problem.activation]}* x, {sizes_text}, float* out"
    return workers_function(name, parameters, call)


@pytest.fixture(scope="module", params=runnable_isas())
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    functions = [_function(f"case{i}", problem) for i, (problem, _, _) in enumerate(CASES)]
    return build(template.INCLUDES, functions, request.param)


@needs_compiler
@pytest.mark.parametrize("index", range(len(CASES)))
def test_equals_pytorch(kernels: ctypes.CDLL, index: int) -> None:
    problem, height, width = CASES[index]
    x = torch.randn(2, problem.channels, height, width, generator=torch.Generator().manual_seed(index))
    if problem.activation in ("u8", "i8"):
        x = (50 * x).clamp(*((0, 255) if problem.activation == "u8" else (-128, 127)))
        x[0, 2, :, :] = x.min()
    else:
        x[0, 0, 1, 1], x[1, 1, 2, 0], x[0, 2, :, :] = torch.nan, torch.inf, -torch.inf
    x = x.to(DTYPES[problem.activation])
    given = x.permute(0, 2, 3, 1).contiguous()
    wanted = torch.nn.functional.max_pool2d(
        x.float(), problem.kernel, problem.stride, problem.padding, problem.dilation
    )
    sizes = [ctypes.c_int64(size) for size in (2, height, width, *wanted.shape[2:])]
    for threads in (1, 3):
        out = torch.zeros_like(wanted.permute(0, 2, 3, 1)).contiguous()
        getattr(kernels, f"case{index}")(threads, pointer(given), *sizes, pointer(out))
        torch.testing.assert_close(out.permute(0, 3, 1, 2), wanted, rtol=0, atol=0, equal_nan=True)


def test_refuses() -> None:
    assert "i64" in (template.refuses(_problem(3, kernel=(2, 2), activation="i64"), "avx2") or "")
    with pytest.raises(TargetError, match="several channels"):
        template.call(ConvProblem(channels=4, out_channels=2, kernel=(2, 2)), {}, "")
