"""`irc.from_onnx`: files become programs that compute the same; damaged and hostile ones are errors that say why."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import irc
from irc.core.errors import CaptureError, IrcError, StorageError
from irc.core.manager import PassManager
from irc.core.program import Program
from irc.core.target import get_target
from irc.frontend.onnx.calls import find_operator, known_operators, operator
from tests.lowering import steps

QUANTIZED = "quantize-weights{bits=4,group-size=16},insert-kv-cache{max-length=32}"


def ops(program: Program) -> Counter[str]:
    return Counter(str(node.target).removesuffix(".default") for node in program.operations())


def model(
    nodes: list[Any], inputs: dict[str, list[Any]], outputs: list[str], weights: dict[str, Any], **more: Any
) -> Any:
    inputs_of = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name == "ids" else TensorProto.FLOAT, shape)
        for name, shape in inputs.items()
    ]
    graph = helper.make_graph(
        nodes, "g",
        inputs_of,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, **more)


def saved(tmp_path: Path, made: Any) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# ------------------------------------------------------------------ what comes back


def test_a_quantized_step_comes_back_whole() -> None:
    program = steps.step(QUANTIZED)
    artifact = get_target("onnx").lower(program)
    read = irc.from_onnx(artifact.path)
    assert read.input_names == program.input_names
    assert list(read.dims) == ["B", "S", "R"]
    assert (read.aliases, read.metadata["kv_cache"]) == (program.aliases, program.metadata["kv_cache"])
    found = ops(read)
    assert (found["irc.attention"], found["irc.rope"], found["irc.rms_norm"], found["irc.glu"]) == (1, 2, 3, 1)
    assert (found["irc.dequantize"], found["aten.linear"]) == (8, 8)
    name = next(n for n in read.weights if "q_proj" in n and "integers" in n)
    stored = next(t for n, t in program.weights.items() if "q_proj" in n and n.endswith("stored"))
    assert torch.equal(read.weight(name), stored)
    inputs = program.example_inputs
    assert inputs is not None
    for ours, theirs in zip(program.run(*inputs), read.run(*inputs), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def small_network() -> Any:
    nodes = [
        helper.make_node("Conv", ["x", "k", "kb"], ["c"], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
        helper.make_node("Clip", ["n", "zero", "six"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["p"], ["a"]),
        helper.make_node("Flatten", ["a"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "wb"], ["y"], transB=1),
    ]
    weights = {
        "k": weight(4, 3, 3, 3), "kb": weight(4), "s": weight(4), "b": weight(4), "m": weight(4),
        "v": np.abs(weight(4)), "zero": np.float32(0), "six": np.float32(6), "w": weight(5, 4), "wb": weight(5),
    }  # fmt: skip
    return model(nodes, {"x": ["batch", 3, 8, 8]}, ["y"], {k: np.asarray(v) for k, v in weights.items()})


def against_runtime(path: Path, program: Program, *inputs: torch.Tensor) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)}
    for theirs, ours in zip(session.run(None, feeds), program.run(*inputs), strict=True):
        assert np.allclose(theirs, ours.numpy(), atol=1e-5 * max(1, np.abs(theirs).max()))


def test_a_convolutional_network_and_passes_on_it(tmp_path: Path) -> None:
    path = saved(tmp_path, small_network())
    program = irc.from_onnx(path)
    assert list(program.dims) == ["batch"]
    for batch in (1, 3):
        against_runtime(path, program, torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch)))
    folded = PassManager("fold-conv-batch-norm,quantize-weights{bits=8,group-size=none}").run(program).program
    assert ops(folded)["irc.dequantize"] >= 1
    assert "aten.batch_norm" not in ops(folded)


def test_shape_arithmetic_as_exporters_write_it(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Shape", ["e"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"]),
        helper.make_node("Slice", ["shape", "one", "two"], ["length"]),
        helper.make_node("Unsqueeze", ["batch", "axis"], ["batch1"]),
        helper.make_node("Concat", ["batch1", "length", "heads"], ["split"], axis=0),
        helper.make_node("Reshape", ["e", "split"], ["h"]),
        helper.make_node("Transpose", ["h"], ["t"], perm=[0, 2, 1, 3]),
        helper.make_node("Mul", ["t", "half"], ["m"]),
        helper.make_node("Softmax", ["m"], ["p"], axis=-1),
        helper.make_node("ReduceMean", ["p", "axis1"], ["y"], keepdims=0),
    ]

    def number(*values: int) -> np.ndarray:
        return np.array(values, dtype=np.int64)

    weights = {
        "table": weight(10, 8), "zero": np.array(0, np.int64), "one": number(1), "two": number(2), "axis": number(0),
        "heads": number(2, -1), "half": np.array(0.5, np.float32), "axis1": number(1),
    }  # fmt: skip
    path = saved(tmp_path, model(nodes, {"ids": ["B", "S"]}, ["y"], weights))
    program = irc.from_onnx(path)
    assert program.type_text(program.outputs[0]) == "f32[B, S, 4]"
    for shape in ((1, 1), (3, 7)):
        against_runtime(path, program, torch.randint(0, 10, shape))


def test_channels_of_quantized_kernels_stay_integers(tmp_path: Path) -> None:
    integers = np.random.default_rng(1).integers(-127, 127, (4, 3, 3, 3)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["k"], axis=0),
        helper.make_node("Conv", ["x", "k"], ["y"]),
    ]
    scale = np.abs(weight(4))
    path = saved(tmp_path, model(nodes, {"x": ["B", 3, 8, 8]}, ["y"], {"q": integers, "s": scale}))
    program = irc.from_onnx(path)
    (node,) = [n for n in program.operations() if str(n.target) == "irc.dequantize.default"]
    assert node.kwargs["format"] == "int8.row"
    against_runtime(path, program, torch.randn(2, 3, 8, 8))


# ------------------------------------------------------------------ what is refused


def test_unknown_operators_are_listed_all_at_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["a"]),
        helper.make_node("NonZero", ["x"], ["b"]),
        helper.make_node("Wizardry", ["x"], ["y"], domain="com.example"),
    ]
    path = saved(tmp_path, model(nodes, {"x": ["B", 3]}, ["y"], {}))
    with pytest.raises(CaptureError, match=r"does not read: NonZero × 2, com.example::Wizardry × 1"):
        irc.from_onnx(path)


def test_a_shape_that_depends_on_values_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["ids"], ["n"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["x", "n"], ["y"]),
    ]
    path = saved(tmp_path, model(nodes, {"x": ["B", 4], "ids": [2]}, ["y"], {}))
    with pytest.raises(CaptureError, match=r"Reshape 'y': its input 1 is computed from values at run time"):
        irc.from_onnx(path)


def test_no_file_no_model(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        irc.from_onnx(tmp_path / "nothing.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"\x08\x99not a model at all" * 50)
    with pytest.raises(StorageError, match="is no ONNX file, or is damaged"):
        irc.from_onnx(tmp_path / "noise.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(StorageError, match="holds no graph"):
        irc.from_onnx(tmp_path / "empty.onnx")


def test_truncated_anywhere_is_an_error(tmp_path: Path) -> None:
    whole = small_network().SerializeToString()
    for length in [*range(1, len(whole) - 40, 61), len(whole) - 1]:
        path = tmp_path / "cut.onnx"
        path.write_bytes(whole[:length])
        with pytest.raises(IrcError):
            irc.from_onnx(path)


def relu(source: str, result: str) -> Any:
    return helper.make_node("Relu", [source], [result])


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([relu("b", "a"), relu("a", "b"), relu("b", "y")], "uses 'b' before anything computes it"),
        ([relu("y", "y")], "uses 'y' before anything computes it"),
        ([relu("x", "y"), relu("x", "y")], "two values are called 'y'"),
        ([relu("x", "z")], "output 'y' is computed by nothing"),
    ],
    ids=["cycle", "self", "twice", "missing"],
)
def test_graphs_that_cannot_be_computed(tmp_path: Path, nodes: list[Any], message: str) -> None:
    with pytest.raises(StorageError, match=message):
        irc.from_onnx(saved(tmp_path, model(nodes, {"x": [2]}, ["y"], {})))


def with_tensor(tmp_path: Path, **external: str) -> Path:
    made = model([helper.make_node("Add", ["x", "w"], ["y"])], {"x": [64]}, ["y"], {"w": weight(64)})
    tensor = made.graph.initializer[0]
    if external:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in external.items():
            tensor.external_data.add(key=key, value=value)
    return saved(tmp_path, made)


def test_external_data_is_read(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0" * 16 + weight(64).tobytes())
    path = with_tensor(tmp_path, location="w.bin", offset="16", length="256")
    against_runtime(path, irc.from_onnx(path), torch.randn(64))


@pytest.mark.parametrize(
    ("external", "message"),
    [
        ({"location": "../secret.bin"}, "is no place below the model's folder"),
        ({"location": "/etc/passwd"}, "is no place below the model's folder"),
        ({"location": ""}, "is no place below the model's folder"),
        ({"location": "link.bin"}, "is no file below the model's folder"),
        ({"location": "gone.bin"}, "is no file below the model's folder"),
        ({"location": "w.bin", "offset": "200"}, "bytes 200 to 456 of w.bin, which has 256"),
        ({"location": "w.bin", "offset": "-8"}, "bytes -8 to 248"),
        ({"location": "w.bin", "offset": str(1 << 70)}, "which has 256"),
        ({"location": "w.bin", "length": "12"}, "its shape needs 256"),
        ({"location": "w.bin", "offset": "many"}, "must be numbers"),
    ],
)
def test_external_data_outside_its_place(tmp_path: Path, external: dict[str, str], message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"\0" * 256)
    (folder / "w.bin").write_bytes(b"\0" * 256)
    os.symlink(tmp_path / "secret.bin", folder / "link.bin")
    with pytest.raises(StorageError, match=message):
        irc.from_onnx(with_tensor(folder, **external))


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ([1 << 40, 1 << 20], r"would take [\d,]+ bytes"),
        ([-1], "impossible shape"),
        ([65], "needs 260 bytes and has 256"),
        ([1] * 40, "impossible shape"),
    ],
)
def test_counts_that_cannot_be(tmp_path: Path, dims: list[int], message: str) -> None:
    made = model([helper.make_node("Add", ["x", "w"], ["y"])], {"x": [64]}, ["y"], {"w": weight(64)})
    del made.graph.initializer[0].dims[:]
    made.graph.initializer[0].dims.extend(dims)
    with pytest.raises(StorageError, match=message):
        irc.from_onnx(saved(tmp_path, made))


def test_metadata_about_a_cache_that_is_not_there(tmp_path: Path) -> None:
    made = model([relu("x", "y")], {"x": [2]}, ["y"], {})
    cache = {
        "max_length": 8,
        "layout": "contiguous",
        "caches": [{"name": "k", "heads": 1, "head_dim": 2, "dtype": "f32"}],
    }
    made.metadata_props.add(key="irc.metadata", value=str({"kv_cache": cache}).replace("'", '"'))
    with pytest.raises(StorageError, match="describes a cache that the graph does not have"):
        irc.from_onnx(saved(tmp_path, made))


def test_one_function_an_operator() -> None:
    with pytest.raises(ValueError, match="Relu is registered twice"):
        operator("Relu")(lambda call: call.tensor(0))
    assert find_operator("ai.onnx", "Relu") is not None
    assert {"Conv", "Attention", "com.microsoft::MatMulNBits"} <= set(known_operators())


def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    path = saved(tmp_path, model([relu("x", "y")], {"x": ["N"]}, ["y"], {}))
    with pytest.raises(CaptureError, match="takes 1 inputs"):
        irc.from_onnx(path, example_inputs=())
    assert onnx.load(path).graph.name == irc.from_onnx(path).name == "g"
