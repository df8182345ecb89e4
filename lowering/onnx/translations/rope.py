"""`irc::rope` → `RotaryEmbedding`, with a table of angles a token instead of position ids."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.operands import input_node
from irc.core.program import VAL, Program
from irc.lowering.onnx.registry import Setting, emit, translates


def _why_not(setting: Setting, program: Program, node: fx.Node) -> str | None:
    x, cos, sin = (input_node(node, n).meta[VAL] for n in range(3))
    if {x.dtype, cos.dtype, sin.dtype} != {torch.float32}:
        return "RotaryEmbedding is used for f32 only: in half types the product is rounded elsewhere"
    if x.dim() != 4:
        return f"RotaryEmbedding takes [B, H, S, D], not {x.dim()} dimensions"
    if cos.dim() > 4 or (cos.dim() == 4 and program.shape_expr(input_node(node, 1))[1] != 1):
        return "RotaryEmbedding turns all heads by the same angles"
    if not isinstance(x.shape[-1], int):
        return "RotaryEmbedding needs a fixed head size"
    return None


@translates("rope", "RotaryEmbedding", opset=23, why_not=_why_not)
def rope(setting: Setting, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Angles [B|1, 1, S, R] → one row a token: the operator does not broadcast over the batch."""
    tables = [_per_token(x, table) for table in (cos, sin)]
    width = 2 * cos.shape[-1]
    attributes = {"interleaved": int(interleaved)}
    if width < x.shape[-1]:
        attributes["rotary_embedding_dim"] = width
    return emit("RotaryEmbedding", (x, *tables), attributes, dtype=x.dtype, shape=x.shape, version=setting.opset)


def _per_token(x: Tensor, table: Tensor) -> Tensor:
    """[…, S, R] → [B, S, R]."""
    if table.dim() == 4:
        table = table.squeeze(1)
    return table.expand(x.shape[0], x.shape[2], table.shape[-1])
