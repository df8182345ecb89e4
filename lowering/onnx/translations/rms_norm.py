"""`irc::rms_norm` → `RMSNormalization`."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.program import VAL, Program
from irc.lowering.onnx.registry import Setting, emit, translates


def _why_not(setting: Setting, program: Program, node: fx.Node) -> str | None:
    x, weight = node.args[:2]
    types = {n.meta[VAL].dtype for n in (x, weight) if isinstance(n, fx.Node)}
    if types != {torch.float32}:
        # In half types ONNX rounds once, irc rounds before the weight: not the same numbers.
        return "RMSNormalization is used for f32 only"
    return None


@translates("rms_norm", "RMSNormalization", opset=23, why_not=_why_not)
def rms_norm(setting: Setting, x: Tensor, weight: Tensor | None, eps: float, *, weight_in_f32: bool = False) -> Tensor:
    """Normalization over the last axis; a missing weight is one of ones."""
    scale = weight if weight is not None else torch.ones(x.shape[-1], dtype=x.dtype)
    return emit(
        "RMSNormalization",
        (x, scale),
        {"axis": -1, "epsilon": float(eps)},
        dtype=x.dtype,
        shape=x.shape,
        version=setting.opset,
    )
