"""Channels scaled and streams turned without a change of the function: SmoothQuant, AWQ's first half, rotation."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

import irc
from irc.core.calibration import CALIBRATION_KEY
from irc.core.contract import Pass, PassContext, Skip
from irc.core.errors import OptionError, PassError
from irc.core.program import Program
from irc.passes import QuantizeClipped, QuantizeWeights, RotateResidual, ScaleSalientChannels, SmoothActivations
from irc.passes.quantize._hadamard import random_hadamard
from irc.passes.quantize._scale_groups import ScaleGroup, find_scale_groups
from tests import zoo

TOKENS = zoo.token_ids(6, seed=5)
SCALING = (SmoothActivations(), ScaleSalientChannels(group_size=8))


def run(program: Program, *passes: Pass, verify: str = "each") -> Program:
    ctx = PassContext(options={CALIBRATION_KEY: TOKENS})
    return irc.PassManager(list(passes), verify=verify, ctx=ctx).run(program).program


def with_outliers(program: Program, factor: float = 50.0) -> Program:
    """The same function: a norm's channels scaled up, its readers' columns scaled down."""
    changed = {}
    for group in find_scale_groups(program):
        if isinstance(group, ScaleGroup) and "rms_norm" in str(group.value.target):
            spread = torch.ones(group.num_channels)
            spread[3], spread[17] = factor, factor / 2
            for node, weight in [(group.value, group.value.args[1]), *((u, u.args[1]) for u in group.consumers)]:
                old = program.weight(weight)
                changed[str(weight.target)] = (old * spread if node is group.value else old / spread).detach()
    return program.copy(replace_weights=changed)


def error(program: Program, other: Program) -> float:
    a, b = program.run(TOKENS)[0], other.run(TOKENS)[0]
    return float((a - b).norm() / a.norm())


# -------------------------------------------------------------------- where


def test_groups_are_found_by_dataflow() -> None:
    program = zoo.captured("llama")
    found = [g for g in find_scale_groups(program) if isinstance(g, ScaleGroup)]
    assert len(found) == 4 * 2 + 1
    assert [len(g.consumers) for g in found[:4]] == [3, 1, 2, 1]
    assert [g.num_channels for g in found[:4]] == [32, 32, 32, 48]
    heads = found[1]
    assert heads.producers[0][0].name == found[0].consumers[2].name  # the value projection
    factors = torch.rand(32) + 0.5
    folded = heads.fold(factors)
    assert folded.shape == (16,)  # two key-value heads of eight channels
    torch.testing.assert_close(heads.fold(heads.spread(folded)), folded)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("gpt2", "made by nothing that can take factors"),  # GELU
        ("llama", None),
        ("tinypy", "is shared"),  # the head's weight is the embedding
    ],
)
def test_what_cannot_be_scaled_says_why(model: str, reason: str | None) -> None:
    skips = [g for g in find_scale_groups(zoo.captured(model)) if isinstance(g, Skip)]
    assert (reason is None) == (not skips)
    if reason is not None:
        assert any(reason in skip.reason for skip in skips), [skip.reason for skip in skips]


@pytest.mark.parametrize("one", SCALING, ids=lambda p: p.name)
@pytest.mark.parametrize("model", ["llama", "qwen3", "opt", "gpt-neox", "stablelm", "mistral"])
def test_the_function_stays(one: Pass, model: str) -> None:
    program = zoo.captured(model)
    changed = run(program, one)
    assert error(program, changed) < 1e-6
    for shape in ((1, 1), (2, 17)):
        ids = zoo.token_ids(*shape, seed=3)
        torch.testing.assert_close(program.run(ids)[0], changed.run(ids)[0], rtol=1e-4, atol=1e-5)
    assert len(set(program.weights) & set(changed.weights)) < len(program.weights)


# -------------------------------------------------------------------- what for


def test_smoothing_makes_outliers_of_activations_smaller() -> None:
    program = with_outliers(zoo.captured("llama"))
    smooth = run(program, SmoothActivations())

    def spread(of: Program) -> float:
        norm = next(n for n in of.operations() if "rms_norm" in str(n.target))
        seen: list[Tensor] = []

        def observe(node: fx.Node, value: Tensor) -> None:
            if node is norm:
                seen.append(value)

        with torch.no_grad():
            irc.core.evaluate.evaluate(of.graph, of.weight, [TOKENS], observe)
        channels = seen[0].abs().flatten(0, 1).amax(0)
        return float(channels.max() / channels.median())

    assert spread(smooth) < 0.3 * spread(program)


def test_what_outliers_cost_is_recovered() -> None:
    """Rounding loses far more when channels stand out; scaling, clipping and rotation bring it back."""
    plain = zoo.captured("llama")
    outliers = with_outliers(plain)
    options = {"bits": 4, "group_size": 16}
    lost = error(plain, run(outliers, QuantizeWeights(**options), verify="off"))
    assert lost > 2 * error(plain, run(plain, QuantizeWeights(**options)))
    for passes in (
        [ScaleSalientChannels(**options), QuantizeClipped(**options)],
        [RotateResidual(), QuantizeWeights(**options)],
    ):  # fmt: skip
        assert error(plain, run(outliers, *passes, verify="off")) < 0.6 * lost


# -------------------------------------------------------------------- rotation


@pytest.mark.parametrize("size", [1, 2, 16, 24, 48, 7])
def test_hadamard_is_orthogonal_and_flat(size: int) -> None:
    turn = random_hadamard(size, 0)
    torch.testing.assert_close(turn @ turn.T, torch.eye(size), rtol=0, atol=1e-6)
    if size & (size - 1) == 0:
        torch.testing.assert_close(turn.abs(), torch.full((size, size), size**-0.5))
    assert not torch.equal(random_hadamard(16, 0), random_hadamard(16, 1))


@pytest.mark.parametrize("model", ["llama", "mistral", "qwen2", "qwen3", "granite", "tinypy"])
def test_rotation_keeps_the_function(model: str) -> None:
    program = zoo.captured(model)
    turned = run(program, RotateResidual())
    assert error(program, turned) < 1e-5
    norms = [n for n in turned.operations() if "rms_norm" in str(n.target) and n.args[1] is None]
    assert len(norms) == 5
    again = run(turned, RotateResidual(seed=3))
    assert error(program, again) < 2e-5


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("gpt2", "reads the residual stream and is no RMSNorm"),
        ("gemma2", "aten.mul.Tensor reads the residual stream"),
        ("bert", "reads the residual stream and is no RMSNorm"),
    ],
)
def test_rotation_is_refused_by_node(model: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        irc.PassManager([RotateResidual()], verify="off").run(zoo.captured(model))


def test_rotation_needs_a_stream() -> None:
    program = irc.capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
    with pytest.raises(PassError, match="no residual stream was found"):
        irc.PassManager([RotateResidual()]).run(program)


def test_options() -> None:
    with pytest.raises(OptionError, match="alpha must be between 0 and 1, not 2"):
        SmoothActivations(alpha=2)
    with pytest.raises(OptionError, match="bits must be 2 to 8, not 1; steps must be at least 1, not 0"):
        ScaleSalientChannels(bits=1, steps=0)
    (one,) = irc.core.pipeline.parse_pipeline("scale-salient-channels{bits=3,group-size=none}")
    assert one == ScaleSalientChannels(bits=3, group_size=None)
