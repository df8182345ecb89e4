"""A bug planted in any pass is found: the error names the pass and the node.

Each case runs the real pass and then spoils its result the way a mistake in its code would. Verification
must blame that very node.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

import irc
import irc.passes
from irc.core.calibration import CALIBRATION_KEY
from irc.core.contract import Pass, registered_passes
from irc.core.errors import VerificationError
from irc.core.ops import is_irc_op
from irc.core.program import Program
from irc.passes.canonicalize import canonical_passes
from tests import zoo
from tests.passes.planting import (
    Plant,
    bypass,
    confuse,
    forget_mask,
    op,
    planted,
    set_argument,
    set_keyword,
    spoil_constant,
    spoil_kept,
    spoil_weight,
    swap_arguments,
    swap_halves,
)

aten = torch.ops.aten
CALIBRATED = irc.PassContext(options={CALIBRATION_KEY: zoo.token_ids(6, seed=9)})


# ---------------------------------------------------------------- models that a pass has work on


def of_zoo(name: str) -> Callable[[], Program]:
    return lambda: zoo.captured(name)


def prepared(pass_name: str, program: Program) -> Program:
    """A raw program after the canonicalization passes that come before `pass_name`; others as they are."""
    names = [p.name for p in canonical_passes()]
    if pass_name not in names:
        return program
    return irc.PassManager(canonical_passes()[: names.index(pass_name)], verify="off").run(program).program


def raw(name: str) -> Callable[[], Program]:
    return lambda: zoo.captured(name, canonicalize=False)


class Pieces(nn.Module):
    """What the small passes look for, once each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)
        self.scale, self.bias = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        mean = x.mean(-1, keepdim=True)
        var = (x - mean).pow(2).mean(-1, keepdim=True)
        x = (x - mean) / torch.sqrt(var + 1e-5) * (self.scale * 2) + self.bias
        x = x * 1.0 + 0.0
        h = torch.relu(self.up(x))
        return self.down(h) + torch.tanh(x) * torch.tanh(-x)


def pieces(*, canonical: bool) -> Callable[[], Program]:
    def build() -> Program:
        torch.manual_seed(0)
        return irc.capture(Pieces().eval(), (torch.randn(3, 3, 5, 5),), canonicalize=canonical)

    return build


def after(name: str, *passes: Pass) -> Callable[[], Program]:
    def build() -> Program:
        program = zoo.captured(name)
        data = irc.CalibrationData((tuple(program.example_inputs or ()),))
        context = irc.PassContext(options={"calibration": data})
        return irc.PassManager(list(passes), verify="off", ctx=context).run(program).program

    return build


W8 = irc.passes.QuantizeWeights(bits=8, group_size=None)


def rescale(program: Program, new: list[fx.Node]) -> fx.Node:
    """A calibrated scale that is far too small in both, so that nearly everything is clipped."""
    restored = op(new, "dequantize")
    scale = restored.args[1]
    assert isinstance(scale, fx.Node)
    scale.target = program.add_weight("wrong", program.weight(scale) / 8)
    return restored


def scale_of_another(program: Program, new: list[fx.Node]) -> fx.Node:
    """Numbers quantized with the scale of another token."""
    scale = op(new, "dynamic_scale")
    source = scale.args[0]
    assert isinstance(source, fx.Node)
    rolled = program.insert(aten.roll.default, source, [1], [1], before=scale)
    scale.replace_input_with(source, rolled)
    return next(n for n in new if is_irc_op(n.target, "quantize") and n.args[1] is scale)


def scales_written_elsewhere(program: Program, new: list[fx.Node]) -> fx.Node:
    """The scales of keys go where those of the token before belong."""
    restored = op(new, "dequantize")
    write = restored.args[1]
    assert isinstance(write, fx.Node)
    positions = write.args[2]
    assert isinstance(positions, fx.Node)
    shifted = program.insert(aten.sub.Tensor, positions, 1, before=write)
    wrong = program.insert(aten.clamp_min.default, shifted, 0, before=write)
    write.replace_input_with(positions, wrong)
    return wrong


CASES: dict[str, tuple[Callable[[], Program], dict[str, object], Plant]] = {
    "drop-noise": (raw("tinypy"), {}, bypass("silu")),
    "raise-linear": (
        raw("gpt2"),
        {},
        spoil_weight("linear", 1, lambda w: w.flip(0)),
    ),
    "raise-rms-norm: eps": (raw("tinypy"), {}, set_argument("rms_norm", 2, 1e-1)),
    "raise-layer-norm: eps": (
        pieces(canonical=False),
        {},
        set_argument("layer_norm", 4, 1e-1),
    ),
    "raise-attention: scale": (
        raw("tinypy"),
        {},
        set_keyword("attention", scale=lambda s: s * 1.1),
    ),
    "raise-attention: window": (
        raw("mistral"),
        {},
        set_keyword("attention", window=lambda w: w + 1),
    ),
    "raise-attention: mask": (raw("llama"), {}, set_keyword("attention", mask="full")),
    "raise-rope: pairs": (raw("tinypy"), {}, set_keyword("rope", interleaved=True)),
    "raise-rope: sine": (raw("tinypy"), {}, swap_arguments("rope", 1, 2)),
    "raise-glu: swapped": (raw("tinypy"), {}, swap_arguments("glu", 0, 1)),
    "raise-glu: activation": (raw("tinypy"), {}, set_keyword("glu", activation="gelu")),
    "simplify-algebra": (pieces(canonical=False), {}, bypass("neg")),
    "fold-constants": (pieces(canonical=False), {}, spoil_constant(lambda w: w.roll(1))),
    "eliminate-common-subexpressions": (
        pieces(canonical=False),
        {},
        confuse("tanh"),
    ),
    "eliminate-dead-code": (pieces(canonical=False), {}, bypass("tanh")),
    "fold-conv-batch-norm": (pieces(canonical=True), {}, spoil_weight("conv2d", 1, lambda w: w * 1.01)),
    "fuse-activation": (pieces(canonical=True), {}, set_keyword("linear_activation", activation="gelu")),
    "merge-qkv": (of_zoo("llama"), {}, swap_halves),
    "merge-gate-up": (of_zoo("llama"), {}, swap_halves),
    "drop-layers": (of_zoo("llama"), {"layers": "0"}, forget_mask),
    "substitute-flash-attention: mask": (of_zoo("llama"), {}, set_keyword("flash_attention", mask="full")),
    "substitute-flash-attention: window": (
        of_zoo("mistral"),
        {},
        set_keyword("flash_attention", window=lambda w: w - 1),
    ),
    "quantize-gptq: scale transposed": (
        of_zoo("llama"),
        {"bits": 4, "group_size": 16},
        spoil_weight("dequantize", 1, lambda s: s.flatten().view(s.shape[1], s.shape[0]).t().contiguous()),
    ),
    "quantize-gptq: nibbles": (
        of_zoo("llama"),
        {"bits": 4, "group_size": 16},
        spoil_weight("dequantize", 0, lambda q: (q >> 4) | (q << 4)),
    ),
    "quantize-clipped: zero point": (
        of_zoo("llama"),
        {"bits": 4, "group_size": 16, "symmetric": False},
        spoil_weight("dequantize", 2, lambda z: z + 1),
    ),
    "quantize-clipped: scale transposed": (
        of_zoo("llama"),
        {"bits": 4, "group_size": 16},
        spoil_weight("dequantize", 1, lambda s: s.flatten().view(s.shape[1], s.shape[0]).t().contiguous()),
    ),
    "quantize-gptq: zero point": (
        of_zoo("llama"),
        {"bits": 4, "group_size": 16, "symmetric": False},
        spoil_weight("dequantize", 2, lambda z: z + 1),
    ),
    "quantize-gptq: scales of 5 % more": (
        of_zoo("llama"),
        {"bits": 8, "group_size": 16},
        spoil_weight("dequantize", 1, lambda s: s * 1.05),
    ),
    "smooth-activations: factors reversed": (of_zoo("llama"), {}, spoil_kept("linear", 3, lambda w: w.flip(1))),
    "scale-salient-channels: one factor lost": (
        of_zoo("llama"),
        {"group_size": 16},
        spoil_kept("linear", 6, lambda w: w * torch.where(torch.arange(w.shape[1]) == 3, 1.5, 1.0)),
    ),
    "rotate-residual: turned the other way": (of_zoo("llama"), {}, spoil_kept("linear", 4, lambda w: w.flip(1))),
    "rotate-residual: a writer left as it was": (of_zoo("llama"), {}, spoil_kept("linear", 3, lambda w: w.flip(0))),
    "quantize-weights: scale transposed": (
        of_zoo("llama"),
        {"bits": 8, "group_size": 16},
        spoil_weight("dequantize", 1, lambda s: s.flatten().view(s.shape[1], s.shape[0]).t().contiguous()),
    ),
    "quantize-weights: nibbles": (
        of_zoo("llama"),
        {"bits": 4, "group_size": 16},
        spoil_weight("dequantize", 0, lambda q: (q >> 4) | (q << 4)),
    ),
    "quantize-weights: zero point": (
        of_zoo("llama"),
        {"bits": 4, "group_size": 16, "symmetric": False},
        spoil_weight("dequantize", 2, lambda z: z + 1),
    ),
    "quantize-activations: scale": (after("llama", W8), {}, rescale),
    "quantize-activations: another token's scale": (after("llama", W8), {"mode": "dynamic"}, scale_of_another),
    "quantize-kv-cache": (after("llama", irc.passes.InsertKVCache(max_length=32)), {}, scales_written_elsewhere),
    "insert-fake-quantization": (
        of_zoo("llama"),
        {"bits": 8},
        spoil_weight("fake_quantize", 1, lambda s: s.detach() / 4),
    ),
    "convert-fake-quantization": (
        after("llama", irc.passes.InsertFakeQuantization(bits=8)),
        {},
        spoil_weight("dequantize", 0, lambda q: q.roll(1, 0)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_planted_bug_is_named(case: str) -> None:
    build, options, plant = CASES[case]
    name = case.partition(":")[0]
    program = prepared(name, build())
    blamed: list[str] = []
    manager = irc.PassManager(
        [planted(registered_passes()[name](**options), plant, blamed)], verify="each", ctx=CALIBRATED
    )
    with pytest.raises(VerificationError) as caught:
        manager.run(program)
    assert blamed, "the plant was never reached"
    assert caught.value.pass_name == name
    assert caught.value.node == blamed[0], str(caught.value)
    assert name in str(caught.value)
    assert blamed[0] in str(caught.value)


def swap_caches(program: Program, new: list[fx.Node]) -> fx.Node:
    """The second layer attends over the first layer's keys: right sizes, wrong cache."""
    first, second = (n for n in program.graph.nodes if is_irc_op(n.target, "attention"))
    second.args = (second.args[0], first.args[1], second.args[2])
    return second


def forget_history(program: Program, new: list[fx.Node]) -> fx.Node:
    """Positions that start anew with each step: the first step is right, later ones are not."""
    write = op(list(program.graph.nodes), "cache_write")
    positions = write.args[2]
    assert isinstance(positions, fx.Node)
    first = program.insert(aten.slice.Tensor, positions, 1, 0, 1, before=write)
    write.replace_input_with(positions, program.insert(aten.sub.Tensor, positions, first, before=write))
    return next(iter(n for n in write.users if is_irc_op(n.target, "attention")))


@pytest.mark.parametrize(
    ("model", "plant"),
    [
        ("llama", set_keyword("attention", mask="full")),
        ("llama", swap_arguments("rope", 1, 2)),
        ("mistral", set_keyword("attention", window=lambda w: w + 1)),
        ("llama", swap_caches),
        ("llama", forget_history),
    ],
    ids=["forgotten mask", "tables swapped", "window off by one", "wrong cache", "only later steps are wrong"],
)
def test_a_bug_in_cache_insertion_is_named(model: str, plant: Plant) -> None:
    """The inputs change; the steps' values, joined along the tokens, are held against the run without a cache."""
    blamed: list[str] = []

    def spoil(program: Program, new: list[fx.Node]) -> fx.Node:
        return plant(program, list(program.graph.nodes))

    pass_ = planted(registered_passes()["insert-kv-cache"](max_length=32), spoil, blamed)
    with pytest.raises(VerificationError) as caught:
        irc.PassManager([pass_], verify="each").run(zoo.captured(model))
    assert caught.value.pass_name == "insert-kv-cache"
    assert caught.value.node == blamed[0], str(caught.value)


def test_every_pass_has_a_planted_bug() -> None:
    covered = {case.partition(":")[0] for case in CASES} | {"insert-kv-cache"}
    assert covered == set(registered_passes()), "add a planted bug for each pass"
