"""linear(x, dequantize(stored, scale, zero point), bias) → `MatMulNBits` over the same integers and scales.

Integers are stored in 2, 4 or 8 bits, the narrowest that holds the format's; signed ones with half their range added,
which is the zero point that the operator assumes. A block of the operator is the format's group, or a power of two
that divides it: then the group's scale is repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from irc.lowering.onnx.fusing import Match, register_fusion, weight_of
from irc.lowering.onnx.registry import Setting, bound, emit

_OP = "MatMulNBits"
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256
_CONTAINERS = (2, 4, 8)


def find(setting: Setting, program: Program) -> Iterator[Match | Skip]:
    """Linear layers over stored integers."""
    for node in program.operations():
        weight = node.args[1] if node.target is torch.ops.aten.linear.default else None
        if not isinstance(weight, fx.Node) or not is_irc_op(weight.target, "dequantize"):
            continue
        reason = _why_not(setting, program, node, weight)
        if reason is not None:
            yield Skip.at(node, f"{_OP}: {reason}")
            continue
        chosen = formats.parse(str(weight.kwargs["format"]))
        yield Match(node, {"dequantize": weight, "format": chosen}, (node, weight))


def _why_not(setting: Setting, program: Program, node: fx.Node, weight: fx.Node) -> str | None:
    chosen = formats.parse(str(weight.kwargs["format"]))
    x = input_node(node)
    if not isinstance(chosen, formats.QuantFormat):
        return f"{chosen} is no format of integers"
    if any(weight_of(program, part) is None for part in weight.args[:2]):
        return "its integers or scales are computed"
    if is_irc_op(x.target, "dequantize"):
        return "its input is quantized too"
    if x.meta[VAL].dtype != torch.float32 or weight.meta[VAL].dtype != torch.float32:
        return "is used for f32 activations only"
    if block_of(chosen, int(weight.meta[VAL].shape[-1])) is None:
        return f"no block of a power of two from {_SMALLEST_BLOCK} on divides groups of {chosen}"
    if not installed.has_kernel(_OP, installed.CONTRIB, 1):
        return "this ONNX Runtime has no kernel for it"
    return None


def block_of(chosen: formats.QuantFormat, width: int) -> int | None:
    """The operator's block: the largest power of two that divides a group."""
    group = chosen.group_size or width
    block = group & -group
    return None if block < _SMALLEST_BLOCK else min(block, _LARGEST_BLOCK)


def write(setting: Setting, program: Program, match: Match) -> None:
    """Edits the program: the layer calls the operator."""
    node, weight, chosen = match.root, match.parts["dequantize"], match.parts["format"]
    stored, scale, zero_point = (weight_of(program, part) for part in (*weight.args, None, None)[:3])
    assert stored is not None
    assert scale is not None
    packed = pack(chosen, stored, scale, zero_point)
    name = str(weight.args[0].target).removesuffix("_stored")
    tensors = [
        program.weight_node(f"{name}_{part}", tensor, before=node) if tensor is not None else None
        for part, tensor in (("blocks", packed.blocks), ("scales", packed.scales), ("zero_points", packed.zero_points))
    ]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    node.target = bound(setting, matmul_nbits)
    node.args = (node.args[0], *tensors, bias)
    node.kwargs = {"bits": packed.bits, "block_size": packed.block_size}


class Packed:
    """A weight as the operator stores it.

    Shapes: blocks u8[N, K / block, block · bits / 8]; scales f32[N, K / block]; zero_points u8, packed in rows.
    """

    def __init__(self, bits: int, block_size: int, blocks: Tensor, scales: Tensor, zero_points: Tensor | None) -> None:
        self.bits, self.block_size = bits, block_size
        self.blocks, self.scales, self.zero_points = blocks, scales, zero_points


def pack(
    chosen: formats.QuantFormat,
    stored: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    containers: Sequence[int] = _CONTAINERS,
) -> Packed:
    """The same integers and scales, as the operator stores them; `containers`: widths that it has, in bits."""
    num_rows, width = chosen.logical_shape(tuple(stored.shape))
    bits = next(b for b in containers if chosen.bits <= b)
    block = block_of(chosen, width)
    assert block is not None
    offset = 1 << (bits - 1) if chosen.signed else 0
    if chosen.packs_two:  # as the operator stores them
        blocks = stored.reshape(num_rows, width // block, block // 2)
    else:
        raised = (stored.to(torch.int16) + offset).to(torch.uint8)
        blocks = _packed(raised.reshape(num_rows, width // block, block), bits)
    num_blocks = width // block
    zeros = None
    if zero_point is not None:
        zeros = _spread(zero_point.to(torch.int16), num_rows, num_blocks) + offset
    elif not chosen.signed:
        zeros = torch.zeros(num_rows, num_blocks, dtype=torch.int16)
    zero_points = None if zeros is None else _packed(zeros.to(torch.uint8), bits)
    scales = _spread(scale.to(torch.float32), num_rows, num_blocks).contiguous()
    return Packed(bits, block, blocks.contiguous(), scales, zero_points)


def _spread(values: Tensor, num_rows: int, num_blocks: int) -> Tensor:
    """A value a group (or row, or tensor) → one a block."""
    values = values.reshape(-1, values.shape[-1]) if values.numel() > 1 else values.reshape(1, 1)
    return values.repeat_interleave(num_blocks // values.shape[-1], dim=-1).expand(num_rows, num_blocks)


def _packed(values: Tensor, bits: int) -> Tensor:
    """Small integers of the last axis, 8 / bits to a byte, the first in the lowest bits."""
    count = 8 // bits
    if count == 1:
        return values.contiguous()
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % count))
    shifts = torch.arange(count, dtype=torch.uint8) * bits
    grouped = values.unflatten(-1, (-1, count)).to(torch.int32) << shifts.to(torch.int32)
    return grouped.sum(-1).to(torch.uint8)


def matmul_nbits(
    setting: Setting,
    x: Tensor,
    blocks: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    block_size: int,
) -> Tensor:
    """x [..., K] · Wᵀ + bias, W in blocks."""
    num_rows, width = blocks.shape[0], blocks.shape[1] * block_size
    attributes: dict[str, Any] = {"N": num_rows, "K": width, "bits": bits, "block_size": block_size}
    if setting.accuracy_level is not None:
        attributes["accuracy_level"] = setting.accuracy_level
    inputs: list[Tensor | None] = [x, blocks, scales, zero_points, None, bias]
    while inputs[-1] is None:
        inputs.pop()
    return emit(
        f"{installed.CONTRIB}::{_OP}", inputs, attributes, dtype=x.dtype, shape=(*x.shape[:-1], num_rows), version=1
    )


register_fusion(_OP, find, write, order=10)
