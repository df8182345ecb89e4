"""Capture of plain modules: signatures, dynamic sizes, tied weights, in-place code, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from irc.core import provenance
from irc.core.errors import CaptureError, IrcError, OptionError
from irc.frontend import capture
from tests import zoo_modules
from tests.zoo import built, captured, token_ids


class Structured(nn.Module):
    """Optional, nested and keyword inputs; nested outputs with None and a number."""

    def forward(self, a: Tensor, b: Any = None, c: Tensor | None = None, *, k: int = 2) -> dict[str, Any]:
        result = a * k
        if b is not None:
            result = result + b["x"][0]
        if c is not None:
            result = result - c
        return {"r": result, "none": None, "pair": (a.sum(), 3)}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.ones(4, 3),),
        (torch.ones(4, 3), {"x": [torch.ones(4, 3)]}),
        (torch.ones(4, 3), None, torch.ones(4, 3)),
        {"a": torch.ones(4, 3), "c": torch.ones(4, 3)},
        {"k": 5, "c": torch.ones(4, 3), "a": torch.ones(4, 3)},
    ],
    ids=["one", "nested", "none", "keywords", "number"],
)
def test_call_has_the_models_signature(inputs: Any) -> None:
    model = Structured()
    program = capture(model, inputs, canonicalize=False)
    call = (lambda f: f(**inputs)) if isinstance(inputs, dict) else (lambda f: f(*inputs))
    torch.testing.assert_close(call(program), call(model))


def test_a_captured_number_is_checked() -> None:
    x = torch.ones(4, 3)
    program = capture(Structured(), {"a": x, "k": 5}, canonicalize=False)
    with pytest.raises(IrcError, match="captured as the constant 5; it is 6 now"):
        program(a=x, k=6)


def test_example_inputs_are_copied_and_left_alone() -> None:
    base = torch.arange(12.0).view(3, 4)
    view = base[:, :2]
    program = capture(nn.ReLU(), view, canonicalize=False)
    assert program.example_inputs is not None
    assert program.example_inputs[0] is not view
    assert program.example_inputs[0].untyped_storage().data_ptr() != base.untyped_storage().data_ptr()
    assert torch.equal(base, torch.arange(12.0).view(3, 4))


def test_automatic_names() -> None:
    program = captured("tinypy", canonicalize=False)
    assert [str(e) for e in program.shape_expr(program.placeholders[0])] == ["B", "S"]
    assert [str(e) for e in program.shape_expr(program.outputs[0])] == ["B", "S", "96"]


@pytest.mark.parametrize(
    "dynamic",
    [{"input": {0: "N"}}, ({0: "N"},), (("N", None),), {"input": {0: Dim("N")}}],
    ids=["dict", "tuple", "list", "torch-dim"],
)
def test_dynamic_forms(dynamic: Any) -> None:
    program = capture(nn.Linear(4, 2), torch.randn(3, 4), dynamic=dynamic, canonicalize=False)
    assert list(program.dims) == ["N"]
    assert program(torch.randn(7, 4)).shape == (7, 2)


def test_no_dynamic_sizes_on_request() -> None:
    program = capture(nn.Linear(4, 2), torch.randn(3, 4), dynamic={}, canonicalize=False)
    assert program.dims == {}


def test_examples_of_size_one_do_not_fix_the_size() -> None:
    model = built("tinypy")
    program = capture(model, token_ids(1, 1), canonicalize=False)
    assert set(program.dims) == {"B", "S"}
    assert program.metadata["capture"]["enlarged"] == ["B", "S"]
    for size in ((1, 1), (2, 5)):
        ids = token_ids(*size)
        assert torch.equal(program(ids), model(ids))


def test_tied_weights_are_one() -> None:
    program = capture(Tied(), torch.tensor([[1, 2]]), canonicalize=False)
    assert list(program.weights) == ["embed.weight"]
    assert program.tied == {"head.weight": "embed.weight"}
    assert len(program.graph.find_nodes(op="get_attr")) == 1


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model[2].eval()
    program = capture(model, torch.randn(3, 4), canonicalize=False)
    assert [m.training for m in model] == [True, True, False]
    x = torch.randn(5, 4)
    assert torch.equal(program(x), model.eval()(x))


def test_transformers_switches_are_restored() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    program = capture(model, canonicalize=False)
    assert model.config._attn_implementation == "eager"
    assert program.metadata["capture"]["attention"] == "sdpa"
    assert program.input_names == ["input_ids"]
    assert set(program.dims) == {"B", "S"}
    assert any("scaled_dot_product_attention" in str(n.target) for n in program.operations())


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        y.mul_(2)
        z = torch.matmul(y, y.transpose(0, 1))
        z.relu_()
        return y, z


class WritesThroughView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0] = 3.0
        return y * 2


class KeepsType(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        y.add_(x.double())
        return y


@pytest.mark.parametrize("model", [InPlace(), WritesThroughView(), KeepsType()], ids=lambda m: type(m).__name__)
def test_in_place_operations_become_functional(model: nn.Module) -> None:
    program = capture(model, torch.randn(4, 4), canonicalize=False, dynamic={})
    assert not any(node.target._schema.is_mutable for node in program.operations())
    x = torch.randn(4, 4)
    torch.testing.assert_close(program(x), model(x), rtol=0, atol=0)


def test_composite_operations_stay_whole_beside_in_place_ones() -> None:
    targets = [str(n.target) for n in capture(InPlace(), torch.randn(4, 4), canonicalize=False).operations()]
    assert "aten.matmul.default" in targets
    assert "aten.batch_norm.default" in [str(n.target) for n in captured("cnn", canonicalize=False).operations()]


def test_provenance_of_a_layer() -> None:
    program = captured("nanogpt", canonicalize=False)
    node = next(n for n in program.operations() if "scaled_dot_product" in str(n.target))
    assert provenance.module_path(node) == "blocks.0.attn"
    source = Path(zoo_modules.__file__).read_text().splitlines()
    line = next(
        i for i, text in enumerate(source, start=1) if "F.scaled_dot_product_attention(q, k, v, dropout" in text
    )
    assert provenance.location(node) == f"tests/zoo_modules.py:{line}"


# ------------------------------------------------------------------ refusals


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 3), Inner())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Itemising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(int(x.sum().item())) + 1


class WritesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1) * 2


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x * self.count


class FixedLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[1]):
            x = x * 2
        return x


def test_a_branch_on_data_names_module_line_and_remedy() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Branching(), torch.randn(2, 3))
    text = str(caught.value)
    assert "cannot capture Branching: a branch or a loop depends on values of a tensor" in text
    assert "module: block.1" in text
    assert "at: tests/capture/test_capture.py:" in text
    assert "try: torch.where" in text
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (WritesInput(), (torch.ones(3),), r"writes into its input 'x'"),
        (Counting(), (torch.ones(3),), r"writes its buffer 'count'"),
        (nn.Linear(3, 3), None, r"needs example inputs \(input\)"),
        (nn.Linear(3, 3), (torch.ones(2, 3), 1), r"do not fit Linear.forward"),
        (nn.Linear(3, 3), (torch.ones(0, 3),), r"example input 0 is empty"),
        (nn.Linear(3, 3), (torch.ones(2, 4),), r"cannot capture Linear"),
        ("not a model", None, r"no file 'not a model'"),
        (torch.relu, None, r"wrap the function in an nn.Module"),
    ],
)
def test_refusals(model: Any, inputs: Any, message: str) -> None:
    with pytest.raises(IrcError, match=message):
        capture(model, inputs)


def test_a_size_that_cannot_be_dynamic_is_an_error_only_if_asked_for() -> None:
    x = torch.ones(3, 5)
    with pytest.raises(CaptureError, match=r"dimension 1 of input x \(S\) is fixed at 5"):
        capture(FixedLength(), (x,), dynamic={"x": {0: "B", 1: "S"}})
    program = capture(FixedLength(), (x.long(),), canonicalize=False)
    assert list(program.dims) == ["B"]
    assert program.metadata["capture"]["static"] == ["dimension 1 of input x (S) is fixed at 5: tracing specialised it"]


def test_wrong_names() -> None:
    with pytest.raises(CaptureError, match="`dynamic` names y; the inputs are input"):
        capture(nn.Linear(3, 3), torch.ones(2, 3), dynamic={"y": {0: "B"}})
    with pytest.raises(CaptureError, match="dimension 5 of input"):
        capture(nn.Linear(3, 3), torch.ones(2, 3), dynamic={"input": {5: "B"}})
    with pytest.raises(OptionError, match=r"unknown frontend 'torhc' .did you mean 'torch'"):
        capture(nn.Linear(3, 3), torch.ones(2, 3), frontend="torhc")
    with pytest.raises(CaptureError, match="use frontend='torch'"):
        capture(nn.Linear(3, 3), torch.ones(2, 3), frontend="transformers")
