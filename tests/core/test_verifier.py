"""Every rule of the IR, broken on purpose: the verifier says which, and at which node."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.utils._pytree as pytree

from irc.core import typed
from irc.core.errors import VerificationError
from irc.core.program import VAL, Program
from irc.core.provenance import SOURCES_KEY
from irc.core.text import parse
from irc.core.verifier import find_problems, verify
from tests.core.programs import small

aten = torch.ops.aten


def test_sound_programs_pass() -> None:
    verify(small(), provenance=True)
    assert find_problems(small().copy()) == []


# -------------------------------------------------------------------- one break a rule


def foreign_kind(program: Program) -> None:
    with program.graph.inserting_before(program.output_node):
        node = program.graph.create_node("call_method", "tanh", (program.node("add"),), name="bad")
    node.meta[VAL] = program.node("add").meta[VAL]


def same_name(program: Program) -> None:
    program.node("mul").name = "add"


def used_before_defined(program: Program) -> None:
    program.node("view").args = (program.node("add"), program.node("view").args[1])


def erased_input(program: Program) -> None:
    other = program.copy().node("mul")
    program.node("output").args = ((program.node("add"), other),)


def late_input(program: Program) -> None:
    node = program.placeholders[1]
    program.node("embedding").append(node)


def no_output(program: Program) -> None:
    program.graph.erase_node(program.output_node)


def refused_operator(program: Program) -> None:
    program.node("add").target = aten.add_.Tensor


def foreign_operator(program: Program) -> None:
    program.node("mul").target = torch.ops.quantized.add.default


def python_function(program: Program) -> None:
    program.node("mul").target = torch.nn.functional.silu


def operator_on_tensors(program: Program) -> None:
    program.node("mul").target = operator.mul


def too_many_arguments(program: Program) -> None:
    program.node("mul").args = (*program.node("mul").args, 1, 2)


def unknown_keyword(program: Program) -> None:
    program.node("add").kwargs = {"alpa": 2}


def argument_twice(program: Program) -> None:
    program.node("mul").kwargs = {"other": 1.0}


def missing_argument(program: Program) -> None:
    program.node("mul").args = program.node("mul").args[:1]


def wrong_argument(program: Program) -> None:
    program.node("view").args = (program.node("rms_norm"), "all")


def getitem_by_name(program: Program) -> None:
    program.node("getitem").args = (program.node("split"), "first")


def getitem_of_one(program: Program) -> None:
    program.node("getitem").args = (program.node("view"), 0)


def getitem_out_of_range(program: Program) -> None:
    program.node("getitem_1").args = (program.node("split"), 2)


def missing_weight(program: Program) -> None:
    weight_node(program, "table").target = "tabel"


def sparse_weight(program: Program) -> None:
    program.graph_module.register_buffer("table", torch.eye(8).to_sparse())


def strange_weight(program: Program) -> None:
    with warnings.catch_warnings(action="ignore"):  # PyTorch calls the type experimental
        program.graph_module.register_buffer("table", torch.zeros(8, dtype=torch.complex32))


def tie_to_itself(program: Program) -> None:
    program.tied["table"] = "embed.weight"


def bad_dimension_name(program: Program) -> None:
    program.dims["not a name"] = program.dims.pop("B")


def other_dimension_name(program: Program) -> None:
    program.dims["N"] = program.dims["B"]


def inputs_of_one_name(program: Program) -> None:
    program.placeholders[1].target = "ids"


def too_few_outputs(program: Program) -> None:
    program.output_node.args = ((program.node("add"),),)
    program.aliases.clear()


def too_few_input_places(program: Program) -> None:
    program.in_spec = pytree.tree_flatten(((0,), {}))[1]


def missing_example_input(program: Program) -> None:
    assert program.example_inputs is not None
    program.example_inputs = program.example_inputs[:1]


def alias_out_of_range(program: Program) -> None:
    program.aliases = {2: 1}


def alias_of_other_type(program: Program) -> None:
    program.aliases = {0: 1}


def no_type(program: Program) -> None:
    del program.node("cat").meta[VAL]


def no_type_of_an_input(program: Program) -> None:
    del program.placeholders[0].meta[VAL]


def inputs_do_not_fit(program: Program) -> None:
    program.node("rms_norm").args = (program.node("embedding"), weight_node(program, "embed.weight"), 1e-5)
    program.node("view").args = (program.node("rms_norm"), [3, 7])


def wrong_type(program: Program) -> None:
    program.node("mul").meta[VAL] = program.node("mul").meta[VAL].to(torch.float64)


def wrong_size(program: Program) -> None:
    program.node("add").meta[VAL] = program.node("add").meta[VAL].transpose(0, 1)


def wrong_rank(program: Program) -> None:
    program.node("cat").meta[VAL] = program.node("cat").meta[VAL].unsqueeze(0)


def wrong_weight_type(program: Program) -> None:
    program.graph_module.register_buffer("table", torch.zeros(8, dtype=torch.float64))


def no_source(program: Program) -> None:
    del program.node("cat").meta[SOURCES_KEY]


def weight_node(program: Program, name: str) -> torch.fx.Node:
    return next(n for n in program.graph.find_nodes(op="get_attr") if n.target == name)


# break → node the first finding must name, part of its text. `small` is the program itself.
BROKEN: dict[Callable[[Program], None], tuple[str, str]] = {
    foreign_kind: ("bad", "a program has no call_method nodes"),
    same_name: ("add", "two nodes have this name"),
    used_before_defined: ("view", "uses %add, which is defined after it"),
    erased_input: ("output", "uses %mul, which is not in the graph"),
    late_input: ("cache", "an input after an operation"),
    no_output: ("small", "a program has one output node, this has 0"),
    refused_operator: ("add", "writes into an argument"),
    foreign_operator: ("mul", "is of namespace 'quantized'"),
    python_function: ("mul", "which is no operator and no size arithmetic"),
    operator_on_tensors: ("mul", "on tensors; use the operator of aten"),
    too_many_arguments: ("mul", "takes 2 positional arguments, got 4"),
    unknown_keyword: ("add", "has no argument 'alpa' (did you mean 'alpha'?)"),
    argument_twice: ("mul", "argument 'other' is given twice"),
    missing_argument: ("mul", "argument 'other' is missing"),
    wrong_argument: ("view", "argument 'size' must be"),
    getitem_by_name: ("getitem", "must take one result, by number"),
    getitem_of_one: ("getitem", "takes a result of %view, which has only one"),
    getitem_out_of_range: ("getitem_1", "takes result 2 of the 2 of %split"),
    missing_weight: ("table", "has no weight 'tabel'"),
    sparse_weight: ("table", "weights are dense"),
    strange_weight: ("table", "has type torch.complex32"),
    tie_to_itself: ("small", "table is tied to embed.weight and a weight of its own"),
    bad_dimension_name: ("small", "a dimension cannot be called 'not a name'"),
    other_dimension_name: ("small", "a dimension cannot be called 'N' (its own name: 'B')"),
    inputs_of_one_name: ("small", "two inputs are called 'ids'"),
    too_few_outputs: ("small", "1 outputs for the 2 places of the output structure"),
    too_few_input_places: ("small", "2 inputs for the 1 places of the input structure"),
    missing_example_input: ("small", "1 example inputs for 2 inputs"),
    alias_out_of_range: ("small", "there is no such output or input"),
    alias_of_other_type: ("small", "both must have one type"),
    no_type: ("cat", "has no type"),
    no_type_of_an_input: ("ids", "has no type (`meta"),
    inputs_do_not_fit: ("view", "its inputs do not fit"),
    wrong_type: ("mul", "is typed f64[B, 2, 8, 4], but gives f32[B, 2, 8, 4]"),
    wrong_size: ("add", "is typed f32[S, B, 8], but gives f32[B, S, 8]"),
    wrong_rank: ("cat", "is typed f32[1, B*S, 8], but gives f32[B*S, 8]"),
    wrong_weight_type: ("table", "is typed f32[8], but gives f64[8]"),
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_broken_rule(damage: Callable[[Program], None]) -> None:
    name, problem = BROKEN[damage]
    program = small().copy()
    damage(program)
    findings = [f for f in find_problems(program) if f.node == name and problem in f.problem]
    assert len(findings) == 1, find_problems(program)
    with pytest.raises(VerificationError, match="program small has"):
        verify(program)


def test_one_break_is_one_finding() -> None:
    """What follows from a break is not reported again: these name their node and nothing else."""
    for damage in (wrong_type, wrong_size, unknown_keyword, getitem_out_of_range, missing_example_input):
        program = small().copy()
        program.aliases.clear()  # `wrong_type` is an output that continues an input
        damage(program)
        assert [f.node for f in find_problems(program)] == [BROKEN[damage][0]], damage.__name__


def test_all_findings_are_reported_in_graph_order() -> None:
    program = small().copy()
    wrong_rank(program)
    unknown_keyword(program)
    missing_example_input(program)
    with pytest.raises(VerificationError) as caught:
        verify(program)
    assert caught.value.node == "small"
    text = str(caught.value)
    assert text.startswith("program small has 3 broken rules\n")
    assert text.index("small: 1 example") < text.index("cat: is typed") < text.index("add: aten.add.Tensor")
    assert "%cat: f32[1, B*S, 8] = aten.cat(" in text
    assert "from model.py:7" in text


def test_source_is_demanded_on_request_only() -> None:
    program = small().copy()
    no_source(program)
    assert find_problems(program) == []
    assert [(f.node, f.problem) for f in find_problems(program, provenance=True)] == [
        ("cat", "does not know which captured operation it comes from")
    ]


def test_types_are_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type computed before from the same types is not computed again; an edit is."""
    program = small().copy()
    verify(program)
    asked: list[str] = []
    infer = Program._infer
    monkeypatch.setattr(
        Program, "_infer", lambda self, node, values: asked.append(node.name) or infer(self, node, values)
    )
    verify(program.copy())
    assert [name for name in asked if program.node(name).op == "call_function"] == []
    program.node("add").args = (program.node("add").args[0], program.node("reshape"))
    assert not typed.holds(program.node("add"))
    assert find_problems(program) == []
    assert [name for name in asked if program.node(name).op == "call_function"] == ["add"]


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [("mul", 1, {}), ("view", [2, 8], {}), ("add", None, {"alpha": 2.0}), ("full", None, {"dtype": torch.float16})],
)
def test_a_proof_ends_with_its_constants(name: str, args: object, kwargs: dict[str, object]) -> None:
    node = small().copy().node(name)
    assert typed.holds(node)
    if args is not None:
        node.args = (node.args[0], args)
    node.kwargs = {**node.kwargs, **kwargs}
    assert not typed.holds(node)


CHAIN = """irc 1

program @chain(%x: f32[N, 4]) -> f32[N, 4] {
  dim N = 3 in 1..
  inputs ((*,), {})
  outputs *

  %a: f32[N, 4] = aten.relu(%x)
  %b: f32[N, 4] = aten.neg(%a)
  return %b
}
"""


def test_infer_types_follows_an_edit() -> None:
    program = parse(CHAIN)
    kept = program.node("b").meta[VAL]
    program.infer_types()
    assert program.node("b").meta[VAL] is kept
    program.node("a").target = aten.gt.Scalar
    program.node("a").args = (program.node("x"), 0)
    with pytest.raises(VerificationError, match=r"b = aten.neg.default: its inputs do not fit"):
        program.infer_types()
    program.node("b").target = aten.logical_not.default
    program.infer_types()
    assert program.node("b").meta[VAL].dtype == torch.bool
    assert find_problems(program) == []


def test_layout_counts_as_a_type_for_inference() -> None:
    """Same sizes, other strides: what depends on them is computed again (views do not always exist)."""
    program = small().copy()
    norm = program.node("rms_norm")
    norm.meta[VAL] = norm.meta[VAL].new_empty_strided(norm.meta[VAL].shape, (8, norm.meta[VAL].shape[0] * 8, 1))
    assert not typed.holds(norm)
    assert not typed.holds(program.node("view"))
    program.infer_types()
    assert norm.meta[VAL].stride(0) != 8
    assert find_problems(program) == []


def test_dataclass_fields_are_all_checked_or_free() -> None:
    """A new field of Program needs a rule here, or an entry in this list of those that no rule concerns."""
    free = {"name", "fake_mode", "metadata"}
    checked = {"graph_module", "dims", "in_spec", "out_spec", "example_inputs", "aliases", "tied"}
    assert {field.name for field in dataclasses.fields(Program)} == free | checked
