"""Choices by measurement: what is kept, remembered, and used again without measuring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import irc
from irc.core.errors import OptionError
from irc.core.program import Program
from irc.lowering.cpu import tuning
from irc.lowering.cpu.artifact import CpuArtifact
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.cpu.tuning import Candidate

FAST, SLOW = Candidate("share", 512), Candidate("private_rows", False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty memory, and two candidates of which one is said to be faster."""
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(tuning, "candidates", lambda program, options, kinds: [FAST, SLOW])
    monkeypatch.setattr(tuning, "compare", said)
    return tmp_path


def said(best: CpuArtifact, other: CpuArtifact, program: Program) -> float:
    return 0.5 if other.options.share == 512 and best.options.share != 512 else 1.2


def unasked(best: CpuArtifact, other: CpuArtifact, program: Program) -> float:
    raise AssertionError("nothing is to be measured")


def compile_(tune: float | None) -> irc.compiler.Compiled:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Tanh(), nn.Sigmoid()), torch.randn(3, 50)
    compiled = irc.compile(model, [], target="cpu", example_inputs=(x,), dynamic={}, tune=tune,
                           options={"threads": 1, "flags": ("-O0",)})  # fmt: skip
    torch.testing.assert_close(compiled(x), model(x))
    return compiled


def test_a_remembered_choice_is_used_without_measuring(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_(tune=1000)
    assert isinstance(first.artifact, CpuArtifact)
    assert (first.artifact.options.share, first.artifact.options.private_rows) == (512, True)
    assert "512 / irc::max_of" in first.artifact.source
    assert any("share=512: 2.00 × as fast as without (2 of 2 candidates; 2 candidates measured now)" in note
               for note in first.report.rows[-1].notes)  # fmt: skip

    monkeypatch.setattr(tuning, "compare", unasked)
    again = compile_(tune=0)
    assert isinstance(again.artifact, CpuArtifact)
    assert "512 / irc::max_of" in again.artifact.source
    assert any("measured before, nothing measured now" in note for note in again.report.rows[-1].notes)

    plain = compile_(tune=None)  # rules only, whatever is remembered
    assert isinstance(plain.artifact, CpuArtifact)
    assert "512 / irc::max_of" not in plain.artifact.source

    monkeypatch.setattr(tuning, "describe_hardware", lambda: {"processor": "another"})
    elsewhere = compile_(tune=0)
    assert isinstance(elsewhere.artifact, CpuArtifact)
    assert "512 / irc::max_of" not in elsewhere.artifact.source
    assert any("no candidate was measured" in note for note in elsewhere.report.rows[-1].notes)


def test_seconds_that_ran_out_are_gone_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "candidates", lambda program, options, kinds: [SLOW])
    compile_(tune=1000)
    monkeypatch.setattr(tuning, "candidates", lambda program, options, kinds: [SLOW, FAST])
    tried: list[int] = []
    monkeypatch.setattr(tuning, "compare", lambda best, other, program: tried.append(other.options.share) or 1.0)
    compile_(tune=1000)
    assert tried == [512]  # the other one is known


def test_what_is_no_memory_is_ignored(folder: Path) -> None:
    compile_(tune=1000)
    (path,) = (folder / "tuned").rglob("*.json")
    known = json.loads(path.read_text())
    assert known["kept"] == ["share=512"]
    for text in ("", "[]", json.dumps({**known, "tried": {"share=512": "fast"}})):
        path.write_text(text)
        assert tuning.Memory.read(path).tried == {}
    # A choice that is no candidate is never taken over, whoever wrote it there.
    path.write_text(json.dumps({**known, "tried": {"flags=-O3": 0.1}, "kept": ["flags=-O3"]}))
    artifact = compile_(tune=0).artifact
    assert isinstance(artifact, CpuArtifact)
    assert artifact.options.flags == ("-O0",)


def test_measuring_a_step_and_its_candidates() -> None:
    """Nothing is made up: every candidate of a language model is built, measured and gives the same numbers."""
    from tests.lowering.steps import step

    program = step("insert-kv-cache{max-length=32}")
    options = CpuOptions(flags=("-O0",), threads=1)
    listed = tuning.candidates(program, options, ["attention", "float_matmul"])
    assert [str(one) for one in listed] == ["printed=attention", "printed=float_matmul", "share=512", "share=16384"]
    artifact = irc.core.target.get_target("cpu").lower(program, options)
    assert isinstance(artifact, CpuArtifact)
    runs = tuning.workload(artifact, program)
    assert len(runs) == 2  # a token, and a prompt
    assert all(seconds > 0 for seconds in tuning.measure(runs))


def test_what_cannot_be_tuned_says_so() -> None:
    model, x = nn.Tanh(), torch.randn(2, 3)
    with pytest.raises(OptionError, match="has no choices to tune"):
        irc.compile(model, [], target="reference", example_inputs=(x,), tune=1)
    with pytest.raises(OptionError, match="tune takes seconds"):
        irc.compile(model, [], target="cpu", example_inputs=(x,), tune=-1)
    with pytest.raises(OptionError, match="no kind of template is called 'atention'"):
        irc.compile(model, [], target="cpu", example_inputs=(x,), options={"printed": ["atention"]})
