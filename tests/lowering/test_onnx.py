"""The ONNX target, held against ONNX Runtime: names, sizes, quantized weights, metadata."""

from __future__ import annotations

import functools
from collections import Counter

import onnx
import pytest
import torch
from onnx import TensorProto

from irc.core import formats
from irc.core.errors import OptionError, StorageError, TargetError
from irc.core.program import Program
from irc.core.target import Artifact, get_target
from irc.lowering.onnx.installed import newest_opset
from tests.lowering import steps

ONNX = get_target("onnx")
QUANTIZED = "quantize-weights{bits=4,group-size=16},insert-kv-cache{max-length=32}"


def quantized_step() -> Program:
    return steps.step(QUANTIZED)


PROGRAMS = {"decoder": steps.decoder, "quantized step": quantized_step, "cnn": steps.cnn}


@functools.cache
def lowered(name: str) -> Artifact:
    return ONNX.lower(PROGRAMS[name]())


@pytest.mark.parametrize("name", PROGRAMS)
def test_same_numbers_at_other_sizes(name: str) -> None:
    check = lowered(name).verify(PROGRAMS[name]())
    assert check.passed, str(check)
    assert len(check.runs) == (2 if name == "cnn" else 6)


def test_names_and_sizes_are_kept() -> None:
    graph = onnx.load(lowered("quantized step").path).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes["input_ids"] == shapes["positions"] == ["B", "S"]
    assert shapes["cache_k_0"] == shapes["new_cache_k_0"] == ["B", 4, 32, 8]
    assert shapes["logit_indices"][1] == shapes["logits"][1] == "R"
    assert list(shapes) == [
        "input_ids", "positions", "logit_indices", "cache_k_0", "cache_v_0", "logits", "new_cache_k_0", "new_cache_v_0",
    ]  # fmt: skip


def test_quantized_weights_keep_their_integers() -> None:
    model = onnx.load(lowered("quantized step").path)
    assert Counter(n.op_type for n in model.graph.node)["DequantizeLinear"] == 8
    assert {o.domain: o.version for o in model.opset_import} == {"": newest_opset()}
    program, found = quantized_step(), {i.name: i for i in model.graph.initializer}
    name = next(n for n in program.weights if "q_proj" in n and "stored" in n)
    stored = found[f"{name}.integers"]
    assert stored.data_type == TensorProto.UINT4
    ours = formats.parse("int4.g16").unpack(program.weight(name))
    theirs = torch.from_numpy(onnx.numpy_helper.to_array(stored).astype("int16"))
    assert torch.equal(theirs - 8, ours)
    floats = [i for i in model.graph.initializer if i.data_type == TensorProto.FLOAT and list(i.dims) == [32, 32]]
    assert not floats, "a dequantized copy of a weight was stored"


@pytest.mark.parametrize("text", ["q4_0", "nvfp4", "f8e4m3.row"])
def test_formats_that_onnx_lacks_are_written_as_floats(text: str) -> None:
    program = steps.step(f"quantize-weights{{format={text},indivisible=pad}},insert-kv-cache{{max-length=32}}")
    concerns = [c for c in ONNX.check(program).fallbacks if c.op == "irc.dequantize"]
    assert [(c.count, c.reason) for c in concerns] == [(8, f"weights in {text} are written as floats")]
    check = ONNX.lower(program).verify(program)
    assert check.passed, str(check)


def test_metadata_and_file(tmp_path) -> None:
    written = lowered("quantized step").save(tmp_path / "step.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["step.onnx"]
    onnx.checker.check_model(str(written))
    loaded = ONNX.load(written)
    assert loaded.kv_cache == lowered("quantized step").kv_cache
    assert loaded.metadata["aliases"] == {"1": 3, "2": 4}


def test_wrong_requests() -> None:
    with pytest.raises(OptionError, match="opset must be 18 to 25"):
        ONNX.lower(steps.cnn(), {"opset": 3})
    with pytest.raises(TargetError, match="quantized weights need ONNX opset 21"):
        ONNX.lower(quantized_step(), {"opset": 20})
    with pytest.raises(StorageError, match="does not exist"):
        ONNX.load("nowhere.onnx")


def test_missing_provider_is_said_to_be_missing() -> None:
    with pytest.raises(TargetError, match=r"has no TensorrtExecutionProvider; it has .*CPU"):
        ONNX.load(lowered("cnn").path, {"providers": ["TensorrtExecutionProvider"]})


def test_an_export_that_dies_leaves_nothing(tmp_path, monkeypatch) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("irc.lowering.onnx.artifact.os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        lowered("cnn").save(tmp_path / "cnn.onnx")
    assert list(tmp_path.iterdir()) == []


def test_large_weights_lie_beside_the_model(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("irc.lowering.onnx.artifact._EXTERNAL_BYTES", 100)
    path = lowered("cnn").save(tmp_path / "cnn.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cnn.onnx", "cnn.onnx.data"]
    check = ONNX.load(path).verify(steps.cnn())
    assert check.passed, str(check)
