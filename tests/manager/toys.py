"""A small program with known source lines, and small passes: right ones, and wrong ones of every kind."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import nn

from irc.core.contract import Finding, Pass, PassContext, PassResult, Preserves, Skip
from irc.core.dims import new_dim, new_fake_mode
from irc.core.program import VAL, Program
from irc.core.provenance import SOURCES_KEY, Source

aten = torch.ops.aten
WIDTH = 8
VOCABULARY = 40


def toy_program(num_layers: int = 3, *, dtype: torch.dtype = torch.float32, logits: bool = True) -> Program:
    """x → (linear → relu → square, plus x) per layer → head; x is [B, S, 8], logits are [B, S, 40]."""
    generator = torch.Generator().manual_seed(7)
    fake_mode = new_fake_mode()
    dims = {"B": new_dim(fake_mode, "B", 3), "S": new_dim(fake_mode, "S", 5)}
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    with fake_mode:
        x.meta[VAL] = torch.empty((dims["B"].size, dims["S"].size, WIDTH), dtype=dtype)

    def weight(name: str, *shape: int) -> fx.Node:
        tensor = nn.Parameter((torch.randn(*shape, generator=generator) * 0.3).to(dtype), requires_grad=False)
        root.register_parameter(name, tensor)
        return graph.get_attr(name)

    def call(name: str, target: Any, *args: Any, module: str, line: int) -> fx.Node:
        node = graph.create_node("call_function", target, args, name=name)
        node.meta[SOURCES_KEY] = frozenset({Source(name, module, f"model.py:{line}")})
        return node

    hidden = x
    for i in range(num_layers):
        module = f"layers.{i}"
        linear = call(
            f"linear_{i}", aten.linear.default, hidden, weight(f"w{i}", WIDTH, WIDTH), weight(f"b{i}", WIDTH),
            module=f"{module}.fc", line=10,
        )  # fmt: skip
        relu = call(f"relu_{i}", aten.relu.default, linear, module=module, line=11)
        square = call(f"square_{i}", aten.mul.Tensor, relu, relu, module=module, line=12)
        hidden = call(f"add_{i}", aten.add.Tensor, square, hidden, module=module, line=13)
    if logits:
        head = weight("head", VOCABULARY, WIDTH)
        hidden = call("logits", aten.linear.default, hidden, head, module="head", line=20)
    graph.output((hidden,))
    example = torch.randn(3, 5, WIDTH, generator=generator).to(dtype)
    _, in_spec = pytree.tree_flatten(((example,), {}))
    _, out_spec = pytree.tree_flatten(example)
    program = Program(fx.GraphModule(root, graph), "toy", dims, fake_mode, in_spec, out_spec, example_inputs=(example,))
    program.infer_types()
    return program


def squares(program: Program) -> list[fx.Node]:
    """The x * x nodes."""
    return [n for n in program.graph.nodes if n.target is aten.mul.Tensor and n.args[0] is n.args[1]]


@dataclass(frozen=True, kw_only=True)
class SquareToPow(Pass):
    """x * x → x ** 2; at the places in `wrong`, x ** 3."""

    name: ClassVar[str] = "square-to-pow"
    wrong: tuple[int, ...] = ()
    at_most: int | None = None

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, skips = 0, []
        for index, node in enumerate(squares(program)):
            if self.at_most is not None and index >= self.at_most:
                skips.append(Skip.at(node, f"only {self.at_most} were asked for", progress=index))
                continue
            if not ctx.allow(node):
                continue
            exponent = 3 if index in self.wrong else 2
            program.replace(node, program.insert(aten.pow.Tensor_Scalar, node.args[0], exponent, before=node))
            matches += 1
        return PassResult(program, matches=matches, skips=skips, statistics={"squares": matches})


@dataclass(frozen=True, kw_only=True)
class PowToSquare(Pass):
    """x ** 2 → x * x."""

    name: ClassVar[str] = "pow-to-square"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches = 0
        for node in program.graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar):
            if node.args[1] == 2 and ctx.allow(node):
                program.replace(node, program.insert(aten.mul.Tensor, node.args[0], node.args[0], before=node))
                matches += 1
        return PassResult(program, matches=matches)


@dataclass(frozen=True, kw_only=True)
class WriteInPlace(Pass):
    """Writes into a weight, the forbidden thing."""

    name: ClassVar[str] = "write-in-place"
    how: Literal["method", "data", "input"] = "method"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        if self.how == "method":
            program.weight("w1").mul_(2)
        elif self.how == "data":
            program.weight("w1").data[0, 0] += 1
        else:
            assert program.example_inputs is not None
            program.example_inputs[0].zero_()
        return PassResult(program, matches=1)


@dataclass(frozen=True, kw_only=True)
class Liar(Pass):
    """Says that it did (not) change anything; changes something, or not."""

    name: ClassVar[str] = "liar"
    says: bool | None = None
    does: Literal["nothing", "weight", "operation"] = "nothing"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        if self.does == "operation":
            node = squares(program)[0]
            program.replace(node, program.insert(aten.pow.Tensor_Scalar, node.args[0], 2, before=node))
        elif self.does == "weight":
            node = program.graph.find_nodes(op="get_attr")[0]
            program.replace(node, program.weight_node("new", program.weight(node) * (1 + 1e-7), before=node))
        return PassResult(program, modified=self.says)


@dataclass(frozen=True, kw_only=True)
class NeedsPeace(Pass):
    """Requires what is not there."""

    name: ClassVar[str] = "needs-peace"

    def requires(self, program: Program) -> list[str]:
        return ["there is no convolution", "input x is not integral"]

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        raise AssertionError("must not run")


@dataclass(frozen=True, kw_only=True)
class Fails(Pass):
    """Ends badly."""

    name: ClassVar[str] = "fails"
    how: Literal["raise", "return", "finding", "types", "crash"] = "raise"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        node = squares(program)[0]
        if self.how == "raise":
            raise KeyError("surprise")
        if self.how == "return":
            return program
        if self.how == "types":
            with program.graph.inserting_before(node):
                new = program.graph.call_function(aten.mm.default, (node.args[0], node.args[0]))
            program.replace(node, new)
        if self.how == "crash":  # fits every type, but there is no row 1000
            index = program.weight_node("rows", torch.tensor([1000]), before=node)
            row = program.insert(aten.index_select.default, node.args[0], 2, index, before=node)
            program.replace(node, program.insert(aten.mul.Tensor, node.args[0], row, before=node))
        return PassResult(program, matches=1)

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        return [Finding("square_1", "is still a square")] if self.how == "finding" else []


@dataclass(frozen=True, kw_only=True)
class RoundWeights(Pass):
    """Rounds matrices to a grid of steps of 1/`steps`: lossy."""

    name: ClassVar[str] = "round-weights"
    preserves: ClassVar[Preserves] = Preserves(kind="lossy", rtol=0.3, max_kl=0.05)
    steps: int = 64

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches = 0
        for node in program.graph.find_nodes(op="get_attr"):
            weight = program.weight(node)
            if weight.dim() == 2 and ctx.allow(node):
                rounded = (weight * self.steps).round() / self.steps
                program.replace(node, program.weight_node(f"{node.target}_rounded", rounded, before=node))
                matches += 1
        return PassResult(program, matches=matches)


@dataclass(frozen=True, kw_only=True)
class TakeOver(Pass):
    """relu(linear(x)) → clamp_min(linear(x), limit), where the clamp keeps the name of the *linear*.

    Editing a node so that it takes over the value of a later one is what folding a batch norm does.
    """

    name: ClassVar[str] = "take-over"
    limit: float = 0.0

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        relus = program.graph.find_nodes(op="call_function", target=aten.relu.default)
        for relu in relus:
            linear = relu.args[0]
            assert isinstance(linear, fx.Node)
            product = program.insert(aten.linear.default, *linear.args, before=linear)
            linear.target, linear.args = aten.clamp_min.default, (product, self.limit)
            program.infer_type(linear)
            program.replace(relu, linear)
        return PassResult(program, matches=len(relus))


@dataclass(frozen=True, kw_only=True)
class AddScaleInput(Pass):
    """Gives the program a second input that the first activation is multiplied by."""

    name: ClassVar[str] = "add-scale-input"
    scale: float = 1.0
    with_replay: bool = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        x = program.placeholders[0]
        with program.graph.inserting_after(x):
            factor = program.graph.placeholder("factor")
        factor.meta[VAL] = program.fake(torch.ones(1))
        first = factor.next
        scaled = program.insert(aten.mul.Tensor, x, factor, before=first)
        x.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        assert program.example_inputs is not None
        program.example_inputs = (program.example_inputs[0], torch.full((1,), self.scale))
        _, program.in_spec = pytree.tree_flatten((tuple(program.example_inputs), {}))

        def replay(new: Program, old: Sequence[Any]) -> list[Any]:
            return new.run(*old, torch.full((1,), self.scale))

        return PassResult(program, matches=1, replay=replay if self.with_replay else None)


class Colour(enum.Enum):
    """For options."""

    RED = "red"
    DARK_BLUE = "dark-blue"
    THIRD = 3


@dataclass(frozen=True, kw_only=True)
class ManyOptions(Pass):
    """One option of every type."""

    name: ClassVar[str] = "many-options"
    num_bits: int = 4
    ratio: float = 0.5
    fast: bool = False
    label: str = "plain"
    maybe: int | None = None
    maybe_label: str | None = None
    number: int | float | str = 1
    colour: Colour = Colour.RED
    mode: Literal["a", "b", 3, None] = "a"
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "x")
    names: Sequence[str] = ()
    grid: tuple[tuple[float, ...], ...] = ()

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return PassResult(program)


@dataclass(frozen=True, kw_only=True)
class NeedsOption(Pass):
    """Has an option without a default, and one that its constructor checks."""

    name: ClassVar[str] = "needs-option"
    width: int
    even: int = 2

    def __post_init__(self) -> None:
        if self.even % 2:
            raise ValueError(f"even must be even, not {self.even}")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return PassResult(program)


ALL = [SquareToPow, PowToSquare, WriteInPlace, Liar, NeedsPeace, Fails, RoundWeights, ManyOptions, NeedsOption]
