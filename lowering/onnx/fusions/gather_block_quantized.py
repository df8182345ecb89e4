"""embedding(dequantize(stored, scale, zero point), ids) → `GatherBlockQuantized`, which dequantizes no other rows.

The bytes are those of `MatMulNBits`, a row of the table after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.contract import Skip
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.lowering.onnx import installed
from irc.lowering.onnx.fusing import Match, register_fusion, weight_of
from irc.lowering.onnx.fusions.matmul_nbits import block_of, pack
from irc.lowering.onnx.registry import Setting, bound, emit

_OP = "GatherBlockQuantized"
_CONTAINERS = (4, 8)  # widths that ONNX Runtime's CPU looks up in bytes


def find(setting: Setting, program: Program) -> Iterator[Match | Skip]:
    """Look-ups in tables of stored integers."""
    for node in program.operations():
        table = node.args[0] if node.target is torch.ops.aten.embedding.default else None
        if not isinstance(table, fx.Node) or not is_irc_op(table.target, "dequantize"):
            continue
        reason = _why_not(program, table)
        if reason is not None:
            yield Skip.at(node, f"{_OP}: {reason}")
            continue
        yield Match(node, {"dequantize": table}, (node, table))


def _why_not(program: Program, table: fx.Node) -> str | None:
    chosen = formats.parse(str(table.kwargs["format"]))
    if not isinstance(chosen, formats.QuantFormat):
        return f"{chosen} is no format of integers"
    if any(weight_of(program, part) is None for part in table.args[:2]):
        return "its integers or scales are computed"
    if table.meta[VAL].dtype != torch.float32:
        return "is used for f32 only"
    if block_of(chosen, int(table.meta[VAL].shape[-1])) is None:
        return f"no block of a power of two from 16 on divides groups of {chosen}"
    if not installed.has_kernel(_OP, installed.CONTRIB, 1):
        return "this ONNX Runtime has no kernel for it"
    return None


def write(setting: Setting, program: Program, match: Match) -> None:
    """Edits the program: the look-up calls the operator."""
    node, table = match.root, match.parts["dequantize"]
    chosen = formats.parse(str(table.kwargs["format"]))
    assert isinstance(chosen, formats.QuantFormat)
    stored, scale, zero_point = (weight_of(program, part) for part in (*table.args, None, None)[:3])
    assert stored is not None
    assert scale is not None
    packed = pack(chosen, stored, scale, zero_point, _CONTAINERS)
    name = str(table.args[0].target).removesuffix("_stored")
    tensors = [
        program.weight_node(f"{name}_{part}", tensor, before=node) if tensor is not None else None
        for part, tensor in (
            ("rows", packed.blocks.flatten(1)),
            ("row_scales", packed.scales),
            ("row_zero_points", packed.zero_points),
        )
    ]
    ids = node.args[1]
    node.target = bound(setting, gather_block_quantized)
    node.args = (tensors[0], ids, *tensors[1:])
    node.kwargs = {"bits": packed.bits, "block_size": packed.block_size}


def gather_block_quantized(
    setting: Setting,
    rows: Tensor,
    ids: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    bits: int,
    block_size: int,
) -> Tensor:
    """Rows [..., K] of a table in blocks."""
    attributes = {"bits": bits, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1}
    inputs = [rows, ids, scales] if zero_points is None else [rows, ids, scales, zero_points]
    width = rows.shape[1] * 8 // bits
    return emit(
        f"{installed.CONTRIB}::{_OP}", inputs, attributes, dtype=scales.dtype, shape=(*ids.shape, width), version=1
    )


register_fusion(_OP, find, write, order=11)
