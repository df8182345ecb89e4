"""Bisection: the first bad pass and the first bad rewrite inside it."""

from __future__ import annotations

import dataclasses

import pytest

from irc.core.bisect import bisect
from irc.core.contract import PassContext, PassResult
from irc.core.errors import NumericError, OptionError, PassError
from irc.core.program import Program
from tests.manager.toys import AddScaleInput, Fails, Liar, PowToSquare, RoundWeights, SquareToPow, toy_program


def test_nothing_is_bad(program: Program) -> None:
    result = bisect(program, [SquareToPow(), PowToSquare()])
    assert (result.index, result.bad_pass, result.application) == (None, None, None)
    assert str(result) == "no pass is bad (2 passes run)"


@pytest.mark.parametrize("first", [0, 2, 4])
def test_every_place_is_found(first: int) -> None:
    wrong = tuple(i for i in (first, 4) if i >= first)
    result = bisect(toy_program(5), [PowToSquare(), SquareToPow(wrong=wrong)])
    assert (result.index, result.application, result.num_applications) == (1, first + 1, 5)
    assert result.bad_pass == SquareToPow(wrong=wrong)
    assert result.node == f"square_{first}"
    assert isinstance(result.error, NumericError)
    assert result.runs <= 2 + 2 + 3  # two passes, two ends, log2(5)


def test_message(program: Program) -> None:
    result = bisect(program, [PowToSquare(), SquareToPow(wrong=(1,))])
    lines = str(result).splitlines()
    assert lines[:4] == [
        "first bad: pass 'square-to-pow' (number 2 of the pipeline)",
        "  its rewrite 2 of 3 is the first bad one: %square_1 = aten.mul.Tensor at layers.1 (model.py:12)",
        f"  {result.runs} runs of a pass",
        "pass 'square-to-pow' changed the numbers: output 0 differs by 9.0e+00 relative, 1.0e-05 is allowed",
    ]


def test_the_first_of_two_bad_passes_is_named(program: Program) -> None:
    result = bisect(program, [PowToSquare(), SquareToPow(wrong=(2,)), PowToSquare(), SquareToPow(wrong=(0,))])
    assert (result.index, result.node) == (1, "square_2")


def test_a_pass_that_does_not_ask_cannot_be_narrowed(program: Program) -> None:
    result = bisect(program, [SquareToPow(), Fails()])
    assert (result.index, result.application) == (1, None)
    assert isinstance(result.error, PassError)
    assert "its rewrites cannot be told apart" in str(result)
    assert bisect(program, [Liar(says=False, does="operation")]).application is None


def test_too_few_matches_are_no_bad_rewrite(program: Program) -> None:
    result = bisect(program, [SquareToPow(expect_matches=9)])
    assert (result.index, result.application, result.num_applications) == (0, None, 3)
    assert isinstance(result.error, PassError)
    assert "with fewer matches expected, nothing is wrong" in str(result)


def test_which_of_several_lossy_passes_costs_the_accuracy(program: Program) -> None:
    fine, coarse = RoundWeights(steps=4096), RoundWeights(steps=16)
    result = bisect(program, [fine, SquareToPow(), coarse], rtol=0.01)
    assert (result.index, result.bad_pass) == (2, coarse)
    assert result.application is not None
    assert "compared with the first program" in str(result.error)
    assert bisect(program, [fine, SquareToPow()], rtol=0.01).index is None
    with pytest.raises(OptionError, match="pass 'add-scale-input' changes the inputs"):
        bisect(program, [AddScaleInput()], rtol=0.01)


def test_goes_on_behind_a_changed_signature(program: Program) -> None:
    result = bisect(program, [AddScaleInput(), SquareToPow(wrong=(2,))], program.example_inputs)
    assert (result.index, result.node) == (1, "square_2")


def test_progress_is_told(program: Program) -> None:
    told: list[str] = []
    bisect(program, [PowToSquare(), SquareToPow(wrong=(1,))], progress=told.append)
    assert told[:2] == ["1/2 pow-to-square", "2/2 square-to-pow"]
    assert told[2:] == ["square-to-pow: 1 of 3 rewrites", "square-to-pow: 2 of 3 rewrites"]


def test_allow_counts_and_limits(program: Program) -> None:
    nodes = [program.node(f"square_{i}") for i in range(3)]
    free = PassContext()
    assert [free.allow(node) for node in nodes] == [True] * 3
    assert free.applications.nodes == ["square_0", "square_1", "square_2"]
    limited = dataclasses.replace(free, applications=type(free.applications)(limit=1))
    assert [limited.allow(node) for node in nodes] == [True, False, False]
    assert limited.applications.nodes == ["square_0"]


def test_each_run_counts_anew(program: Program) -> None:
    seen: list[int] = []

    class Counts(SquareToPow):
        def run(self, program: Program, ctx: PassContext) -> PassResult:
            seen.append(len(ctx.applications.nodes))
            return SquareToPow.run(self, program, ctx)

    bisect(program, [Counts(), PowToSquare(), Counts()])
    assert seen == [0, 0]
