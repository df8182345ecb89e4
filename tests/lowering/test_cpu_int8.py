"""Target cpu on static Q/DQ programs: layers over integers on both sides run as integers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import irc
from irc.core.program import Program
from irc.core.target import get_target
from irc.frontend import capture
from irc.lowering.cpp.build import find_compiler
from irc.lowering.cpu.artifact import CpuArtifact
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.cpu.sites import matchers
from irc.lowering.kernels.fusion import make_schedule
from irc.lowering.kernels.kernel import Kernel, Loop
from irc.lowering.kernels.prepare import fold_constants
from irc.lowering.kernels.sites import TemplateCall
from tests.passes.test_quantize_activations import Residual

CPU = get_target("cpu")
QUICK = {"threads": 2, "flags": ("-O1",)}
PASSES = "fold-conv-batch-norm,quantize-weights{bits=%d,group-size=none,include-convolutions=true},quantize-activations"
RESIDUALS, SIGNED = "{include-residuals=true}", "{include-residuals=true,symmetric=true}"
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler (g++ or clang++)")


class Block(nn.Module):
    """A residual block with a strided shortcut, a grouped and a depthwise convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, stride=2, padding=3)
        self.first = nn.Conv2d(16, 24, 1)
        self.second = nn.Conv2d(24, 24, 3, stride=2, padding=1, groups=3)
        self.each = nn.Conv2d(24, 24, 3, padding=2, dilation=2, groups=24)
        self.third = nn.Conv2d(24, 40, 1, bias=False)
        self.norm = nn.BatchNorm2d(40)
        self.shortcut = nn.Conv2d(16, 40, 1, stride=2)
        self.head = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        y = torch.relu(self.each(torch.relu(self.second(torch.relu(self.first(x))))))
        y = torch.relu(self.norm(self.third(y)) + self.shortcut(x))
        return self.head(y.mean((2, 3)))


@functools.cache
def quantized(bits: int = 8, options: str = "") -> tuple[Program, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 37, 30)
    program = capture(Block().eval(), (x,), name="block", dynamic=({0: "B"},))
    ctx = irc.PassContext(options={"calibration": irc.CalibrationData.of([(x,)])})
    return irc.PassManager(PASSES % bits + options, verify="off", ctx=ctx).run(program).program, x


def _calls(program: Program) -> list[TemplateCall]:
    chosen = matchers(CpuOptions())
    own, _ = fold_constants(program, chosen)
    return [step for step in make_schedule(own, chosen).steps if isinstance(step, TemplateCall)]


def _kinds(program: Program) -> list[str]:
    return [call.site.kind for call in _calls(program)]


def test_layers_over_integers_run_as_integers() -> None:
    assert sorted(_kinds(quantized()[0])) == ["int8_depthwise", *["int8_product"] * 6, "max_pool2d"]


def test_images_stay_in_8_bits() -> None:
    """Pooling, and a residual sum with what it reads: all but the last one, which no convolution reads."""
    x = torch.randn(1, 3, 9, 8, generator=torch.Generator().manual_seed(1))
    ctx = irc.PassContext(options={"calibration": irc.CalibrationData.of([(x,)])})
    program = capture(Residual().eval(), (x,))
    calls = _calls(irc.PassManager(PASSES % 7 + RESIDUALS, verify="off", ctx=ctx).run(program).program)
    assert [call.site.kind for call in calls] == ["int8_product", "max_pool2d", *["int8_product"] * 3]
    assert [call.write.dtype for call in calls] == ["u8"] * 4 + ["f32"]
    assert calls[1].reads[0].buffer.dtype == "u8"
    for call in calls[3:]:  # the shortcut's convolution makes the first sum
        assert "aten.add.Tensor" in {origin.op for origin in call.origins}
        assert {buffer.dtype for buffer in call.extra_reads if buffer.kind == "temporary"} == {"u8"}


class Inverted(nn.Module):
    """The blocks of MobileNetV2: wider, depthwise, narrower, and a sum where the shape stays."""

    SHAPES = ((8, 40, 3, 2), (24, 72, 5, 1))  # channels, in the middle, window, stride

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.expand = nn.ModuleList([nn.Conv2d(few, many, 1) for few, many, _, _ in self.SHAPES])
        self.each = nn.ModuleList(
            [nn.Conv2d(many, many, size, stride, size // 2, groups=many) for _, many, size, stride in self.SHAPES]
        )
        self.project = nn.ModuleList([nn.Conv2d(many, 24, 1) for _, many, _, _ in self.SHAPES])
        self.head = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.stem(x))
        for expand, each, project in zip(self.expand, self.each, self.project, strict=True):
            y = project(nn.functional.relu6(each(nn.functional.relu6(expand(x)))))
            x = x + y if x.shape == y.shape else y
        return self.head(x.mean((2, 3)))


def test_inverted_residuals_stay_in_8_bits() -> None:
    """From the image to the last sum, and their numbers."""
    torch.manual_seed(2)
    x = torch.randn(2, 3, 21, 18)
    ctx = irc.PassContext(options={"calibration": irc.CalibrationData.of([(x,)])})
    program = capture(Inverted().eval(), (x,), dynamic=({0: "B"},))
    program = irc.PassManager(PASSES % 7 + RESIDUALS, verify="off", ctx=ctx).run(program).program
    calls = _calls(program)
    assert [call.site.kind for call in calls] == [
        "int8_product", *["int8_product", "int8_depthwise", "int8_product"] * 2, "int8_product",
    ]  # fmt: skip
    assert [call.write.dtype for call in calls] == ["u8"] * 6 + ["f32"] * 2
    artifact = CPU.lower(program, QUICK)
    assert artifact.source.count("irc::Requantize<uint8_t") == 6  # bounds of ReLU6 included
    for given in (x, 3 * torch.randn(3, 3, 21, 18)):
        (wanted,), (found,) = program.run(given), artifact.run(given)
        assert (found - wanted).abs().max() < 5e-3 * wanted.abs().max()


def test_values_that_are_next_to_nothing() -> None:
    """Their scale has no reciprocal in f32, which results in integers are multiplied with."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.Conv2d(16, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight *= 1e-37
        model[1].weight *= 1e36
    x = torch.randn(1, 3, 8, 8)
    ctx = irc.PassContext(options={"calibration": irc.CalibrationData.of([(x,)])})
    program = irc.PassManager(PASSES % 7, verify="off", ctx=ctx).run(capture(model, (x,))).program
    assert [call.site.kind for call in _calls(program)] == ["int8_product"] * 2
    (wanted,), (found,) = program.run(x), CPU.lower(program, QUICK).run(x)
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_an_image_is_quantized_in_lanes_of_pixels() -> None:
    """Its three channels lie apart: a loop over them around pieces of rows."""
    torch.manual_seed(4)
    x = torch.randn(1, 3, 16, 16)
    ctx = irc.PassContext(options={"calibration": irc.CalibrationData.of([(x,)])})
    program = capture(nn.Conv2d(3, 4, 3).eval(), (x,), dynamic=({0: "B"},))
    program = irc.PassManager(PASSES % 7, verify="off", ctx=ctx).run(program).program
    own, _ = fold_constants(program, matchers(CpuOptions()))
    kernel = make_schedule(own, matchers(CpuOptions())).steps[0]
    assert isinstance(kernel, Kernel)
    channels = kernel.body[0]
    assert isinstance(channels, Loop)
    assert (channels.axis.extent, channels.axis.kind) == (3, "serial")
    pixels = channels.body[0]
    assert isinstance(pixels, Loop)
    assert (pixels.axis.extent, pixels.axis.kind) == (128, "vector")
    (wanted,), (found,) = program.run(x), CPU.lower(program, QUICK).run(x)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_whole_mobilenet() -> None:
    """Every convolution of MobileNetV2 reads integers."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(3)
    model = MobileNetV2ForImageClassification(MobileNetV2Config(tf_padding=False, depth_multiplier=0.35)).eval()
    x = torch.randn(1, 3, 32, 32)
    ctx = irc.PassContext(options={"calibration": irc.CalibrationData.of([(x,)])})
    program = irc.PassManager(PASSES % 7 + RESIDUALS, verify="off", ctx=ctx).run(capture(model, (x,))).program
    kinds = _kinds(program)
    assert sorted(set(kinds)) == ["int8_depthwise", "int8_product"]
    assert kinds.count("int8_depthwise") == 17
    assert not CPU.check(program).fallbacks


@pytest.mark.parametrize(
    ("isa", "bits", "options"),
    [(None, 8, ""), (None, 7, RESIDUALS), ("plain", 8, SIGNED)],
)
def test_same_numbers_as_the_reference(isa: str | None, bits: int, options: str) -> None:
    program, x = quantized(bits, options)
    artifact = CPU.lower(program, {"isa": isa, **QUICK})
    for given in (x, torch.randn(3, 3, 37, 30)):
        (wanted,), (found,) = program.run(given), artifact.run(given)
        # Sums differ in the last bits of f32; where they meet the middle between two integers, one step differs.
        assert (found - wanted).abs().max() < 5e-3 * wanted.abs().max()


def test_what_no_integer_holds_becomes_the_nearest() -> None:
    """Overflow, infinities and NaN in a quantize that an epilogue runs, as in the reference."""
    program, x = quantized()
    artifact = CPU.lower(program, QUICK)
    given = x.clone()
    given[0, 0, 0, :6] = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, torch.nan, 3e7])
    (wanted,), (found,) = program.run(given), artifact.run(given)
    assert wanted.isfinite().all()
    assert (found - wanted).abs().max() < 5e-3 * wanted.abs().max()


def test_times_of_kernels() -> None:
    program, x = quantized()
    artifact = CPU.lower(program, {"profile": True, **QUICK})
    assert isinstance(artifact, CpuArtifact)
    times = artifact.kernel_times(x, runs=2)
    assert len(times) == artifact.source.count("times.mark(worker.index")
    assert all(milliseconds >= 0 for _, milliseconds in times)
    assert any("irc.quantize" in name for name, _ in times)
    with pytest.raises(irc.core.errors.OptionError, match="'profile': True"):
        CPU.lower(program, QUICK).kernel_times(x)
