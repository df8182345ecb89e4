"""Activation quantization: what is rewritten, what is left and why, calibration errors by layer, numbers."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import Tensor, nn

import irc
from irc.core.contract import PassContext
from irc.core.errors import OptionError, PassError, VerificationError
from irc.core.ops import is_irc_op
from irc.core.pipeline import parse_pipeline, print_pipeline
from irc.core.program import Program
from irc.core.target import get_target
from irc.frontend import capture
from irc.passes import InsertKVCache, QuantizeActivations, QuantizeWeights
from tests import zoo

INT8 = QuantizeWeights(bits=8, group_size=None, include_convolutions=True)


class Mixed(nn.Module):
    """A convolution, two layers over one value, and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.a, self.b = nn.Conv1d(4, 8, 3, padding=1), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x)).transpose(1, 2)
        return self.a(h) @ torch.sigmoid(self.b(h)).transpose(1, 2)


class Logarithm(nn.Module):
    """NaN between the first layer and the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(torch.log(self.first(x))))


def images(batch: int = 3, length: int = 7, *, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, length, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def mixed() -> Program:
    program = capture(Mixed().eval(), (images(),), dynamic=({0: "B", 2: "S"},))
    return irc.PassManager([INT8]).run(program).program


def run(one: QuantizeActivations, program: Program, data: object = None):
    options = {} if data is None else {"calibration": data}
    return irc.PassManager([one], ctx=PassContext(options=options)).run(program)


def row_of(result):
    return result.report.rows[-1]


def text_of(program: Program, name: str) -> list[str]:
    return [str(n.kwargs["format"]) for n in program.graph.nodes if is_irc_op(n.target, name)]


def test_static_rewrite(mixed: Program) -> None:
    result = run(QuantizeActivations(), mixed, images(16))
    program, row = result.program, row_of(result)
    assert row.matches == 2
    assert row.statistics == {"convolution_operands": 1, "linear_operands": 2, "values": 2}
    assert text_of(program, "quantize") == ["uint8.tensor.asym"] * 2
    assert [s.reason for s in row.skips] == [
        "aten.matmul.default is no linear layer, convolution or attention: its operands stay as they are"
    ]
    quantized = [n for n in program.graph.nodes if is_irc_op(n.target, "quantize")]
    for node in quantized:
        (restored,) = node.users
        assert restored.args[1:] == node.args[1:]
    assert [len(next(iter(n.users)).users) for n in quantized] == [1, 2]
    again = row_of(run(QuantizeActivations(), program, images(16)))
    assert (again.matches, again.modified) == (0, False)
    assert irc.parse(str(program), weights=program.weights).run(images())[0].equal(program.run(images())[0])


def test_dynamic_rewrite(mixed: Program) -> None:
    result = run(QuantizeActivations(mode="dynamic"), mixed)
    row = row_of(result)
    assert row.statistics == {"linear_operands": 2, "values": 1}
    assert text_of(result.program, "dynamic_scale") == text_of(result.program, "quantize") == ["int8.row"]
    assert "the input of a convolution has no tokens to scale one by one: use mode='static'" in {
        s.reason for s in row.skips
    }


class Residual(nn.Module):
    """A pooled image, a sum with a shortcut's convolution, one with the image itself, and one of no convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        x = torch.relu(self.first(x) + self.shortcut(x))
        x = torch.relu(self.second(x) + x)
        return x + torch.sigmoid(x)


@pytest.fixture(scope="module")
def residual() -> tuple[Program, Tensor]:
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))
    return irc.PassManager([INT8]).run(capture(Residual().eval(), (x,))).program, x


def test_residual_sums(residual: tuple[Program, Tensor]) -> None:
    program, x = residual
    result = run(QuantizeActivations(include_residuals=True), program, x)
    assert row_of(result).statistics == {
        "convolution_operands": 4,
        "residual_operands": 2,
        "values": 4,
        "pooled_values": 1,
    }
    assert "neither operand is a quantized convolution's result" in row_of(result).skips[0].reason
    sums = [node for node in result.program.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    found = [[is_irc_op(operand.target, "dequantize") for operand in node.args] for node in sums]
    # The earlier one; the image, which the convolution reads in 8 bits, too; nothing.
    assert found == [[True, False], [False, True], [False, False]]
    assert sums[1].args[1] in sums[1].args[0].all_input_nodes
    order = list(result.program.graph.nodes)
    assert order.index(sums[0].args[0]) < order.index(sums[0].args[1])  # in memory when the other one is computed
    plain = run(QuantizeActivations(), program, x).program
    difference = (result.program.run(x)[0] - plain.run(x)[0]).abs().max()
    assert 0 < difference < 0.02 * plain.run(x)[0].abs().max()
    with pytest.raises(OptionError, match="include_residuals needs static scales"):
        QuantizeActivations(mode="dynamic", include_residuals=True)


def test_pooling_of_integers_is_exact(residual: tuple[Program, Tensor]) -> None:
    program, x = residual
    after = run(QuantizeActivations(), program, x).program
    (pool,) = (node for node in after.graph.nodes if node.target is torch.ops.aten.max_pool2d.default)
    (behind,), before = pool.users, pool.args[0].args[0]
    assert [part.target for part in before.args[1:]] == [part.target for part in behind.args[1:]]
    wanted = after.run(3 * x)[0]  # beyond what was calibrated
    pool.replace_input_with(pool.args[0], before.args[0])
    assert torch.equal(after.run(3 * x)[0], wanted)


class HeavyTail(nn.Module):
    """A layer over well-behaved values, and one over values that are twenty times as large for a few tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * torch.where(x[..., :1] > 1.5, 20.0, 1.0))


def test_auto_makes_dynamic_what_one_scale_would_lose() -> None:
    program = irc.PassManager([INT8]).run(capture(HeavyTail().eval(), (images(),))).program
    exact, errors = program.run(images())[0], {}
    for mode in ("auto", "static"):
        context = PassContext(options={"calibration": images(64)})
        one = QuantizeActivations(mode=mode)
        result = irc.PassManager([one], ctx=context, verify="off").run(program)
        errors[mode] = float((result.program.run(images())[0] - exact).square().mean())
        if mode == "auto":
            assert row_of(result).statistics == {"linear_operands": 2, "values": 2, "dynamic_values": 1}
            assert text_of(result.program, "quantize") == ["uint8.tensor.asym", "int8.row"]
            assert text_of(result.program, "dynamic_scale") == ["int8.row"]
            assert not [
                node for node in result.program.graph.nodes if "mul" in str(node.target) and node.op == "get_attr"
            ]
    assert errors["auto"] < 0.1 * errors["static"]


@pytest.mark.parametrize("mode", ["static", "dynamic", "auto"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (5, 4)])
def test_numbers_at_other_sizes(mixed: Program, mode: str, shape: tuple[int, int]) -> None:
    program = run(QuantizeActivations(mode=mode), mixed, images(64)).program
    x = images(*shape, seed=3)
    before, after = mixed.run(x)[0], program.run(x)[0]
    assert float((before - after).abs().max()) <= 0.05 * float(before.abs().max())
    assert not torch.equal(before, after)


def test_layers_are_calibrated_on_what_quantized_layers_give(mixed: Program) -> None:
    """The second scale is that of the first quantizer's output, not of the full-precision run."""
    data = images(32)
    program = run(QuantizeActivations(bits=3, observer="min-max", symmetric=True), mixed, data).program
    first, second = (n for n in program.graph.nodes if is_irc_op(n.target, "quantize"))
    seen: dict[str, Tensor] = {}
    from irc.core.evaluate import evaluate

    with torch.no_grad():
        evaluate(program.graph, program.weight, (data,), lambda node, value: seen.setdefault(node.name, value))
    assert float(program.weight(first.args[1])) == float(data.abs().max() / 3)
    assert float(program.weight(second.args[1])) == float(seen[second.args[0].name].abs().max() / 3)
    plain = mixed.node(second.args[0].name)
    with torch.no_grad():
        evaluate(mixed.graph, mixed.weight, (data,), lambda node, value: seen.__setitem__(f"old {node.name}", value))
    assert float(seen[f"old {plain.name}"].abs().max() / 3) != float(program.weight(second.args[1]))


def test_attention_operands(mixed: Program) -> None:
    program = irc.PassManager([INT8]).run(zoo.captured("llama")).program
    data = irc.CalibrationData((program.example_inputs,))
    assert row_of(run(QuantizeActivations(), program, data)).statistics["attention_operands"] == 6
    without = row_of(run(QuantizeActivations(include_attention=False), program, data))
    assert "attention_operands" not in without.statistics
    assert sum("include_attention=True" in s.reason for s in without.skips) == 2


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_cache_can_be_inserted_afterwards(mode: str) -> None:
    program = zoo.captured("llama")
    data = irc.CalibrationData((program.example_inputs,))
    passes = [INT8, QuantizeActivations(mode=mode), InsertKVCache(max_length=32)]
    result = irc.PassManager(passes, ctx=PassContext(options={"calibration": data})).run(program)
    assert result.report.rows[-1].relative_error < 1e-4


def test_layers_with_float_weights_are_left(mixed: Program) -> None:
    plain = capture(Mixed().eval(), (images(),))
    row = row_of(run(QuantizeActivations(), plain, images(8)))
    assert row.matches == 0
    assert sum("its weight is not quantized: quantize weights first" in s.reason for s in row.skips) == 3
    assert row_of(run(QuantizeActivations(float_weights=True), plain, images(8))).matches == 2


def test_odd_rows_cannot_be_packed(mixed: Program) -> None:
    static = capture(Mixed().eval(), (images(length=7),))
    row = row_of(run(QuantizeActivations(bits=4, float_weights=True), static, images(8)))
    assert any("4-bit numbers are stored in pairs, and the last size of x is 7" in s.reason for s in row.skips)


def test_half_types_come_back_as_they_were() -> None:
    program = capture(Mixed().eval().bfloat16(), (images().bfloat16(),))
    program = run(QuantizeActivations(float_weights=True), program, images(8).bfloat16()).program
    assert program.run(images().bfloat16())[0].dtype == torch.bfloat16


def test_calibration_errors_name_the_layer(mixed: Program) -> None:
    with pytest.raises(PassError, match="pass 'quantize-activations' needs calibration data"):
        run(QuantizeActivations(), mixed)
    with pytest.raises(PassError, match=r"calibrating input of conv \(conv1d\): all values that were seen are zero"):
        run(QuantizeActivations(), mixed, torch.zeros(4, 4, 7))
    program = irc.PassManager([INT8]).run(capture(Logarithm().eval(), (images(),))).program
    with pytest.raises(PassError, match=r"calibrating input of second \(linear_1\): \d+ of 112 numbers are not finite"):
        run(QuantizeActivations(), program, images(4))


def test_data_unlike_the_example_are_an_error(mixed: Program) -> None:
    with pytest.raises(VerificationError, match="the calibration data are not like them, or the scale is wrong"):
        run(QuantizeActivations(), mixed, images(8) / 50)


def test_progress_counts_the_layers(mixed: Program) -> None:
    seen: list[tuple[str, int, int]] = []
    context = PassContext(options={"calibration": images(8)}, progress=lambda *what: seen.append(what))
    irc.PassManager([QuantizeActivations()], ctx=context).run(mixed)
    assert seen == [("calibrating activations", i, 2) for i in range(3)]


def test_options() -> None:
    with pytest.raises(OptionError) as caught:
        QuantizeActivations(mode="sometimes", bits=9, observer="max", percentile=3)
    for part in ("not 'sometimes'", "bits must be 2 to 8, not 9", "not 'max'", "at most 100, not 3"):
        assert part in str(caught.value)
    with pytest.raises(OptionError, match="dynamic scales are symmetric"):
        QuantizeActivations(mode="dynamic", symmetric=False)
    one = QuantizeActivations(bits=6, symmetric=True, observer="percentile", percentile=99.5, include_attention=False)
    assert parse_pipeline(print_pipeline([one])) == [one]


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_onnx_gives_the_same_numbers(mixed: Program, mode: str) -> None:
    program = run(QuantizeActivations(mode=mode), mixed, images(16)).program
    artifact = get_target("onnx").lower(program)
    assert artifact.verify(program).passed
    kinds = {n.op_type for n in onnx.load(artifact.path).graph.node}
    assert "DequantizeLinear" in kinds
