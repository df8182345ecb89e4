"""Quantization-aware training: insertion, an ordinary training loop, and a conversion that changes no number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import irc
from irc.core.contract import PassContext
from irc.core.errors import OptionError, PassError
from irc.core.ops import is_irc_op
from irc.core.pipeline import parse_pipeline, print_pipeline
from irc.core.program import Program
from irc.core.target import get_target
from irc.frontend import capture
from irc.passes import ConvertFakeQuantization, InsertFakeQuantization


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(12, 8), nn.Conv1d(8, 8, 2)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.embed(ids).transpose(1, 2))).transpose(1, 2)
        return self.head(torch.relu(self.hidden(x)))


def ids(batch: int = 4, length: int = 7, *, seed: int = 0) -> Tensor:
    return torch.randint(12, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Net().eval(), (ids(),), dynamic=({0: "B", 1: "S"},))


def insert(program: Program, **options: object):
    context = PassContext(options={"calibration": irc.CalibrationData.of(ids(32))})
    return irc.PassManager([InsertFakeQuantization(**options)], ctx=context).run(program)


def trained(program: Program, steps: int = 5, rate: float = 1e-2) -> Program:
    module = program.module()
    # Steps of a fixed size would drive small scales below zero.
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    scales = [p for name, p in named if name.endswith("_scale")]
    others = [p for name, p in named if not name.endswith("_scale")]
    optimizer = torch.optim.Adam([{"params": others, "lr": rate}, {"params": scales, "lr": rate / 100}])
    for i in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(module(ids(seed=i)).flatten(0, 1), ids(seed=i + 1)[:, 1:].flatten() % 5).backward()
        optimizer.step()
    return program.with_weights(module)


def test_rewrite(program: Program) -> None:
    result = insert(program, bits=4, activation_bits=8)
    row = result.report.rows[-1]
    assert row.statistics == {"weights": 3, "values": 3}
    assert row.matches == 6
    formats = [str(n.kwargs["format"]) for n in result.program.graph.nodes if is_irc_op(n.target, "fake_quantize")]
    assert sorted(formats) == ["int4.row"] * 3 + ["uint8.tensor.asym"] * 3
    assert "weight embed.weight is an embedding table" in row.skips[0].reason
    assert insert(program, activation_bits=None, include_embeddings=True).report.rows[-1].statistics == {
        "weights": 4, "values": 0,
    }  # fmt: skip
    outer = insert(program, activation_bits=None, keep_outer=True).report.rows[-1]
    assert [s.reason for s in outer.skips if "first or the last" in s.reason] == [
        "weight conv.weight: is the first or the last layer",
        "weight head.weight: is the first or the last layer",
    ]
    again = insert(result.program).report.rows[-1]
    assert (again.matches, again.modified) == (0, False)


@pytest.mark.parametrize("learned", [True, False])
def test_training_moves_what_it_should_and_nothing_else(program: Program, learned: bool) -> None:
    kept = {name: weight.detach().clone() for name, weight in program.weights.items()}
    start = insert(program, learned=learned).program
    before = {name: weight.detach().clone() for name, weight in start.weights.items()}
    after = trained(start).weights
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    scales = {name for name in before if name.endswith("_scale")}
    assert len(scales) == 6
    assert moved & scales == (scales if learned else set())
    assert {"conv.weight", "hidden.weight", "head.weight", "hidden.bias"} <= moved
    assert all(torch.equal(weight, kept[name]) for name, weight in program.weights.items()), "the stage before"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("learned", [True, False])
def test_conversion_is_bit_exact(program: Program, bits: int, learned: bool) -> None:
    start = insert(program, bits=bits, activation_bits=8, learned=learned, include_embeddings=True).program
    tuned = trained(start)
    result = irc.PassManager([ConvertFakeQuantization()]).run(tuned)
    assert result.report.rows[-1].statistics == {"weights": 4, "values": 3}
    for shape in ((1, 2), (3, 7), (5, 4)):
        assert torch.equal(result.program.run(ids(*shape))[0], tuned.run(ids(*shape))[0])
    assert not any(is_irc_op(n.target, "fake_quantize") for n in result.program.graph.nodes)
    assert irc.PassManager([ConvertFakeQuantization()]).run(result.program).report.rows[-1].matches == 0
    assert result.program.weight_bytes < tuned.weight_bytes / 2


def test_4_bit_activations_convert_exactly(program: Program) -> None:
    start = insert(program, bits=4, activation_bits=4, learned=True).program
    tuned = trained(start)
    final = irc.PassManager([ConvertFakeQuantization()]).run(tuned).program
    assert torch.equal(final.run(ids(6))[0], tuned.run(ids(6))[0])


def test_training_lowers_the_loss(program: Program) -> None:
    start = insert(program, bits=3, activation_bits=8).program

    def loss(one: Program) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(one.run(ids(seed=0))[0].flatten(0, 1), ids(seed=1)[:, 1:].flatten() % 5))

    module = start.module()
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    before = loss(start)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(module(ids(seed=0)).flatten(0, 1), ids(seed=1)[:, 1:].flatten() % 5).backward()
        optimizer.step()
    assert loss(start.with_weights(module)) < 0.7 * before


def test_refusals(program: Program) -> None:
    with pytest.raises(PassError, match="pass 'insert-fake-quantization' needs calibration data"):
        irc.PassManager([InsertFakeQuantization()]).run(program)
    row = insert(program, group_size=3, activation_bits=None).report.rows[-1]
    assert row.matches == 0
    assert "weight hidden.weight: group size 3 does not divide its rows of 8" in {s.reason for s in row.skips}
    bad = program.copy(replace_weights={"head.weight": torch.zeros(5, 16)})
    assert "weight head.weight: it is zero" in {s.reason for s in insert(bad).report.rows[-1].skips}
    start = insert(program).program
    name = next(name for name in start.weights if name == "head.weight_scale")
    broken = start.with_weights({name: -start.weights[name].detach()})
    with pytest.raises(PassError, match=r"scale head.weight_scale = .* is no step; train scales with a smaller"):
        irc.PassManager([ConvertFakeQuantization()]).run(broken)


def test_onnx_refuses_before_conversion_and_agrees_after(program: Program) -> None:
    start = insert(program).program
    coverage = get_target("onnx").check(start)
    assert "irc.fake_quantize × 6: is for training: run convert-fake-quantization" in str(coverage)
    final = irc.PassManager([ConvertFakeQuantization()]).run(start).program
    assert get_target("onnx").lower(final).verify(final).passed


def test_options() -> None:
    with pytest.raises(OptionError) as caught:
        InsertFakeQuantization(bits=1, activation_bits=9, group_size=0, observer="x")
    for part in ("bits must be 2 to 8, not 1", "activation_bits must be 2 to 8, not 9", "not 0", "not 'x'"):
        assert part in str(caught.value)
    one = InsertFakeQuantization(bits=3, activation_bits=None, learned=False, group_size=32)
    assert parse_pipeline(print_pipeline([one, ConvertFakeQuantization()])) == [one, ConvertFakeQuantization()]
