"""Flavour `ort`: contrib operators over the same integers and scales, caches written in place, products of integers."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import irc
from irc.core import formats
from irc.core.calibration import CalibrationData
from irc.core.contract import PassContext
from irc.core.manager import PassManager
from irc.core.program import Program
from irc.core.target import Artifact, get_target
from irc.lowering.onnx.fusing import Match, fusions
from irc.lowering.onnx.fusions.matmul_nbits import pack
from irc.lowering.onnx.options import OnnxOptions
from irc.lowering.onnx.registry import Setting
from tests.lowering import steps

ONNX = get_target("onnx")
ORT = {"flavour": "ort"}
QUANTIZED = "quantize-weights{bits=4,group-size=16,symmetric=false},insert-kv-cache{max-length=32}"


@functools.cache
def lowered() -> Artifact:
    return ONNX.lower(steps.step(QUANTIZED), ORT)


def graph_of(artifact: Any) -> onnx.GraphProto:
    return onnx.load(artifact.path).graph


def kinds(artifact: Any) -> Counter[str]:
    return Counter(node.op_type for node in graph_of(artifact).node)


def weights(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


def test_contrib_operators_and_the_same_numbers() -> None:
    found = kinds(lowered())
    assert (found["GroupQueryAttention"], found["MatMulNBits"]) == (1, 8)
    assert found["SkipSimplifiedLayerNormalization"] == 2
    assert found["DequantizeLinear"] == found["TensorScatter"] == found["MatMul"] == 0
    check = lowered().verify(steps.step(QUANTIZED))
    assert check.passed, str(check)
    assert len(check.runs) == 6


def test_integers_scales_and_zero_points_are_those_of_the_program() -> None:
    program, found = steps.step(QUANTIZED), weights(graph_of(lowered()))
    name = next(n for n in program.weights if "q_proj" in n and n.endswith("_stored"))
    base, chosen = name.removesuffix("_stored"), formats.parse("uint4.g16.asym")
    assert isinstance(chosen, formats.QuantFormat)
    assert np.array_equal(found[f"{base}_scales"], program.weight(f"{base}_scale").numpy())
    nibbles = found[f"{base}_blocks"].reshape(32, -1)
    integers = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(32, 32)
    assert np.array_equal(integers, chosen.unpack(program.weight(name)).numpy())
    zeros = found[f"{base}_zero_points"]
    zeros = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(32, -1)[:, :2]
    assert np.array_equal(zeros, program.weight(f"{base}_zero_point").numpy())


@pytest.mark.parametrize(
    "text", ["int4.g32", "int4.row.asym", "uint4.g16", "int8.tensor", "uint8.g32.asym", "int3.g16", "int2.g32.asym"]
)
def test_packing_loses_nothing(text: str) -> None:
    chosen = formats.parse(text)
    assert isinstance(chosen, formats.QuantFormat)
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    parts = formats.quantize_tensor(x, chosen)
    packed = pack(chosen, parts.stored, parts.scale, parts.zero_point)
    per_byte = 8 // packed.bits
    shifts = torch.arange(per_byte) * packed.bits

    def spread(t: torch.Tensor) -> torch.Tensor:
        return ((t.unsqueeze(-1) >> shifts) & (2**packed.bits - 1)).flatten(-2).float()

    values = spread(packed.blocks.int())
    blocks = values.shape[1]
    zeros = torch.full((6, blocks), float(1 << (packed.bits - 1)))
    if packed.zero_points is not None:
        zeros = spread(packed.zero_points.int())[:, :blocks]
    restored = ((values - zeros.unsqueeze(-1)) * packed.scales.unsqueeze(-1)).flatten(1)
    assert torch.equal(restored, formats.dequantize_tensor(parts, chosen))


def test_steps_write_the_caches_in_place() -> None:
    program, artifact = steps.step(QUANTIZED), lowered()
    caches = artifact.new_caches(2)
    memory, expected = [cache.data_ptr() for cache in caches], [cache.clone() for cache in caches]
    zero = torch.zeros(2, 1, dtype=torch.int64)
    for tokens, positions in (
        (torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0, 1, 2], [0, 1, 2]])),
        (torch.tensor([[7], [8]]), torch.tensor([[3], [2]])),
        (torch.tensor([[9, 10], [11, 12]]), torch.tensor([[4, 5], [3, 4]])),
    ):
        logits = artifact.step(caches, tokens, positions, zero)
        wanted, *expected = program.run(tokens, positions, zero, *expected)
        assert torch.allclose(logits, wanted, atol=1e-4)
        assert [cache.data_ptr() for cache in caches] == memory
        for cache, other in zip(caches, expected, strict=True):
            assert torch.allclose(cache, other, atol=1e-5)


def test_generation_is_that_of_the_reference() -> None:
    options = {"example_inputs": steps.tokens(), "dynamic": ({0: "B", 1: "S"},), "verify": "off"}
    texts = [
        irc.compile(steps.language_model(), "insert-kv-cache{max-length=32}", target=target, options=chosen, **options)
        .generate(steps.PROMPTS, max_new_tokens=8)
        .token_ids
        for target, chosen in (("onnx", ORT), ("reference", None))
    ]
    assert texts[0] == texts[1]


def lossy(passes: str, program: Program, data: Any) -> Program:
    context = PassContext(options={"calibration": CalibrationData.of(data)})
    return PassManager(passes, ctx=context, verify="off").run(program).program


def test_integer_convolution_and_product() -> None:
    images = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    program = lossy(
        "fold-conv-batch-norm,quantize-weights{bits=8,group-size=none,include-convolutions=true},"
        "quantize-activations{mode=static}", steps.cnn(), images,
    )  # fmt: skip
    artifact = ONNX.lower(program, ORT | {"integers": "qoperator"})
    found = kinds(artifact)
    assert (found["ConvInteger"], found["MatMulInteger"], found["QuantizeLinear"]) == (1, 1, 2)
    assert found["Conv"] == found["Gemm"] == found["DequantizeLinear"] == 0
    check = artifact.verify(program)
    assert check.passed, str(check)
    assert check.relative < 1e-5
    stored = weights(graph_of(artifact))
    kernel = program.weight("0.folded.weight_stored").numpy()
    assert np.array_equal(stored["0.folded.weight_integers"].reshape(8, 27).astype(np.int16) - 128, kernel)
    assert np.array_equal(stored["0.folded.weight_scales"].ravel(), program.weight("0.folded.weight_scale").flatten())


def test_scales_of_tokens_multiply_integers() -> None:
    program = lossy(
        "quantize-weights{bits=8,group-size=none},quantize-activations{mode=dynamic,include-attention=false}",
        steps.decoder(), [steps.tokens()],
    )  # fmt: skip
    artifact = ONNX.lower(program, ORT)
    assert kinds(artifact)["MatMulInteger"] == 8
    check = artifact.verify(program)
    assert check.passed, str(check)
    assert check.relative < 1e-5  # far below a step of the format: the integers are the same


def test_groups_of_8_bit_integers() -> None:
    """Both ways to write them: blocks of DequantizeLinear, which the runtime rewrites, and MatMulNBits."""
    passes = "quantize-weights{bits=8,group-size=16}"
    program = PassManager(passes, verify="off").run(steps.decoder()).program
    for options in ({}, ORT):
        check = ONNX.lower(program, options).verify(program)
        assert check.passed, str(check)
        assert check.relative < 1e-5


def reasons(program: Program, setting: Setting) -> dict[str, set[str]]:
    return {
        fusion.onnx_op: {found.reason for found in fusion.find(setting, program) if not isinstance(found, Match)}
        for fusion in fusions(setting)
    }


def test_what_cannot_be_fused_has_a_reason() -> None:
    setting = Setting("ort", 24)
    odd = reasons(
        steps.step("quantize-weights{format=int4.g8,indivisible=pad},insert-kv-cache{max-length=32}"), setting
    )
    assert odd["MatMulNBits"] == {"MatMulNBits: no block of a power of two from 16 on divides groups of int4.g8"}
    other = reasons(steps.step("quantize-weights{format=f8e4m3.row},insert-kv-cache{max-length=32}"), setting)
    assert other["MatMulNBits"] == {"MatMulNBits: f8e4m3.row is no format of integers"}
    cached = "insert-kv-cache{max-length=32},quantize-kv-cache"
    assert reasons(steps.step(cached), setting)["GroupQueryAttention"] == {
        "GroupQueryAttention: its keys or values come from no cache"
    }
    assert fusions(Setting("portable", 24)) == [f for f in fusions(setting) if "portable" in f.flavours]


def test_the_report_counts_fused_operators() -> None:
    coverage = ONNX.coverage(steps.step(QUANTIZED), OnnxOptions(flavour="ort"))
    assert coverage.supported["MatMulNBits"] == 8
    assert coverage.supported["GroupQueryAttention"] == 1
    assert "irc.attention" not in coverage.supported


def test_only_the_rows_looked_up_are_dequantized() -> None:
    passes = "quantize-weights{bits=4,group-size=16,include-embeddings=true},insert-kv-cache{max-length=32}"
    artifact = ONNX.lower(steps.step(passes), ORT)
    found = kinds(artifact)
    assert (found["GatherBlockQuantized"], found["DequantizeLinear"]) == (1, 0)
    check = artifact.verify(steps.step(passes))
    assert check.passed, str(check)
