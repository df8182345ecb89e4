"""Rotary position embedding."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from irc.core.ops.registry import Shape, define_op


def _fake(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    dtype = torch.promote_types(x.dtype, cos.dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _flops(x: Shape, cos: Shape, sin: Shape, *, interleaved: bool = False) -> sympy.Expr:
    return sympy.Integer(6) * sympy.prod(x[:-1]) * cos[-1]


@define_op(
    "rope(Tensor x, Tensor cos, Tensor sin, *, bool interleaved=False) -> Tensor",
    fake=_fake,
    flops=_flops,
    source="Su et al. 2021 (RoFormer), https://arxiv.org/abs/2104.09864",
)
def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate pairs of the first 2·R channels of the last dimension by given angles.

    Shapes: x [..., S, D] with 2·R ≤ D; cos, sin broadcastable to [..., S, R] (one entry a pair).
    `interleaved`: the pairs are (0, 1), (2, 3), …; otherwise (0, R), (1, R+1), … (half-split).
    Channels from 2·R on pass through (partial rotary embedding).
    """
    half = cos.shape[-1]
    rotary, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = rotary[..., 0::2], rotary[..., 1::2]
    else:
        first, second = rotary[..., :half], rotary[..., half:]
    new_first = first * cos - second * sin
    new_second = second * cos + first * sin
    if interleaved:
        rotated = torch.stack((new_first, new_second), dim=-1).flatten(-2)
    else:
        rotated = torch.cat((new_first, new_second), dim=-1)
    return torch.cat((rotated, rest.to(rotated.dtype)), dim=-1) if 2 * half < x.shape[-1] else rotated
