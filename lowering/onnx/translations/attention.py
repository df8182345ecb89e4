"""`irc::attention` → `Attention`; masks that are not plain causal become a tensor of booleans."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.operands import input_node
from irc.core.ops.attention import keep_mask
from irc.core.program import VAL, Program
from irc.lowering.onnx.registry import Setting, emit, translates


def _why_not(setting: Setting, program: Program, node: fx.Node) -> str | None:
    query, key, value = (input_node(node, n).meta[VAL] for n in range(3))
    if {query.dtype, key.dtype, value.dtype} != {torch.float32}:
        return "Attention is used for f32 only: in half types the softmax is rounded elsewhere"
    if node.kwargs.get("sinks") is not None:
        return "Attention has no attention sinks"
    if not all(isinstance(t.shape[i], int) for t in (query, key, value) for i in (1, 3)):
        return "Attention needs fixed numbers of heads and head sizes"
    bias = node.kwargs.get("bias")
    if isinstance(bias, fx.Node) and bias.meta[VAL].dtype not in (torch.bool, torch.float32):
        return f"a bias of {bias.meta[VAL].dtype} is neither added nor a mask"
    return None


@translates("attention", "Attention", opset=23, why_not=_why_not)
def attention(
    setting: Setting,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: str = "full",
    window: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Grouped heads and the soft cap are the operator's own."""
    attributes: dict[str, Any] = {"scale": float(scale)}
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    merged = bias
    # The operator's own causal mask counts from the first key: the same as ours only for as many keys as queries.
    if mask == "causal" and positions is None and bias is None and same_size(query.shape[2], key.shape[2]):
        attributes["is_causal"] = 1
    elif mask != "full":
        merged = _merged(_kept(query, key, positions, mask, window), bias)
    if merged is not None:
        # Broadcasting over queries or keys is not promised by the operator.
        merged = merged.expand(*merged.shape[:-2], query.shape[2], key.shape[2])
    return emit(
        "Attention",
        (query, key, value) if merged is None else (query, key, value, merged),
        attributes,
        dtype=value.dtype,
        shape=(*query.shape[:-1], value.shape[-1]),
        version=setting.opset,
    )


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Equal for every size that the program may be run at, not only at the example's (no guard is added)."""
    left, right = (s.node.expr if isinstance(s, torch.SymInt) else s for s in (a, b))
    return bool(left == right)


def _kept(query: Tensor, key: Tensor, positions: Tensor | None, mask: str, window: int | None) -> Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    if positions is None:
        at = (torch.arange(num_queries) + (num_keys - num_queries)).unsqueeze(0).unsqueeze(0)
    else:
        at = positions.unsqueeze(1)
    kept = keep_mask(mask, window, at, torch.arange(num_keys))
    assert kept is not None
    return kept


def _merged(kept: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return kept
    if bias.dtype == torch.bool:
        return kept & bias
    return torch.where(kept, bias, torch.full((), -torch.inf, dtype=bias.dtype))
