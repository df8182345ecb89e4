"""GPTQ and clipped rounding: better than plain rounding, layer by layer, resumable, and loud about bad data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import irc
from irc.core.calibration import CALIBRATION_KEY, CalibrationData
from irc.core.contract import Pass, PassContext
from irc.core.errors import OptionError, PassError
from irc.core.formats import QuantFormat
from irc.core.pipeline import parse_pipeline
from irc.core.program import Program
from irc.passes import QuantizeClipped, QuantizeGptq, QuantizeWeights
from irc.passes.quantize._gptq import GptqSolver, make_grid, search_scales

PASSES = (QuantizeGptq, QuantizeClipped)
FORMATS = [(4, 16, True), (3, None, True), (4, 8, False), (2, 16, False), (8, None, True)]
both = pytest.mark.parametrize("cls", PASSES)


class Mlp(nn.Module):
    """Inputs of very different scale, so that it matters which weight errs."""

    def __init__(self, width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)
        self.conv = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x)))
        return self.conv(y.transpose(1, 2)).transpose(1, 2)


def data(batch: int = 6, length: int = 20, width: int = 32, seed: int = 0) -> Tensor:
    """Samples of one distribution, whatever the seed: what is calibrated on must tell about what is measured on."""
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) * torch.logspace(-1, 1, width)
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed)) @ mix / width**0.5


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return irc.capture(Mlp().eval(), (data(2, 5),), dynamic=({0: "B", 1: "S"},))


def run(program: Program, one: Pass, calibration: Tensor | CalibrationData | None = None, **options: object):
    given = {CALIBRATION_KEY: data() if calibration is None else calibration, **options}
    return irc.PassManager([one], verify="each", ctx=PassContext(options=given)).run(program)


def output_error(program: Program, other: Program) -> float:
    x = data(4, 30, seed=7)
    return float((program.run(x)[0] - other.run(x)[0]).norm() / program.run(x)[0].norm())


@both
def test_rewrites_every_linear_layer(cls: type[Pass], program: Program) -> None:
    result = run(program, cls(bits=4, group_size=16))
    row = result.report.rows[-1]
    assert row.matches == 2
    assert [skip.node for skip in row.skips] == ["conv1d"]
    assert row.statistics["quantized_weights"] == 2 * 32 * 48
    text = str(result.program)
    assert text.count("irc.dequantize(") == 2
    assert text.count('format="int4.g16"') == 2
    assert "@up.weight_stored: u8[48, 16]" in text
    again = run(result.program, cls(bits=4, group_size=16))
    assert again.report.rows[-1].matches == 0


@both
@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
def test_errs_less_than_rounding(
    cls: type[Pass], bits: int, group: int | None, symmetric: bool, program: Program
) -> None:
    options = {"bits": bits, "group_size": group, "symmetric": symmetric}
    rounded = run(program, QuantizeWeights(**options)).program
    better = run(program, cls(**options)).program
    # At 8 bits both are so near that what calibration wins is of the size of what other data differ.
    assert output_error(program, better) < (1.05 if bits == 8 else 1) * output_error(program, rounded)
    for shape in ((1, 1), (3, 7)):
        assert better.run(data(*shape))[0].shape == program.run(data(*shape))[0].shape


def test_gptq_lowers_what_it_says_it_lowers() -> None:
    """tr((W - Ŵ)·H·(W - Ŵ)ᵀ), against nearest numbers on the very same grid, in both orders."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(24, 64), data(8, 40, 64).flatten(0, 1)
    hessian = inputs.T @ inputs / len(inputs)
    grid = make_grid(weight, QuantFormat(3, 16))
    scale, zero = grid.columns(64)

    def loss(integers: Tensor) -> float:
        error = weight - (integers - zero) * scale
        return float(((error @ hessian) * error).sum())

    nearest = (weight / scale).round().clamp(grid.low, grid.high)
    found = [GptqSolver(hessian, damping=0.01, act_order=order).integers(weight, grid) for order in (False, True)]
    for integers in found:
        assert torch.equal(integers, integers.round().clamp(grid.low, grid.high))
        assert loss(integers) < 0.9 * loss(nearest)


def test_the_first_column_is_rounded_and_the_second_makes_up_for_it() -> None:
    """Two inputs that always agree: only the sum of their weights matters."""
    weight, hessian = torch.tensor([[0.4, 0.4]]), torch.ones(2, 2)
    grid = dataclasses.replace(make_grid(torch.tensor([[7.0, 7.0]]), QuantFormat(4)), scale=torch.ones(1, 1))
    assert GptqSolver(hessian, damping=1e-4, act_order=False).integers(weight, grid).tolist() == [[0.0, 1.0]]


def test_the_whole_integer_range_is_used() -> None:
    """A group whose extreme weight is negative puts it on -8; with negative scales, every group may."""
    weight = torch.tensor([[-8.0, 5.0, 3.0, -1.0], [8.0, -5.0, -3.0, 1.0]])
    importance = torch.tensor([1e6, 1.0, 1.0, 1.0])
    grid = search_scales(weight, QuantFormat(4), importance, smallest=7 / 8)
    assert torch.allclose(grid.scale, torch.tensor([[1.0], [8 / 7]]))
    grid = search_scales(weight, QuantFormat(4), importance, smallest=7 / 8, negative=True)
    assert torch.allclose(grid.scale, torch.tensor([[1.0], [-1.0]]))
    integers = GptqSolver(torch.eye(4), damping=0.01).integers(weight, grid)
    assert integers.tolist() == [[-8.0, 5.0, 3.0, -1.0]] * 2


def test_negative_scales_are_kept_through_the_program(program: Program) -> None:
    result = run(program, QuantizeGptq(bits=4, group_size=16, negative_scales=True)).program
    assert any(bool((tensor < 0).any()) for name, tensor in result.weights.items() if name.endswith("_scale"))
    plain = run(program, QuantizeGptq(bits=4, group_size=16)).program
    assert all(bool((tensor > 0).all()) for name, tensor in plain.weights.items() if name.endswith("_scale"))
    assert output_error(program, result) < 1.1 * output_error(program, plain)


def test_rows_are_quantized_alike_in_blocks_of_any_size(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (QuantizeGptq(bits=3, group_size=16), QuantizeClipped(bits=3, group_size=16, symmetric=False)):
        whole = run(program, one).program
        with monkeypatch.context() as patch:
            patch.setattr("irc.passes.quantize._calibrated_weights._ROWS", 7)
            parts = run(program, one).program
        for name, tensor in whole.weights.items():
            assert torch.equal(tensor, parts.weights[name])


def test_later_layers_see_the_quantized_ones_before_them(program: Program) -> None:
    """A second layer calibrated behind a coarse first one is not the one calibrated behind the exact first one."""
    both_layers = run(program, QuantizeGptq(bits=2, group_size=None)).program
    only_up = irc.PassContext(options={CALIBRATION_KEY: data()}, applications=irc.core.contract.Applications(limit=1))
    first = QuantizeGptq(bits=2, group_size=None).run(program.copy(), only_up).program
    second = run(first, QuantizeGptq(bits=2, group_size=None)).program
    stored = [p.weights["down.weight_stored"] for p in (both_layers, second)]
    assert torch.equal(*stored)


def test_goes_on_where_it_was_killed(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    original = QuantizeGptq.row_quantizer

    def counted(self, inputs, form):
        if len(done) == 1 and not survive:
            raise KeyboardInterrupt
        done.append(len(inputs.gram))
        return original(self, inputs, form)

    monkeypatch.setattr(QuantizeGptq, "row_quantizer", counted)
    one, survive = QuantizeGptq(bits=4, group_size=16), False
    with pytest.raises(KeyboardInterrupt):
        run(program, one, resume=tmp_path)
    survive = True
    resumed = run(program, one, resume=tmp_path).program
    assert done == [32, 48]
    assert not list(tmp_path.glob("*.partial"))
    fresh = run(program, one).program
    for name, tensor in fresh.weights.items():
        assert torch.equal(tensor, resumed.weights[name])
    run(program, dataclasses.replace(one, damping=0.02), resume=tmp_path)  # other work: nothing is taken over
    assert len(done) == 6


@both
def test_bad_data_names_the_layer(cls: type[Pass], program: Program) -> None:
    class Spoil(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.log(self.up(x)))  # of negative numbers

    spoiled = irc.capture(Spoil().eval(), (data(2, 5),), dynamic=({0: "B", 1: "S"},))
    ctx = PassContext(options={CALIBRATION_KEY: data()})
    manager = irc.PassManager([cls(group_size=16)], verify="off", ctx=ctx)
    with pytest.raises(PassError, match=r"the inputs of linear_1 down .* hold numbers that are not finite"):
        manager.run(spoiled)
    with pytest.raises(PassError, match=r"linear \(up\) cannot be quantized: its inputs are zero in all"):
        run(program, cls(group_size=16), torch.zeros(2, 3, 32))
    with pytest.raises(PassError, match="no calibration data reaches linear up"):
        run(program, cls(group_size=16), CalibrationData(((torch.zeros(2, 0, 32),),)))
    with pytest.raises(PassError, match="needs calibration data"):
        irc.PassManager([cls(group_size=16)]).run(program)


@both
def test_a_group_that_does_not_divide_lists_all_layers_before_any_work(cls: type[Pass], program: Program) -> None:
    with pytest.raises(PassError) as caught:
        run(program, cls(group_size=20), torch.full((1, 1, 32), torch.nan))
    assert "up.weight (up): group size 20 does not divide its rows of 32" in str(caught.value)
    assert "down.weight (down): group size 20 does not divide its rows of 48" in str(caught.value)


def test_shared_weights_are_skipped_with_their_reason() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(torch.relu(self.one(x)))

    program = irc.capture(Shared().eval(), (torch.randn(2, 8),))
    row = run(program, QuantizeGptq(group_size=None), torch.randn(4, 8)).report.rows[-1]
    assert row.matches == 0
    assert "weight one.weight is shared with linear_1, whose inputs differ" in row.skips[0].reason


def test_options() -> None:
    text = "quantize-gptq{bits=3,group-size=none,act-order=false}"
    (one,) = parse_pipeline(text)
    assert one == QuantizeGptq(bits=3, group_size=None, act_order=False)
    assert parse_pipeline(irc.core.pipeline.print_pipeline([one])) == [one]
    with pytest.raises(
        OptionError,
        match=r"bits must be 2 to 8, not 9; search must be one of absmax, error, not 'x'; damping .*; negative_scales ",
    ):
        QuantizeGptq(bits=9, search="x", damping=0, negative_scales=True)
    with pytest.raises(OptionError, match=r"shrink must be between 0 and 1, not 2; steps must be at least 2, not 1"):
        QuantizeClipped(shrink=2, steps=1)


def test_progress_is_told(program: Program) -> None:
    told: list[tuple[str, int, int]] = []
    ctx = PassContext(options={CALIBRATION_KEY: data()}, progress=lambda *report: told.append(report))
    irc.PassManager([QuantizeGptq(group_size=16)], ctx=ctx).run(program)
    assert told == [("quantize-gptq", 0, 2), ("quantize-gptq", 1, 2), ("quantize-gptq", 2, 2)]
