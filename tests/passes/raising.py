"""Small modules and comparisons shared by the tests of the raising passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from irc.core.contract import Pass, PassResult
from irc.core.program import Program
from irc.frontend import capture
from irc.passes import DropNoise
from tests.passes.running import assert_same, run_pass

SHAPES = ((3, 4), (1, 1), (2, 7))


class Function(nn.Module):
    """A function of inputs and, after them, of this module's weights."""

    def __init__(self, function: Callable[..., Tensor], *weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for index, weight in enumerate(weights):
            self.register_parameter(f"w{index}", nn.Parameter(weight, requires_grad=False))
        self.num_weights = len(weights)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, *(getattr(self, f"w{i}") for i in range(self.num_weights)))


def captured(function: Callable[..., Tensor], inputs: Sequence[Tensor], *weights: Tensor) -> Program:
    """A program of the function, batch and sequence (the first two dimensions) dynamic, without no-ops."""
    dynamic = tuple({0: "B", 1: "S"} if x.ndim > 2 else {} for x in inputs)
    program = capture(Function(function, *weights), tuple(inputs), dynamic=(dynamic,), canonicalize=False)
    return run_pass(DropNoise(), program).program


def raised(one: Pass, program: Program, *, widths: Sequence[tuple[int, ...]], dtype: Any = torch.float32) -> PassResult:
    """The pass's result, checked against the program at three sizes and for idempotence."""
    result = run_pass(one, program)
    generator = torch.Generator().manual_seed(1)
    for shape in SHAPES:
        inputs = [torch.randn(*shape, *width, generator=generator).to(dtype) for width in widths]
        rtol = 1e-5 if dtype == torch.float32 else 2e-2
        assert_same(program, result.program, inputs, rtol=rtol)
    again = run_pass(one, result.program)
    assert (again.matches, again.modified) == (0, False)
    return result
