"""`PassManager`: the contract of a pass, held against honest passes and every kind of dishonest one."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from irc.core.contract import Pass, PassContext, PassResult, Preserves
from irc.core.errors import IrcError, NumericError, OptionError, PassError, VerificationError
from irc.core.manager import PassManager
from irc.core.program import Program
from irc.core.provenance import location, module_path
from tests.manager.toys import (
    AddScaleInput,
    Fails,
    Liar,
    NeedsPeace,
    PowToSquare,
    RoundWeights,
    SquareToPow,
    TakeOver,
    WriteInPlace,
    aten,
    squares,
    toy_program,
)


def targets(program: Program) -> list[object]:
    return [node.target for node in program.operations()]


def test_runs_a_pipeline_and_reports(program: Program) -> None:
    result = PassManager([SquareToPow(), PowToSquare(), PowToSquare()]).run(program)
    assert list(result.stages) == ["capture", "square-to-pow", "pow-to-square", "pow-to-square#2"]
    assert result.stages["capture"] is program
    assert result.program is result.stages["pow-to-square#2"]
    rows = result.report.rows
    assert [(row.name, row.matches, row.nodes, row.modified) for row in rows] == [
        ("capture", None, 13, False),
        ("square-to-pow", 3, 13, True),
        ("pow-to-square", 3, 13, True),
        ("pow-to-square#2", 0, 13, False),
    ]
    assert rows[1].statistics == {"squares": 3}
    assert rows[1].relative_error is not None
    assert rows[1].relative_error <= 1e-6
    assert rows[1].kl is not None
    assert rows[1].kl < 1e-9
    assert rows[1].top1 == 1.0
    assert rows[1].weight_bytes == program.weight_bytes > 0
    assert all(row.flops for row in rows)
    assert all(row.verify_ms > 0 for row in rows)


def test_stages_share_weights_but_not_graphs(program: Program) -> None:
    before = [str(node) for node in program.graph.nodes]
    result = PassManager([SquareToPow()]).run(program)
    assert [str(node) for node in program.graph.nodes] == before
    assert squares(program)
    assert not squares(result.program)
    for name, weight in program.weights.items():
        assert result.program.weight(name) is weight


def test_keeps_only_the_last_stage_if_asked(program: Program) -> None:
    result = PassManager([SquareToPow(), PowToSquare()], keep_stages=False).run(program)
    assert list(result.stages) == ["pow-to-square"]
    assert len(result.report.rows) == 3


def test_provenance_survives(program: Program) -> None:
    result = PassManager([SquareToPow(), PowToSquare(), TakeOver()]).run(program)
    node = squares(result.program)[1]
    assert (module_path(node), location(node)) == ("layers.1", "model.py:12")


@pytest.mark.usefixtures("registered")
def test_takes_text(program: Program) -> None:
    result = PassManager("square-to-pow{at-most=2},pow-to-square", verify="end").run(program)
    assert [row.matches for row in result.report.rows] == [None, 2, 2]


def test_order_matters_and_shows(program: Program) -> None:
    """Swapped, the second pass finds nothing to do: visible in the report, and an error where matches are expected."""
    result = PassManager([PowToSquare(), SquareToPow()]).run(program)
    assert [row.matches for row in result.report.rows] == [None, 0, 3]
    assert "pow-to-square matched nothing: no candidate was seen" in str(result.report)
    with pytest.raises(PassError) as caught:
        PassManager([PowToSquare(expect_matches=1), SquareToPow()]).run(program)
    assert str(caught.value) == (
        "pass 'pow-to-square' rewrote 0 places, 1 was expected\n"
        "  it saw no candidate\n"
        "  change the model or the condition, or lower expect-matches"
    )


# -------------------------------------------------------------------- the contract


def test_fewer_matches_than_expected_gives_the_nearest_miss(program: Program) -> None:
    with pytest.raises(PassError) as caught:
        PassManager([SquareToPow(at_most=1, expect_matches=3)]).run(program)
    assert str(caught.value) == (
        "pass 'square-to-pow' rewrote 1 place, 3 were expected\n"
        "  nearest miss: %square_2 (layers.2 model.py:12): only 1 were asked for\n"
        "  all 2 candidates that were refused:\n"
        "    2 × only 1 were asked for\n"
        "  change the model or the condition, or lower expect-matches"
    )
    assert (caught.value.pass_name, caught.value.node) == ("square-to-pow", "square_2")
    PassManager([SquareToPow(at_most=1, expect_matches=1)]).run(program)


def test_requires_reports_all_problems(program: Program) -> None:
    with pytest.raises(PassError) as caught:
        PassManager([NeedsPeace()]).run(program)
    assert str(caught.value) == (
        "pass 'needs-peace' cannot run on program toy:\n"
        "  - there is no convolution\n"
        "  - input x is not integral"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("says", "does", "message"),
    [
        (False, "operation", "says that the program is unchanged, but its structural hash is different"),
        (False, "weight", "says that the program is unchanged, but its structural hash is different"),
        (True, "nothing", "says that the program is changed, but its structural hash is the same"),
    ],
)
@pytest.mark.parametrize("verify", ["each", "off"])
def test_false_claims_are_caught(program: Program, says: bool, does: str, message: str, verify: str) -> None:
    with pytest.raises(PassError) as caught:
        PassManager([Liar(says=says, does=does)], verify=verify).run(program)
    assert message in str(caught.value)
    assert caught.value.pass_name == "liar"


@pytest.mark.parametrize(
    ("says", "does"), [(None, "operation"), (True, "weight"), (False, "nothing"), (None, "nothing")]
)
def test_true_claims_pass(program: Program, says: bool | None, does: str) -> None:
    row = PassManager([Liar(says=says, does=does)]).run(program).report["liar"]
    assert row.modified == (does != "nothing")


@pytest.mark.parametrize(
    ("how", "what"), [("method", "weight 'w1'"), ("data", "weight 'w1'"), ("input", "example input 0")]
)
def test_a_write_in_place_is_caught(program: Program, how: str, what: str) -> None:
    with pytest.raises(PassError) as caught:
        PassManager([SquareToPow(), WriteInPlace(how=how)]).run(program)
    assert str(caught.value) == (
        f"pass 'write-in-place' wrote into {what} in place. Stages share weights, so the programs of all"
        " earlier stages have changed too.\n  The author of the pass must make a new tensor"
        " (program.weight_node(name, tensor, before=node)) and use that."
    )


def test_a_write_in_place_is_caught_without_verification_too(program: Program) -> None:
    with pytest.raises(PassError, match="wrote into weight 'w1' in place"):
        PassManager([WriteInPlace()], verify="off").run(program)


def test_an_error_in_a_pass_names_it(program: Program) -> None:
    with pytest.raises(PassError, match="pass 'fails' failed with KeyError: 'surprise'") as caught:
        PassManager([Fails()]).run(program)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_result_of_the_wrong_type(program: Program) -> None:
    with pytest.raises(PassError, match=r"pass 'fails' returned Program; its run method must return PassResult"):
        PassManager([Fails(how="return")]).run(program)


def test_broken_types_name_the_pass(program: Program) -> None:
    with pytest.raises(VerificationError) as caught:
        PassManager([Fails(how="types")]).run(program)
    assert str(caught.value).startswith("pass 'fails' left a program that breaks the rules of the IR:\n")
    assert "aten.mm" in str(caught.value)


def test_a_finding_of_the_pass_is_an_error_with_the_node(program: Program) -> None:
    with pytest.raises(VerificationError) as caught:
        PassManager([Fails(how="finding")]).run(program)
    assert str(caught.value) == (
        "pass 'fails' broke its own promise in 1 place:\n"
        "  %square_1 = aten.mul.Tensor at layers.1 (model.py:12)\n"
        "    is still a square\n"
        "    %add_0: f32[B, S, 8] = aten.add.Tensor(%square_0, %x)\n"
        "    %linear_1: f32[B, S, 8] = aten.linear(%add_0, @w1, @b1)\n"
        "    %relu_1: f32[B, S, 8] = aten.relu(%linear_1)\n"
        "    %square_1: f32[B, S, 8] = aten.mul.Tensor(%relu_1, %relu_1)\n"
        "    ^^^^^^^^^\n"
        "    %add_1: f32[B, S, 8] = aten.add.Tensor(%square_1, %add_0)\n"
        "    %linear_2: f32[B, S, 8] = aten.linear(%add_1, @w2, @b2)\n"
        "    %relu_2: f32[B, S, 8] = aten.relu(%linear_2)"
    )
    assert caught.value.node == "square_1"


def test_a_program_that_does_not_run_names_the_node(program: Program) -> None:
    with pytest.raises(VerificationError) as caught:
        PassManager([Fails(how="crash")]).run(program)
    text = str(caught.value)
    assert text.startswith("after pass 'fails' the program does not run: ")
    assert "at %index_select = aten.index_select" in text
    assert caught.value.node == "index_select"


def test_a_dynamic_dimension_that_is_fixed_is_an_error(program: Program) -> None:
    class Fixes(SquareToPow):
        def run(self, program: Program, ctx: PassContext) -> PassResult:
            node = program.node("add_1")
            table = program.weight_node("table", torch.zeros(5, 8), before=node)
            added = program.insert(aten.add.Tensor, node.args[0], table, before=node)
            node.replace_input_with(node.args[0], added)
            return PassResult(program, matches=1)

    with pytest.raises(VerificationError) as caught:
        PassManager([Fixes()]).run(program)
    assert str(caught.value) == (
        "pass 'square-to-pow' left a program that breaks the rules of the IR:\n"
        "  dimension S was dynamic and is fixed at 5: an operation needs just that size. New operations:\n"
        "    %add = aten.add.Tensor at layers.1 (model.py:12)"
    )


# -------------------------------------------------------------------- numbers


WRONG_SQUARE = """\
pass 'square-to-pow' changed the numbers: output 0 differs by 9.0e+00 relative, 1.0e-05 is allowed
  first wrong node: %pow_2 = aten.pow.Tensor_Scalar at layers.1 (model.py:12)
    before: %square_1: f32[3, 5, 8], [0, 4, 0:] = 21.89, 9.543, 0, 2.692, …
    after:  %pow_2: f32[3, 5, 8], [0, 4, 0:] = 102.4, 29.48, 0, 4.417, …
    max |after - before| = 80.5 (3.7e+00 relative) at [0, 4, 0]
  what it is computed from agrees with the program before the pass
    %add_0: f32[B, S, 8] = aten.add.Tensor(%pow_1, %x)
    %linear_1: f32[B, S, 8] = aten.linear(%add_0, @w1, @b1)
    %relu_1: f32[B, S, 8] = aten.relu(%linear_1)
    %pow_2: f32[B, S, 8] = aten.pow.Tensor_Scalar(%relu_1, 3)
    ^^^^^^
    %add_1: f32[B, S, 8] = aten.add.Tensor(%pow_2, %add_0)
    %linear_2: f32[B, S, 8] = aten.linear(%add_1, @w2, @b2)
    %relu_2: f32[B, S, 8] = aten.relu(%linear_2)
  to find the rewrite that does it: irc bisect
  if it is meant to: preserves=Preserves(kind="lossy", rtol=…) of the pass or rule says by how much"""


def test_a_wrong_rewrite_is_named_with_its_node(program: Program) -> None:
    with pytest.raises(NumericError) as caught:
        PassManager([PowToSquare(), SquareToPow(wrong=(1,))]).run(program)
    assert str(caught.value) == WRONG_SQUARE
    assert (caught.value.pass_name, caught.value.node) == ("square-to-pow", "pow_2")


def test_verify_off_does_not_run_the_program(program: Program) -> None:
    row = PassManager([SquareToPow(wrong=(1,))], verify="off").run(program).report.rows[1]
    assert row.relative_error is None


def test_verify_end_compares_with_the_start(program: Program) -> None:
    result = PassManager([SquareToPow(), PowToSquare()], verify="end").run(program)
    assert [row.relative_error is None for row in result.report.rows] == [True, True, False]
    with pytest.raises(NumericError, match=r"the pipeline changed the numbers of program toy: output 0 differs by"):
        PassManager([SquareToPow(wrong=(0,)), PowToSquare()], verify="end").run(program)


def test_each_stage_is_executed_once(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    plain = Program.run
    monkeypatch.setattr(Program, "run", lambda self, *inputs: runs.append(self.name) or plain(self, *inputs))
    PassManager([SquareToPow(), PowToSquare(), PowToSquare()]).run(program)
    # Two sets of inputs for: the start, and each of the two passes that changed something.
    assert len(runs) == 2 * 3


def test_before_values_are_taken_before_the_pass(program: Program) -> None:
    """A pass that breaks the very program it was compared with must not get away with it."""

    class Saboteur(SquareToPow):
        def run(self, program: Program, ctx: PassContext) -> PassResult:
            result = SquareToPow.run(self, program, ctx)
            for node in squares(victim):
                victim.replace(node, victim.insert(aten.pow.Tensor_Scalar, node.args[0], 3, before=node))
            return result

    victim = program
    with pytest.raises(NumericError):
        PassManager([Saboteur(wrong=(0, 1, 2))]).run(program)


def test_a_lossy_pass_is_held_to_its_metric(program: Program) -> None:
    row = PassManager([RoundWeights()]).run(program).report["round-weights"]
    assert row.kl is not None
    assert 1e-7 < row.kl <= 0.05
    assert row.top1 is not None
    assert row.top1 >= 0.8
    with pytest.raises(NumericError, match=r"pass 'round-weights' changed the numbers: output 0 .* is allowed"):
        PassManager([RoundWeights(steps=1)]).run(program)

    class Stricter(RoundWeights):
        preserves: ClassVar[Preserves] = Preserves(kind="lossy", rtol=0.3, max_kl=1e-9)

    with pytest.raises(NumericError, match=r'if it is meant to: preserves=Preserves\(kind="lossy", max_kl=…\)'):
        PassManager([Stricter()]).run(program)


def test_half_types_may_round() -> None:
    program = toy_program(dtype=torch.bfloat16, logits=False)
    row = PassManager([SquareToPow()]).run(program).report["square-to-pow"]
    assert row.relative_error is not None
    assert row.relative_error < 0.02
    with pytest.raises(NumericError):
        PassManager([SquareToPow(wrong=(2,))]).run(program)


def test_a_changed_signature_is_compared_by_replay(program: Program) -> None:
    result = PassManager([AddScaleInput(), SquareToPow()]).run(program)
    assert result.program.input_names == ["x", "factor"]
    assert result.report["add-scale-input"].relative_error == 0.0
    assert result.report["square-to-pow"].relative_error is not None
    with pytest.raises(NumericError, match="largest difference at"):
        PassManager([AddScaleInput(scale=1.5)]).run(program)
    with pytest.raises(PassError, match=r"from \(x\) to \(x, factor\) without a replay in its result"):
        PassManager([AddScaleInput(with_replay=False)]).run(program)
    PassManager([AddScaleInput(), SquareToPow()], verify="end").run(program)
    with pytest.raises(NumericError):
        PassManager([AddScaleInput(), SquareToPow(wrong=(1,))], verify="end").run(program)


def test_needs_something_to_compare_on(program: Program) -> None:
    program.example_inputs = None
    with pytest.raises(IrcError, match="has no example inputs to compare numbers on"):
        PassManager([SquareToPow()]).run(program)
    PassManager([SquareToPow()], verify="off").run(program)
    given = [torch.ones(3, 5, 8)]
    assert PassManager([SquareToPow()]).run(program, given).report.rows[1].relative_error is not None


def test_unknown_verify_is_refused() -> None:
    with pytest.raises(OptionError, match="verify must be each, end or off, not 'always'"):
        PassManager([], verify="always")


def test_an_error_of_a_pass_that_is_an_irc_error_keeps_its_type(program: Program) -> None:
    class Picky(SquareToPow):
        def run(self, program: Program, ctx: PassContext) -> PassResult:
            raise OptionError("group size 7 does not divide 8")

    with pytest.raises(OptionError) as caught:
        PassManager([Picky()]).run(program)
    assert str(caught.value) == "pass 'square-to-pow': group size 7 does not divide 8"


def test_context_reaches_the_pass(program: Program) -> None:
    seen: list[object] = []

    class Curious(PowToSquare):
        def run(self, program: Program, ctx: PassContext) -> PassResult:
            seen.append(ctx.options["calibration"])
            return PassResult(program)

    PassManager([Curious()], ctx=PassContext(options={"calibration": 3})).run(program)
    assert seen == [3]


def test_an_anonymous_rule_can_be_a_pass(program: Program) -> None:
    class Rule:
        def as_pass(self) -> Pass:
            return SquareToPow()

    assert PassManager([Rule()]).run(program).report.rows[1].matches == 3


def test_reproducer_is_left_behind(program: Program, tmp_path: Path) -> None:
    with pytest.raises(PassError) as caught:
        PassManager([PowToSquare(), Fails()], repro_dir=tmp_path).run(program)
    assert [p.name for p in tmp_path.iterdir()] == ["toy-fails"]
    assert str(caught.value) == f"pass 'fails' failed with KeyError: 'surprise'\n  reproducer: {tmp_path / 'toy-fails'}"
