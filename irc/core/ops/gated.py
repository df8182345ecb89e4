"""Gated linear units: the pointwise half of a gated MLP."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from irc.core.ops.registry import Shape, define_op

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
}


def _fake(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    # The real addition of fakes settles broadcasting and type promotion.
    return torch.empty_like(gate + up, memory_format=torch.contiguous_format)


def _flops(gate: Shape, up: Shape, *, activation: str = "silu") -> sympy.Expr:
    return sympy.Integer(6) * sympy.prod(gate)


@define_op(
    "glu(Tensor gate, Tensor up, *, str activation='silu') -> Tensor",
    fake=_fake,
    flops=_flops,
    source="Shazeer 2020, https://arxiv.org/abs/2002.05202",
)
def glu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """activation(gate) * up.

    Shapes: gate, up [..., F].
    `activation`: silu (SwiGLU), gelu, gelu_tanh or quick_gelu, x·sigmoid(1.702·x) (GeGLU), relu (ReGLU), sigmoid (GLU).
    """
    return ACTIVATIONS[activation](gate) * up
