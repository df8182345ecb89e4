"""ONNX Runtime's own operators read back: what irc and onnxruntime-genai write comes back and computes the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import irc
from irc.core.program import Program
from irc.core.target import get_target
from irc.lowering.onnx.export import quiet
from tests.lowering import steps

QUANTIZED = "quantize-weights{bits=4,group-size=16},insert-kv-cache{max-length=32}"


def ops(program: Program) -> Counter[str]:
    return Counter(str(node.target).removesuffix(".default") for node in program.operations())


def test_the_ort_flavour_comes_back() -> None:
    program = steps.step(QUANTIZED)
    artifact = get_target("onnx").lower(program, {"flavour": "ort"})
    kinds = Counter(node.op_type for node in onnx.load(artifact.path).graph.node)
    assert kinds["GroupQueryAttention"] == 1
    assert kinds["MatMulNBits"] == 8
    read = irc.from_onnx(artifact.path)
    assert read.input_names == program.input_names
    assert read.metadata["kv_cache"] == program.metadata["kv_cache"]
    found = ops(read)
    assert [found[f"irc.{name}"] for name in ("attention", "cache_write", "rms_norm", "dequantize")] == [1, 2, 3, 8]
    stored = {str(node.kwargs["format"]) for node in read.operations() if "dequantize" in str(node.target)}
    assert stored == {"int4.g16"}
    inputs = program.example_inputs
    assert inputs is not None
    for ours, theirs in zip(program.run(*inputs), read.run(*inputs), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_genai_folder_comes_back(tmp_path: Path) -> None:
    folder = get_target("onnx-genai").lower(steps.step(QUANTIZED)).save(tmp_path / "genai")
    read = irc.from_onnx(folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    generator = torch.Generator().manual_seed(0)
    for batch, past, new in ((1, 0, 4), (2, 3, 1), (3, 6, 5)):
        caches = [torch.randn(batch, 4, past, 8, generator=generator) for _ in range(2)]
        feeds = [steps.tokens(batch, new), torch.ones(batch, past + new, dtype=torch.int64), *caches]
        names = [value.name for value in session.get_inputs()]
        expected = session.run(None, dict(zip(names, (t.numpy() for t in feeds), strict=True)))
        for ours, theirs in zip(read.run(*feeds), expected, strict=True):
            assert torch.allclose(ours, torch.from_numpy(theirs), atol=2e-5)


def one_node(op: str, inputs: dict[str, np.ndarray], outputs: int, weights: dict[str, np.ndarray], **attributes: Any):
    """A model of one operator over inputs and then weights, all sizes as given."""
    node = helper.make_node(
        op, [*inputs, *weights], [f"y{i}" for i in range(outputs)], domain="com.microsoft", **attributes
    )
    kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in inputs.items()}
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info(n, kinds[n], list(v.shape)) for n, v in inputs.items()],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(outputs)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def table() -> dict[str, np.ndarray]:
    angles = np.outer(np.arange(16), 100.0 ** -(np.arange(4) / 4)).astype(np.float32)
    return {"cos": np.cos(angles), "sin": np.sin(angles)}


CASES: dict[str, tuple[str, dict[str, np.ndarray], int, dict[str, np.ndarray], dict[str, Any]]] = {
    "skip norm": (
        "SkipLayerNormalization", {"x": normal(2, 3, 8), "r": normal(2, 3, 8)}, 1,
        {"g": normal(8), "b": normal(8) * 2, "c": normal(8) * 3}, {"epsilon": 1e-5},
    ),
    "rotary, flat": (
        "RotaryEmbedding", {"x": normal(2, 3, 16), "p": np.array([[3, 4, 5], [0, 1, 2]])}, 1, table(),
        {"num_heads": 2},
    ),
    "rotary, offset": (
        "RotaryEmbedding", {"x": normal(2, 2, 3, 8), "p": np.array([4])}, 1, table(), {"interleaved": 1},
    ),
    "table, centred": (
        "GatherBlockQuantized", {}, 1,
        {"t": np.arange(96, dtype=np.uint8).reshape(6, 16) * 2, "i": np.array([[1, 5], [0, 2]]), "s": normal(6, 2)},
        {"bits": 4, "block_size": 16, "quantize_axis": 1},
    ),
    "table, with zero points": (
        "GatherBlockQuantized", {}, 1,
        {"t": np.arange(96, dtype=np.uint8).reshape(6, 16) * 2, "i": np.array([[1, 5], [0, 2]]), "s": normal(6, 2),
         "z": np.arange(6, dtype=np.uint8).reshape(6, 1) * 30},
        {"bits": 4, "block_size": 16, "quantize_axis": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_operator_computes_what_the_runtime_does(case: str, tmp_path: Path) -> None:
    op, inputs, outputs, weights, attributes = CASES[case]
    if not inputs:
        inputs, weights = {"i": weights["i"]}, {name: value for name, value in weights.items() if name != "i"}
        made = one_node(op, inputs, outputs, weights, **attributes)
        made.graph.node[0].input[:] = ["t", "i", *[name for name in weights if name != "t"]]
    else:
        made = one_node(op, inputs, outputs, weights, **attributes)
    path = tmp_path / "model.onnx"
    path.write_bytes(made.SerializeToString())
    expected = onnxruntime.InferenceSession(str(path)).run(None, inputs)
    read = irc.from_onnx(path, example_inputs=tuple(torch.from_numpy(value) for value in inputs.values()))
    found = read.run(*(torch.from_numpy(value) for value in inputs.values()))
    assert torch.allclose(found[0], torch.from_numpy(expected[0]), atol=1e-5)


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def test_a_bert_of_transformers_comes_back(tmp_path: Path) -> None:
    model, path = bert(), tmp_path / "bert.onnx"
    names = ("input_ids", "attention_mask", "token_type_ids")
    example = (steps.tokens(2, 7), torch.ones(2, 7, dtype=torch.int64), torch.zeros(2, 7, dtype=torch.int64))
    with quiet():
        torch.onnx.export(
            model, example, path, dynamo=True, input_names=list(names), external_data=False,
            dynamic_shapes={name: {0: "batch", 1: "length"} for name in names},
        )  # fmt: skip
    read = irc.from_onnx(path)
    assert read.input_names == list(names)
    found = ops(read)
    assert (found["irc.attention"], found["aten.layer_norm"], found["aten.gelu"], found["aten.linear"]) == (2, 5, 2, 14)
    assert found["aten.add.Tensor"] == 6  # of embeddings and branches: biases belong to the layers
    for batch, length in ((1, 1), (3, 9)):
        ids, mask = steps.tokens(batch, length), torch.ones(batch, length, dtype=torch.int64)
        mask[0, max(1, length - 2) :] = 0
        with torch.no_grad():
            expected = model(ids, mask, torch.zeros_like(ids)).logits
        assert torch.allclose(read.run(ids, mask, torch.zeros_like(ids))[0], expected, atol=1e-5)
