"""Comparing outputs, and inputs at other sizes."""

from __future__ import annotations

import math

import pytest
import torch

from irc.core.contract import EXACT, Preserves
from irc.core.errors import IrcError, NumericError
from irc.core.manager import PassManager
from irc.core.numeric import (
    allowed_error,
    compare_outputs,
    compare_values,
    inputs_at,
    logits_metrics,
    other_sizes,
    run_outputs,
)
from irc.core.program import VAL
from tests.manager.toys import SquareToPow, aten, toy_program


def test_relative_to_the_largest_value() -> None:
    before = torch.tensor([1.0, -200.0, 0.0])
    found = compare_values(before, before + torch.tensor([0.0, 0.0, 1.0]))
    assert (found.absolute, found.relative, found.position) == (1.0, 1 / 200, (2,))
    assert compare_values(torch.zeros(3), torch.zeros(3)).relative == 0.0
    assert compare_values(torch.zeros(3), torch.full((3,), 1e-30)).relative == math.inf
    assert compare_values(torch.zeros(0, 3), torch.zeros(0, 3)).relative == 0.0


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (torch.zeros(2), torch.zeros(3), "was f32[2] and is f32[3]"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), "was f32[2] and is f64[2]"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "has 1 of 2 values wrong: at [1] it was 2 and is 3"),
        (torch.tensor([True]), torch.tensor([False]), "has 1 of 1 values wrong: at [0] it was True and is False"),
        (torch.ones(2), torch.tensor([1, math.nan]), "was 1.0 and is nan at [1]"),
        (torch.tensor([math.inf, 0]), torch.tensor([-math.inf, 0]), "was inf and is -inf at [0]"),
        (torch.tensor([math.nan, 0]), torch.tensor([1.0, 0]), "was nan and is 1.0 at [0]"),
        (3, 4, "was 3 and is 4"),
        (3, torch.tensor(3), "was 3 and is tensor(3)"),
    ],
)
def test_differences_that_no_tolerance_covers(before: object, after: object, problem: str) -> None:
    assert compare_values(before, after).problem == problem
    violations = compare_outputs([before], [after]).violations(Preserves(rtol=1e9), 1e9)
    assert [text for _, text in violations] == [f"output 0 {problem}"]


def test_equal_infinities_and_nan_are_equal() -> None:
    value = torch.tensor([-math.inf, math.nan, 2.0])
    found = compare_values(value, value.clone())
    assert (found.problem, found.relative) == ("", 0.0)
    found = compare_values(torch.tensor([-math.inf, 2.0]), torch.tensor([-math.inf, 2.5]))
    assert found.relative == 0.25  # the infinity does not count as the largest value


def test_a_missing_output() -> None:
    assert compare_outputs([1, 2], [1]).violations(EXACT, 1.0)[0][1] == (
        "output 0 is one of 1 outputs, before there were 2"
    )


def test_logits_metrics() -> None:
    p = torch.tensor([[[0.0, math.log(3.0)] + [-math.inf] * 30] * 2])
    q = p.clone()
    q[0, 1, :2] = torch.tensor([math.log(3.0), 0.0])
    kl, top1 = logits_metrics(p, q)
    assert top1 == 0.5
    assert kl == pytest.approx(0.5 * (0.75 * math.log(3) - 0.25 * math.log(3)))
    found = compare_values(p, q)
    assert (found.kl, found.top1) == (kl, top1)
    assert compare_values(p[0], q[0]).kl is None  # no [B, S, V]
    assert compare_values(p[..., :8], q[..., :8]).kl is None  # too narrow for tokens


def test_kl_bounds_a_lossy_pass() -> None:
    before = torch.zeros(1, 1, 32)
    after = before.clone()
    after[..., 0] = 2.0
    before[..., 1] = 10.0
    after[..., 1] = 9.0
    found = compare_outputs([before], [after])
    assert not found.violations(Preserves(kind="lossy", rtol=0.5), 0.5)
    text = found.violations(Preserves(kind="lossy", rtol=0.5, max_kl=1e-4), 0.5)[0][1]
    assert "nats a token, 1.0e-04 is allowed" in text


def test_half_types_get_their_rounding() -> None:
    assert allowed_error(EXACT, toy_program()) == 1e-5
    half = allowed_error(EXACT, toy_program(dtype=torch.float16))
    assert half == 1e-5 + 4 * torch.finfo(torch.float16).eps
    assert allowed_error(Preserves(kind="lossy", rtol=0.1), toy_program(dtype=torch.bfloat16)) == 0.1


def test_kept_outputs_share_no_memory() -> None:
    program = toy_program()
    weight = program.graph.find_nodes(op="get_attr")[0]
    program.output_node.args = ((weight, program.placeholders[0]),)
    assert program.example_inputs is not None
    kept = run_outputs(program, program.example_inputs)
    expected = [value.clone() for value in kept]
    program.weight(weight).data.zero_()
    program.example_inputs[0].zero_()
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_other_sizes_include_one_and_are_different() -> None:
    program = toy_program()
    assert other_sizes(program) == [{"B": 1, "S": 7}, {"B": 1, "S": 5}]
    assert program.example_inputs is not None
    (made,) = inputs_at(program, program.example_inputs, {"B": 1, "S": 7})
    assert made.shape == (1, 7, 8)
    assert torch.equal(made[:, :5], program.example_inputs[0][:1])
    with pytest.raises(IrcError, match="is not given by the dimensions B"):
        inputs_at(program, program.example_inputs, {"B": 1})


def test_inputs_at_keeps_integers_in_range() -> None:
    program = toy_program()
    with program.fake_mode:
        program.placeholders[0].meta[VAL] = program.placeholders[0].meta[VAL].long()
    ids = torch.arange(100, 100 + 3 * 5 * 8).view(3, 5, 8)
    (made,) = inputs_at(program, [ids], {"B": 5, "S": 9})
    assert made.shape == (5, 9, 8)
    assert set(made.flatten().tolist()) <= set(ids.flatten().tolist())


def test_a_pass_that_is_right_at_one_size_only_is_caught() -> None:
    """The example has S = 5: a pass that bakes that in is right there, and wrong at any other size."""

    class BakesIn(SquareToPow):
        def run(self, program, ctx):
            result = SquareToPow.run(self, program, ctx)
            node = program.node("logits")
            rows = program.weight_node("rows", torch.arange(5), before=node)
            head = program.insert(aten.index_select.default, node.args[0], 1, rows, before=node)
            node.args = (head, *node.args[1:])
            return result

    with pytest.raises(NumericError) as caught:
        PassManager([BakesIn()]).run(toy_program())
    assert "at B=1, S=7: output 0 was f32[1, 7, 40] and is f32[1, 5, 40]" in str(caught.value)


def test_sizes_that_the_program_refuses_are_noted() -> None:
    program = toy_program()
    node = program.node("add_0")
    third = program.weight_node("third", torch.tensor([2]), before=node.next)
    chosen = program.insert(aten.index_select.default, node, 0, third, before=node.next.next)
    node.replace_all_uses_with(chosen, delete_user_cb=lambda user: user is not chosen)
    program.infer_types()
    result = PassManager([SquareToPow()]).run(program, program.example_inputs)
    assert "checked at the example's sizes only: the program does not run at B=1, S=7" in str(result.report)
