"""The first diverging node: named when one node is wrong, whatever else the pass legitimately did."""

from __future__ import annotations

import pytest
import torch

from irc.core import provenance
from irc.core.errors import NumericError
from irc.core.localize import explain
from irc.core.manager import PassManager
from irc.core.program import Program
from tests.manager.toys import PowToSquare, SquareToPow, TakeOver, aten, squares, toy_program


def stage(program: Program) -> Program:
    after = program.copy()
    provenance.mark_stage_start(after.graph)
    return after


def culprit(before: Program, after: Program) -> str | None:
    assert before.example_inputs is not None
    return explain(before, after, before.example_inputs, 1e-5).node


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_wrong_place_is_found(program: Program, index: int) -> None:
    with pytest.raises(NumericError) as caught:
        PassManager([SquareToPow(wrong=(index,))]).run(program)
    assert caught.value.node == f"pow_{index + 1}"


def test_the_first_of_two_is_named(program: Program) -> None:
    with pytest.raises(NumericError) as caught:
        PassManager([SquareToPow(wrong=(2, 1))]).run(program)
    assert caught.value.node == "pow_2"


def test_a_node_that_took_over_a_later_value_is_not_blamed(program: Program) -> None:
    """`linear_0` computes what `relu_0` did: right; the wrong square behind it is named."""

    class TakeOverThenSpoil(TakeOver):
        def run(self, program, ctx):
            result = TakeOver.run(self, program, ctx)
            node = squares(program)[1]
            program.replace(node, program.insert(aten.pow.Tensor_Scalar, node.args[0], 3, before=node))
            return result

    PassManager([TakeOver()]).run(program)
    with pytest.raises(NumericError) as caught:
        PassManager([TakeOverThenSpoil()]).run(program)
    assert caught.value.node == "pow_1"


def test_a_node_that_took_over_wrongly_is_blamed(program: Program) -> None:
    with pytest.raises(NumericError) as caught:
        PassManager([TakeOver(limit=0.5)]).run(program)
    assert caught.value.node == "linear_0"


def test_a_wrong_weight_is_blamed_at_its_use(program: Program) -> None:
    after = stage(program)
    with provenance.track(after.graph_module):
        node = after.node("linear_1")
        transposed = after.weight_node("w1_t", after.weight("w1").t().contiguous(), before=node)
        node.args = (node.args[0], transposed, node.args[2])
    assert culprit(program, after) == "linear_1"


def test_a_replaced_weight_is_named_itself(program: Program) -> None:
    after = stage(program)
    with provenance.track(after.graph_module):
        node = next(n for n in after.graph.find_nodes(op="get_attr") if n.target == "w1")
        after.replace(node, after.weight_node("w1_scaled", after.weight("w1") * 1.5, before=node))
    assert culprit(program, after) == "w1_scaled"


def test_swapped_operands_are_found(program: Program) -> None:
    after = stage(program)
    with provenance.track(after.graph_module):
        node = after.node("add_1")
        node.replace_input_with(after.node("square_1"), after.node("square_0"))
    assert culprit(program, after) == "add_1"


def test_helpers_without_counterpart_are_searched_through(program: Program) -> None:
    """The wrong number enters in a helper; the first node that can be compared is named."""
    after = stage(program)
    with provenance.track(after.graph_module):
        node = squares(after)[1]
        helper = after.insert(aten.mul.Tensor, node.args[0], 1.1, before=node)
        shifted = after.insert(aten.neg.default, helper, before=node)
        after.replace(node, after.insert(aten.mul.Tensor, shifted, shifted, before=node))
    named = culprit(program, after)
    assert named is not None
    assert after.node(named).meta[provenance.ORIGIN_KEY] == "square_1"


def test_an_output_that_is_wired_wrongly(program: Program) -> None:
    before = toy_program(logits=False)
    after = stage(before)
    after.output_node.args = ((after.node("add_1"),),)
    assert before.example_inputs is not None
    found = explain(before, after, before.example_inputs, 1e-5)
    assert found.node is None
    assert found.text == (
        "  every node agrees with what it stands for: the outputs are wired wrongly\n"
        "    %relu_2: f32[B, S, 8] = aten.relu(%linear_2)\n"
        "    %square_2: f32[B, S, 8] = aten.mul.Tensor(%relu_2, %relu_2)\n"
        "    %add_2: f32[B, S, 8] = aten.add.Tensor(%square_2, %add_1)\n"
        "    return [%add_1]\n"
        "    ^^^^^^^^^^^^^^^"
    )


def test_a_nan_is_found_where_it_starts(program: Program) -> None:
    after = stage(program)
    with provenance.track(after.graph_module):
        node = squares(after)[0]
        root = after.insert(aten.sqrt.default, after.insert(aten.neg.default, node.args[0], before=node), before=node)
        after.replace(node, after.insert(aten.mul.Tensor, root, root, before=node))
    named = culprit(program, after)
    assert named is not None
    assert after.node(named).meta[provenance.ORIGIN_KEY] == "square_0"


def test_rounding_is_not_blamed(program: Program) -> None:
    """Small differences everywhere, one large: the large one is named."""
    after = stage(program)
    with provenance.track(after.graph_module):
        for name in ("relu_0", "relu_2"):
            node = after.node(name)
            noise = after.insert(aten.mul.Tensor, node, 1 + 1e-7, before=node.next)
            node.replace_all_uses_with(noise, delete_user_cb=lambda user, noise=noise: user is not noise)
        node = after.node("relu_1")
        wrong = after.insert(aten.mul.Tensor, node, 1.01, before=node.next)
        node.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)
    named = culprit(program, after)
    assert named is not None
    assert after.node(named).meta[provenance.ORIGIN_KEY] == "relu_1"


def test_other_passes_do_not_disturb(program: Program) -> None:
    with pytest.raises(NumericError) as caught:
        PassManager([TakeOver(), SquareToPow(), PowToSquare(), SquareToPow(wrong=(2,))]).run(program)
    assert caught.value.node is not None
    assert caught.value.node.startswith("pow_")


def test_values_in_messages_are_torch_free(program: Program) -> None:
    with pytest.raises(NumericError) as caught:
        PassManager([SquareToPow(wrong=(0,))]).run(program)
    assert "tensor(" not in str(caught.value)
    assert torch.is_grad_enabled()
