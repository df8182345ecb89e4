"""quantize(x, dynamic_scale(x)) → division, rounding and a cast, without a clamp.

    scale = max |x| / high a token, 1 where that is 0

No value lies beyond the scale of its own maximum: the integers reach ±high exactly (|x| / scale is at most high, but
for half an ulp). `QuantizeLinear` with a block a row would say the same; ONNX Runtime 1.32 moves transposes through it
and leaves the scales as they were.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.contract import Skip
from irc.core.operands import input_node
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.lowering.onnx.fusing import Match, register_fusion
from irc.lowering.onnx.registry import Setting, bound

_NAME = "Round"


def find(setting: Setting, program: Program) -> Iterator[Match | Skip]:
    """Values quantized with the scale of their own rows."""
    for node in program.operations():
        scale = node.args[1] if is_irc_op(node.target, "quantize") else None
        if not isinstance(scale, fx.Node) or not is_irc_op(scale.target, "dynamic_scale"):
            continue
        if scale.args[0] is not node.args[0]:
            continue
        chosen = formats.parse(str(node.kwargs["format"]))
        x = input_node(node).meta[VAL]
        if not isinstance(chosen, formats.QuantFormat) or chosen.packs_two or chosen.group_size or chosen.per_tensor:
            yield Skip.at(node, f"{_NAME}: {chosen} has no scale a row of bytes")
        elif scale.kwargs["format"] != node.kwargs["format"] or x.dtype != torch.float32:
            yield Skip.at(node, f"{_NAME}: is used for f32 and one format only")
        else:
            yield Match(node, {"scale": scale, "high": chosen.high}, (node,))


def write(setting: Setting, program: Program, match: Match) -> None:
    """Edits the program: scale and integers in plain operators."""
    node, scale = match.root, match.parts["scale"]
    if is_irc_op(scale.target, "dynamic_scale"):
        scale.target, scale.args, scale.kwargs = bound(setting, row_scale), (scale.args[0], match.parts["high"]), {}
    node.target, node.args, node.kwargs = bound(setting, quantize_rows), (node.args[0], scale), {}


def row_scale(setting: Setting, x: Tensor, high: int) -> Tensor:
    """max |x| / high along the last axis: [..., 1]."""
    scale = x.abs().amax(-1, keepdim=True) / high
    return torch.where(scale == 0, 1.0, scale)


def quantize_rows(setting: Setting, x: Tensor, scale: Tensor) -> Tensor:
    """Integers of a byte; rounds half to even."""
    return torch.round(x / scale).to(torch.int8)


register_fusion(_NAME, find, write, order=40, flavours=("portable", "ort"))
