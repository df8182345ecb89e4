"""Normalization."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from irc.core.ops.registry import Shape, define_op


def _fake(x: Tensor, weight: Tensor | None, eps: float, *, weight_in_f32: bool = False) -> Tensor:
    dtype = x.dtype if weight is None or weight_in_f32 else torch.promote_types(x.dtype, weight.dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _flops(x: Shape, weight: Shape | None, eps: float, *, weight_in_f32: bool = False) -> sympy.Expr:
    return sympy.Integer(4 if weight is not None else 3) * sympy.prod(x)


@define_op(
    "rms_norm(Tensor x, Tensor? weight, float eps, *, bool weight_in_f32=False) -> Tensor",
    fake=_fake,
    flops=_flops,
    source="Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467",
)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, weight_in_f32: bool = False) -> Tensor:
    """x / sqrt(mean(x², last dim) + eps) * weight, accumulated in f32 (f64 for f64).

    Shapes: x [..., E]; weight [E] or None.
    `weight_in_f32`: the product with the weight is taken before the result is rounded to x's type
    (Gemma, OLMo2), instead of after (Llama). In f32 both are the same.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_wide = x.to(wide)
    normed = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if weight_in_f32:
        return (normed * weight.to(wide)).to(x.dtype)
    return normed.to(x.dtype) * weight
