"""raise-linear: products with a stored matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import irc
from irc.core.program import Program
from irc.passes import DropNoise, RaiseLinear
from tests.passes.running import assert_same, operations, run_pass


class Model(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.w_kn, self.w_nk = nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(10, 6))
        self.b, self.stack = nn.Parameter(torch.randn(10)), nn.Parameter(torch.randn(2, 6, 10))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, 6)
        forms = {
            "conv1d": lambda: torch.addmm(self.b, flat, self.w_kn).view(*x.shape[:-1], 10),
            "matmul": lambda: x @ self.w_kn,
            "turned": lambda: x @ self.w_nk.t(),
            "turned by transpose": lambda: x @ self.w_nk.transpose(-1, -2),
            "mm, flat result": lambda: torch.mm(flat, self.w_kn),
            "alpha": lambda: torch.addmm(self.b, flat, self.w_kn, alpha=2.0),
            "bias by rows": lambda: torch.addmm(flat[:, :1], flat, self.w_kn),
            "stacked": lambda: x[:, None] @ self.stack,
            "computed": lambda: flat @ torch.tanh(self.w_kn),
        }
        return forms[self.form]()


def program_of(form: str) -> Program:
    program = irc.capture(Model(form).eval(), (torch.randn(3, 5, 6),), dynamic=({0: "B", 1: "S"},), canonicalize=False)
    return run_pass(DropNoise(), program).program


@pytest.mark.parametrize("form", ["conv1d", "matmul", "turned", "turned by transpose", "mm, flat result"])
def test_rewrites(form: str) -> None:
    program = program_of(form)
    result = run_pass(RaiseLinear(), program)
    assert result.matches == 1
    counts = operations(result.program)
    assert counts["linear"] == 1
    assert not counts.keys() & {"mm", "addmm", "matmul", "t", "transpose"}
    if form == "conv1d":
        assert set(counts) == {"linear"}, "the views around the product are gone"
    for shape in ((3, 5, 6), (1, 1, 6), (2, 7, 6)):
        assert_same(program, result.program, (torch.randn(shape),))
    assert result.program.weight_bytes == program.weight_bytes
    assert run_pass(RaiseLinear(), result.program).matches == 0


@pytest.mark.parametrize(
    ("form", "reason"), [("alpha", "alpha"), ("bias by rows", "no bias"), ("stacked", "3 dimensions")]
)
def test_refuses(form: str, reason: str) -> None:
    result = run_pass(RaiseLinear(), program_of(form))
    assert result.matches == 0
    assert reason in "; ".join(skip.reason for skip in result.skips)


def test_a_computed_matrix_is_no_candidate() -> None:
    result = run_pass(RaiseLinear(), program_of("computed"))
    assert (result.matches, list(result.skips)) == (0, [])


def test_no_bytes_are_copied() -> None:
    program = program_of("conv1d")
    after = run_pass(RaiseLinear(), program).program
    before = {w.untyped_storage().data_ptr() for w in program.weights.values()}
    assert {w.untyped_storage().data_ptr() for w in after.weights.values()} <= before
