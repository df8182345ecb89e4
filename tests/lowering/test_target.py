"""Registry, options and the check of artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import irc
from irc.core import formats
from irc.core.artifact_check import ArtifactCheck, check_artifact
from irc.core.errors import NumericError, OptionError, StorageError, TargetError
from irc.core.target import (
    Concern,
    Coverage,
    Target,
    get_target,
    read_options,
    register_target,
    registered_targets,
)  # fmt: skip
from tests.lowering import steps


def test_targets_register_themselves() -> None:
    assert get_target("reference").available() is None
    assert {"reference", "onnx"} <= set(registered_targets())


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"no target is called 'refrence'.*did you mean 'reference'"):
        get_target("refrence")


@dataclass(frozen=True)
class Settings:
    """Options of every kind."""

    count: int | None = None
    factor: float = 1.0
    names: Sequence[str] = ()
    mode: Literal["a", "b"] = "a"
    whole: Mapping[str, str] | None = None
    anything: Any = None


def test_options_of_the_wrong_type_are_refused_together() -> None:
    given = {"count": True, "factor": "2", "names": "ab", "mode": "c", "whole": [], "anything": 3, "cout": 1}
    with pytest.raises(OptionError) as caught:
        read_options(Settings, given, what="target x")
    assert str(caught.value) == (
        "target x: no option 'cout' (did you mean 'count'?); option 'count': expected int or none, got True;"
        " option 'factor': expected float, got '2'; option 'names': expected list of text, got 'ab';"
        " option 'mode': expected a or b, got 'c'; option 'whole': expected Mapping or none, got []"
    )
    right = {"count": 2, "factor": 2, "names": ["ab"], "mode": "b", "whole": {"a": "b"}}
    assert read_options(Settings, right, what="target x") == Settings(**right)


def test_two_targets_of_one_name_are_refused() -> None:
    class Other(type(get_target("reference"))):
        name = "reference"

    with pytest.raises(ValueError, match="two targets"):
        register_target(Other)
    assert isinstance(get_target("reference"), Target)


@pytest.mark.parametrize("name", ["cpu", "gguf", "onnx", "onnx-genai", "reference"])
def test_places_are_judged_before_any_work(tmp_path: Path, name: str) -> None:
    target = get_target(name)
    target.check_place(tmp_path / f"model{target.suffix}")
    target.check_place(tmp_path / "new" / f"model{target.suffix}")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="file is not a folder that can be written to"):
        target.check_place(tmp_path / "file" / f"model{target.suffix}")
    for other in {one.suffix for one in registered_targets().values()} - {target.suffix}:
        with pytest.raises(OptionError, match=rf"target '{name}' writes a .*model{other}"):
            target.check_place(tmp_path / f"model{other}")
    if target.suffix:
        target.check_place(tmp_path)
    else:
        with pytest.raises(StorageError, match=r"exists|holds other files"):
            target.check_place(tmp_path)


def test_refused_operations_are_listed_together() -> None:
    coverage = Coverage("x", refused=[Concern("aten.a", 2, "no kernel"), Concern("aten.b", 1, "no type")])
    assert not coverage.complete
    with pytest.raises(TargetError, match=r"(?s)aten.a × 2: no kernel.*aten.b × 1: no type"):
        coverage.require(steps.decoder())


def test_check_runs_three_lengths_and_two_batches() -> None:
    program = steps.decoder()
    check = check_artifact("self", program.run, program)
    assert [run.what for run in check.runs] == [f"B={b}, S={s}" for b in (1, 3) for s in (1, 5, 9)]
    assert check.passed
    assert check.relative == 0.0


def test_check_sees_a_wrong_number() -> None:
    program = steps.decoder()

    def wrong(*inputs: object) -> list[torch.Tensor]:
        (logits,) = program.run(*inputs)
        logits[..., 0, 3] += 0.01 * logits.abs().max()
        return [logits]

    check = check_artifact("wrong", wrong, program)
    assert not check.passed
    assert check.relative == pytest.approx(0.01, rel=0.05)
    with pytest.raises(NumericError, match="does not compute what its program does"):
        check.require()


def test_check_allows_what_the_program_itself_moves_by() -> None:
    passes = "quantize-weights{bits=8,group-size=none},quantize-activations{mode=dynamic}"
    program = irc.compile(steps.decoder(), passes).artifact.program
    logits = program.run(*program.example_inputs)[0]

    def off(by: float) -> ArtifactCheck:
        return check_artifact("off", lambda *inputs: [program.run(*inputs)[0] * (1 + by)], program)

    assert logits.abs().max() > 0
    assert off(0.01).passed
    assert all(run.moves == 0 for run in off(0.01).runs)  # within two steps of 8 bits: nothing had to be found out
    check = off(0.2)
    assert not check.passed
    assert all(0 < run.moves < 0.05 for run in check.runs)
    assert "the program itself moves by" in str(check)
    moves = min(run.moves for run in check.runs)
    check.tolerance = 0.0
    assert replace(check.runs[0], relative=1.9 * moves).passed(0.0)
    assert not replace(check.runs[0], relative=2.1 * max(run.moves for run in check.runs)).passed(0.0)


@pytest.mark.parametrize("target", ["reference", "cpu", "onnx"])
@pytest.mark.parametrize("scale_dtype", ["f16", "f32"])
def test_quantized_weights_are_the_same_numbers_everywhere(target: str, scale_dtype: str) -> None:
    if get_target(target).available() is not None:
        pytest.skip(f"target {target} is not available")
    torch.manual_seed(0)
    model, x = torch.nn.Linear(64, 48, bias=False), torch.randn(5, 64)
    passes = f"quantize-weights{{bits=4,group-size=16,scale-dtype={scale_dtype}}}"
    # Without its activations in 8 bits, target cpu would read floats; integers of x pass them unchanged.
    if target == "cpu":
        x = (x * 40).round().clamp(-127, 127)
        x[:, 0] = 127
        passes += ",quantize-activations{mode=dynamic}"
    compiled = irc.compile(model, passes, target=target, example_inputs=x, verify="off")
    program = compiled.stages["quantize-weights"]
    stored, scale = program.weights["weight_stored"], program.weights["weight_scale"]
    chosen = formats.parse("int4.g16")
    assert isinstance(chosen, formats.QuantFormat)
    weight = (chosen.unpack(stored).double().unflatten(-1, (4, -1)) * scale.double().unsqueeze(-1)).flatten(-2)
    expected = x.double() @ weight.T
    assert (compiled(x).double() - expected).abs().max() < 1e-6 * expected.abs().max()


def test_check_of_a_step_sees_a_cache_that_is_not_written() -> None:
    program = steps.step()

    def wrong(*inputs: torch.Tensor) -> list[torch.Tensor]:
        return [program.run(*inputs)[0], *inputs[3:]]

    assert not check_artifact("wrong", wrong, program).passed
    assert check_artifact("right", program.run, program).passed
