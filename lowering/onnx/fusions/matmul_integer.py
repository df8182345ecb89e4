"""Layers over quantized values and quantized weights → products of integers (`MatMulInteger`, `ConvInteger`).

    linear(dequantize(q, s, z), dequantize(w, t)) + b  =  (q - z) · (w - y)ᵀ · s · t + b

Used for activations with a scale a token, which ONNX Runtime does not multiply as integers by itself, and with
`integers="qoperator"` for all. Weights become unsigned, with 128 added to integers and zero points: with signed ones,
ONNX Runtime's kernels for processors without VNNI saturate sums of two products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.contract import Skip
from irc.core.operands import input_node
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.lowering.onnx import installed
from irc.lowering.onnx.fusing import Match, is_reshape, register_fusion, weight_of
from irc.lowering.onnx.registry import Setting, bound, emit

_OFFSET = 128
aten = torch.ops.aten
_LAYERS = {"MatMulInteger": aten.linear.default, "ConvInteger": aten.conv2d.default}


def _find(onnx_op: str, setting: Setting, program: Program) -> Iterator[Match | Skip]:
    for node in program.operations():
        if node.target is not _LAYERS[onnx_op]:
            continue
        value, weight = input_node(node), input_node(node, 1)
        stored = input_node(weight) if is_reshape(weight) else weight
        if not all(is_irc_op(getattr(n, "target", None), "dequantize") for n in (value, stored)):
            continue
        reason = _why_not(onnx_op, setting, program, node, value, stored)
        if reason is not None:
            yield Skip.at(node, f"{onnx_op}: {reason}")
            continue
        yield Match(node, {"value": value, "weight": stored}, (node, stored))


def _why_not(
    onnx_op: str, setting: Setting, program: Program, node: fx.Node, value: fx.Node, weight: fx.Node
) -> str | None:
    of_value = formats.parse(str(value.kwargs["format"]))
    for chosen in (of_value, formats.parse(str(weight.kwargs["format"]))):
        if not isinstance(chosen, formats.QuantFormat) or chosen.packs_two:
            return f"{chosen} is no integer of a byte"
        if chosen.group_size is not None:
            return f"{chosen} has several scales within a product"
    assert isinstance(of_value, formats.QuantFormat)
    if any(weight_of(program, part) is None for part in weight.args[:2]):
        return "its weight is computed"
    if {n.meta[VAL].dtype for n in (value, weight, node)} != {torch.float32}:
        return "is used for f32 only"
    if of_value.per_tensor and setting.integers != "qoperator":
        return "ONNX Runtime fuses it by itself"
    if onnx_op == "ConvInteger":
        if not of_value.per_tensor or of_value.signed:
            return "takes unsigned values with one scale"
        if any(isinstance(a, str) for a in node.args):
            return "its padding is a name"
    elif len(value.args) > 2 and value.args[2] is not None and not of_value.per_tensor:
        return "takes one zero point for all values"
    if not installed.has_kernel(onnx_op, "", setting.opset):
        return "this ONNX Runtime has no kernel for it"
    return None


def _write(onnx_op: str, setting: Setting, program: Program, match: Match) -> None:
    """Edits the program: the layer calls the product of integers."""
    node, value, weight = match.root, match.parts["value"], match.parts["weight"]
    stored, scale, zero_point = (weight_of(program, part) for part in (*weight.args, None)[:3])
    assert stored is not None
    assert scale is not None
    offset = 0 if stored.dtype == torch.uint8 else _OFFSET
    integers = (stored.to(torch.int16) + offset).to(torch.uint8)
    num_rows = integers.shape[0]
    zeros = torch.zeros(1, dtype=torch.int16) if zero_point is None else zero_point.flatten().to(torch.int16)
    zeros = (zeros + offset).to(torch.uint8)
    scales = scale.flatten().expand(num_rows).contiguous()
    if onnx_op == "ConvInteger":
        integers = integers.reshape(tuple(node.args[1].meta[VAL].shape))
        scales = scales.reshape(-1, *[1] * (integers.dim() - 2))
    else:
        integers = integers.t()
    name = str(weight.args[0].target).removesuffix("_stored")
    parts = {
        "integers": integers.contiguous(),
        "scales": scales,
        "zeros": zeros if len(zeros) > 1 else zeros.reshape(()),
    }
    tensors = [program.weight_node(f"{name}_{part}", tensor, before=node) for part, tensor in parts.items()]
    rest = list(node.args[2:])
    for argument in ("bias", "stride", "padding", "dilation", "groups"):
        if argument in node.kwargs:
            rest.append(node.kwargs[argument])
    zero_of_value = value.args[2] if len(value.args) > 2 else None
    node.target = bound(setting, _BUILDERS[onnx_op])
    node.args = (value.args[0], value.args[1], zero_of_value, *tensors, *rest)
    node.kwargs = {}


def matmul_integer(
    setting: Setting, q: Tensor, step: Tensor, zero: Tensor | None, w: Tensor, scales: Tensor, zeros: Tensor,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [..., K] times w [K, N], both integers; step is [..., 1] or one number."""
    inputs = (q, w, _scalar(zero, q), zeros)
    product = emit(
        "MatMulInteger", inputs, dtype=torch.int32, shape=(*q.shape[:-1], w.shape[1]), version=setting.opset
    )  # fmt: skip
    result = product.to(step.dtype) * (step.reshape(()) if step.numel() == 1 else step) * scales
    return result if bias is None else result + bias


def conv_integer(
    setting: Setting, q: Tensor, step: Tensor, zero: Tensor | None, w: Tensor, scales: Tensor, zeros: Tensor,
    bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """q [B, C, ...] convolved with w [O, C / groups, ...], both integers; zero points pad."""
    rank = w.dim() - 2
    stride, padding, dilation = (_each(v, rank) for v in (stride, padding, dilation))
    like = torch.nn.functional.conv2d(q.to(step.dtype), w.to(step.dtype), None, stride, padding, dilation, groups)
    attributes = {
        "strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups,
        "kernel_shape": [int(size) for size in w.shape[2:]],
    }  # fmt: skip
    product = emit(
        "ConvInteger", (q, w, _scalar(zero, q), zeros), attributes,
        dtype=torch.int32, shape=like.shape, version=setting.opset,
    )  # fmt: skip
    result = product.to(step.dtype) * step.reshape(()) * scales
    return result if bias is None else result + bias.reshape(-1, *[1] * rank)


def _each(value: Any, rank: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in (values * rank if len(values) == 1 else values)]


def _scalar(zero: Tensor | None, q: Tensor) -> Tensor:
    return torch.zeros((), dtype=q.dtype) if zero is None else zero.reshape(())


_BUILDERS = {"MatMulInteger": matmul_integer, "ConvInteger": conv_integer}


def _register(onnx_op: str) -> None:
    register_fusion(
        onnx_op,
        lambda setting, program: _find(onnx_op, setting, program),
        lambda setting, program, match: _write(onnx_op, setting, program, match),
        order=10,
    )


for _op in _LAYERS:
    _register(_op)
