"""Layers put together from several nodes (`irc.frontend.onnx.patterns`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from irc.frontend.onnx.calls import Call, operator
from irc.frontend.onnx.patterns import ATTENTION, DOMAIN, LINEAR


@operator(ATTENTION, domain=DOMAIN)
def attention(call: Call) -> Tensor:
    """Queries and keys [B, H, ·, D], keys turned [B, H, D, T], values [B, H, T, Dv], perhaps a mask."""
    query, key, turned, value = (call.tensor(index) for index in range(4))
    mask, scale = call.maybe(4), float(call.attribute("scale"))
    same = query.dim() == key.dim() == turned.dim() == value.dim() == 4
    same = same and tuple(turned.shape) == (key.shape[0], key.shape[1], key.shape[3], key.shape[2])
    if same and key.shape[:2] == value.shape[:2] == query.shape[:2]:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = torch.matmul(query, turned) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(scores.softmax(-1).nan_to_num(nan=0.0), value)


@operator(LINEAR, domain=DOMAIN)
def linear(call: Call) -> Tensor:
    """x · Wᵀ + b, W [N, K]."""
    return F.linear(call.tensor(0), call.tensor(1), call.tensor(2))
