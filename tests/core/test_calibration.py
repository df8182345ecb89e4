"""Calibration data from every source, and runs in which all batches pass a layer before any reaches the next."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
import torch.fx as fx
from safetensors.torch import save_file
from torch import Tensor, nn

import irc
from irc.core.calibration import CALIBRATION_KEY, CalibrationData, calibration_of
from irc.core.contract import PassContext
from irc.core.errors import OptionError, PassError
from irc.core.lockstep import Lockstep
from irc.core.program import Program

aten = torch.ops.aten


class Letters:
    """A tokenizer in which each character is its code."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


class Rows:
    """A data set as `datasets` shows it."""

    column_names = ("text", "pixels")

    def __iter__(self):
        for i in range(6):
            yield {"text": "abcdefgh", "pixels": [float(i), 1.0]}


def shapes(data: CalibrationData) -> list[tuple[int, ...]]:
    return [tuple(batch[0].shape) for batch in data.batches]


def test_tensors_are_cut_into_batches() -> None:
    data = CalibrationData.of(torch.arange(20).view(10, 2), batch_size=4)
    assert shapes(data) == [(4, 2), (4, 2), (2, 2)]
    assert data.num_samples == 10
    assert not data.batches[0][0]._is_view()


def test_text_becomes_windows_without_repetition() -> None:
    text = "".join(chr(97 + i % 26) for i in range(100))
    data = CalibrationData.of(text, tokenizer=Letters(), length=10, count=8, batch_size=3)
    assert shapes(data) == [(3, 10), (3, 10), (2, 10)]
    rows = torch.cat([batch[0] for batch in data.batches]).tolist()
    windows = [[ord(c) for c in text[i : i + 10]] for i in range(0, 100, 10)]
    assert all(row in windows for row in rows)
    again = CalibrationData.of(text, tokenizer=Letters(), length=10, count=8, batch_size=3)
    other = CalibrationData.of(text, tokenizer=Letters(), length=10, count=8, batch_size=3, seed=1)
    assert data.fingerprint() == again.fingerprint() != other.fingerprint()


def test_data_sets_and_loaders() -> None:
    text = CalibrationData.of(Rows(), column="text", tokenizer=Letters(), length=4, batch_size=2, count=5)
    assert shapes(text) == [(2, 4), (2, 4), (1, 4)]
    assert shapes(CalibrationData.of(Rows(), column="pixels")) == [(6, 2)]
    loader = [(torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(1, 3), torch.zeros(1))]
    assert shapes(CalibrationData.of((x for x, _ in loader))) == [(2, 3), (1, 3)]
    assert (
        len(CalibrationData.from_iterable(iter([{"a": torch.zeros(1), "b": torch.zeros(1)}] * 9), limit=2).batches) == 2
    )


def test_folders(tmp_path: Path) -> None:
    numpy.save(tmp_path / "a.npy", numpy.zeros((3, 4), dtype=numpy.float32))
    save_file({"x": torch.ones(2, 4)}, tmp_path / "b.safetensors")
    data = CalibrationData.of(tmp_path, transform=lambda x: x + 1)
    assert data.batches[0][0].sum(1).tolist() == [4, 4, 4, 8, 8]
    (tmp_path / "c.txt").write_text("x" * 50)
    assert CalibrationData.of(tmp_path, tokenizer=Letters(), length=10).num_samples == 5


def test_a_pickled_array_is_refused(tmp_path: Path) -> None:
    numpy.save(tmp_path / "a.npy", numpy.array([object()]), allow_pickle=True)
    with pytest.raises(irc.IrcError, match=r"a\.npy cannot be read"):
        CalibrationData.of(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: CalibrationData(()), "is empty"),
        (lambda path: CalibrationData.of(torch.zeros(0, 3)), "is empty"),
        (lambda path: CalibrationData.from_tensors(torch.zeros(2), torch.zeros(3)), r"numbers of samples: \[2, 3\]"),
        (lambda path: CalibrationData.of("abc", tokenizer=Letters(), length=10), "has 3 tokens, fewer than one window"),
        (lambda path: CalibrationData.of(Rows(), column="txt"), r"\(text, pixels\), not 'txt'"),
        (lambda path: CalibrationData.of(path / "nothing"), "does not exist"),
        (lambda path: CalibrationData.of(path), "holds no .npy or .safetensors"),
        (lambda path: CalibrationData.of(7), "cannot be made from a int"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said(make, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        make(tmp_path)


# -------------------------------------------------------------------- with a program


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.head(self.second(h) + x)


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return irc.capture(Net().eval(), (torch.randn(3, 4),))


def linears(program: Program) -> list[fx.Node]:
    return [node for node in program.operations() if node.target is aten.linear.default]


def test_batches_are_held_against_the_program(program: Program) -> None:
    good = CalibrationData.of(torch.randn(6, 4))
    assert len(good.inputs_for(program)) == 1
    for batches, message in (
        (((torch.zeros(2, 4), torch.zeros(1)),), r"has 2 inputs, program Net takes 1 \(x\)"),
        (((torch.zeros(2, 4, dtype=torch.int64),),), r"x is torch.int64 with 2 dimensions, program Net takes f32"),
        (((torch.full((2, 4), torch.nan),),), "holds numbers that are not finite"),
    ):  # fmt: skip
        with pytest.raises(PassError, match=message):
            CalibrationData(batches).inputs_for(program)


def test_a_pass_without_data_says_how_to_give_it() -> None:
    with pytest.raises(PassError, match=r"pass 'x' needs calibration data: irc.compile\(…, calibration="):
        calibration_of(PassContext(), "x")
    data = torch.zeros(2, 3)
    assert calibration_of(PassContext(options={CALIBRATION_KEY: data}), "x").num_samples == 2


def test_every_batch_reaches_a_layer_before_it_runs(program: Program) -> None:
    batches = [(torch.randn(3, 4),), (torch.randn(2, 4),)]
    seen: dict[str, list[Tensor]] = {}

    def visit(node: fx.Node, values) -> None:
        seen[node.name] = list(values(node.args[0]))

    Lockstep(program, batches).run(visit, linears(program))
    first, second, head = (node.name for node in linears(program))
    net = [program.weight(n) for n in ("first.weight", "first.bias", "second.weight", "second.bias")]
    for i, (x,) in enumerate(batches):
        h = torch.relu(x @ net[0].T + net[1])
        torch.testing.assert_close(seen[first][i], x)
        torch.testing.assert_close(seen[second][i], h)
        torch.testing.assert_close(seen[head][i], h @ net[2].T + net[3] + x)


def test_a_replaced_weight_shows_in_later_layers_only(program: Program) -> None:
    batches = [(torch.randn(3, 4),)]
    _, second, head = linears(program)
    seen: list[Tensor] = []
    run = Lockstep(program, batches)

    def visit(node: fx.Node, values) -> None:
        seen.append(values(node.args[0])[0])
        if node is second:
            run.replace(node.args[1], torch.zeros(4, 6))

    run.run(visit, [second, head])
    torch.testing.assert_close(seen[1], program.weight("second.bias") + batches[0][0])


def test_values_are_freed_and_what_is_not_needed_never_runs(program: Program) -> None:
    first, second, head = linears(program)
    run = Lockstep(program, [(torch.randn(3, 4),)])
    alive: list[int] = []

    def visit(node: fx.Node, values) -> None:
        alive.append(sum(n.op == "call_function" for n in run._values))

    run.run(visit, [first, second, head])
    assert alive == [0, 1, 1]
    assert not run._values


def test_weights_are_one_object_for_all_batches(program: Program) -> None:
    run = Lockstep(program, [(torch.randn(1, 4),)] * 5)
    found: list[object] = []
    run.run(lambda node, values: found.extend(values(node.args[1])), linears(program)[1:2])
    assert len(found) == 5
    assert len({id(value) for value in found}) == 1


def test_half_precision_layers_give_what_they_would_alone(program: Program) -> None:
    """They may be computed in f32 and rounded once: at most a step of bf16 from PyTorch's own result."""
    halves = irc.capture(Net().eval().bfloat16(), (torch.randn(3, 4).bfloat16(),), name="halves")
    x = torch.randn(3, 4).bfloat16()
    found: list[Tensor] = []
    Lockstep(halves, [(x,)]).run(lambda node, values: found.append(values(node.args[0])[0]), linears(halves)[1:2])
    expected = torch.relu(torch.nn.functional.linear(x, halves.weight("first.weight"), halves.weight("first.bias")))
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], expected, rtol=2**-7, atol=1e-3)
