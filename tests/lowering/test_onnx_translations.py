"""Canonical operations become ONNX operators where a registration takes them, else ATen, with the reason."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
import torch

from irc.core.errors import OptionError, TargetError
from irc.core.program import Program
from irc.core.target import get_target
from irc.core.text import parse
from irc.lowering.onnx import installed
from irc.lowering.onnx.registry import Setting, find_translation, translates
from tests.lowering import steps

TEXT = """irc 1

program @ops(%x: {dtype}[B, S, 12], %q: {dtype}[B, 4, S, 8], %k: {dtype}[B, 2, S, 8], %cos: {dtype}[1, 1, S, 3],
             %bias: {dtype}[1, 4, 1, S]) -> ({dtype}[B, S, 12], {dtype}[B, 4, S, 8]) {{
  dim B = 2 in 1..
  dim S = 6 in 1..
  inputs ((*, *, *, *, *), {{}})
  outputs (*, *)

  %norm: {dtype}[B, S, 12] = irc.rms_norm(%x, None, 1e-05)
  %r: {dtype}[B, 4, S, 8] = irc.rope(%q, %cos, %cos, interleaved=True)
  %a: {dtype}[B, 4, S, 8] = irc.attention(%r, %k, %k, mask="sliding", window=3, scale=0.4, softcap=2.0)
  %b: {dtype}[B, 4, S, 8] = irc.attention(%a, %k, %k, bias=%bias, mask="causal", scale=0.3)
  %c: {dtype}[B, 4, S, 8] = irc.attention(%b, %k, %k, mask="chunked", window=2, scale=0.3)
  return %norm, %c
}}
"""


def program(dtype: str = "f32") -> Program:
    made = parse(TEXT.format(dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    made.example_inputs = tuple(
        torch.randn(shape, generator=generator).to(torch.float32 if dtype == "f32" else torch.float16)
        for shape in ((2, 6, 12), (2, 4, 6, 8), (2, 2, 6, 8), (1, 1, 6, 3), (1, 4, 1, 6))
    )
    return made


def test_operators_of_the_current_standard() -> None:
    artifact = get_target("onnx").lower(program())
    kinds = Counter(node.op_type for node in onnx.load(artifact.path).graph.node)
    assert (kinds["Attention"], kinds["RMSNormalization"], kinds["RotaryEmbedding"]) == (3, 1, 1)
    assert kinds["Softmax"] == kinds["MatMul"] == 0
    check = artifact.verify(program())
    assert check.passed, str(check)
    assert len(check.runs) == 6


def test_older_opsets_have_none_of_them() -> None:
    artifact = get_target("onnx").lower(program(), {"opset": 20})
    model = onnx.load(artifact.path)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert {o.domain: o.version for o in model.opset_import} == {"": 20}
    assert not kinds.keys() & {"Attention", "RMSNormalization", "RotaryEmbedding"}
    check = artifact.verify(program())
    assert check.passed, str(check)


def reasons(made: Program, setting: Setting) -> dict[str, str]:
    return {node.name: find_translation(setting, made, node)[1] for node in made.operations()}


def test_what_a_registration_cannot_take_has_a_reason() -> None:
    assert set(reasons(program(), Setting("portable", 24)).values()) == {""}
    assert reasons(program(), Setting("portable", 22))["norm"] == "RMSNormalization needs opset 23, this is 22"
    half = reasons(program("f16"), Setting("portable", 24))
    assert half["norm"] == "RMSNormalization is used for f32 only"
    assert half["r"].startswith("RotaryEmbedding is used for f32 only")
    assert half["c"].startswith("Attention is used for f32 only")
    step = reasons(steps.step(), Setting("portable", 23))
    assert step["cache_write"] == "TensorScatter needs opset 24, this is 23"


def test_no_kernel_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "_kernels", dict)
    assert installed.newest_opset() == 21
    assert "has no kernel for Attention of opset 24" in reasons(program(), Setting("portable", 24))["c"]


def test_reports_name_what_falls_back() -> None:
    coverage = get_target("onnx").check(steps.step())
    assert coverage.supported["irc.attention"] == 1
    assert [str(c) for c in coverage.fallbacks] == ["irc.glu × 1: written in several operators"]


def test_one_registration_an_operation() -> None:
    with pytest.raises(ValueError, match="translated to Attention twice"):
        translates("attention", "Attention", why_not=lambda *_: None)(lambda *_: None)


def test_positions_must_count_up_where_the_operator_counts() -> None:
    made = steps.step()
    artifact = get_target("onnx").lower(made)
    cache = artifact.new_caches(1)
    tokens = torch.tensor([[3, 4]])
    artifact.run(tokens, torch.tensor([[5, 6]]), torch.tensor([[1]]), *cache)
    with pytest.raises(TargetError, match=r"count up by one in each row; got \[\[6, 5\]\]"):
        artifact.run(tokens, torch.tensor([[6, 5]]), torch.tensor([[1]]), *cache)


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(OptionError, match=r"no execution provider 'cudda'.*cuda"):
        installed.providers(["cudda"])
    with pytest.raises(OptionError, match="flavour must be one of portable, ort, not 'tpu'"):
        get_target("onnx").lower(steps.cnn(), {"flavour": "tpu"})
