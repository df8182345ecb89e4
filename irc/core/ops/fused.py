"""Linear and convolution with the activation that follows them: one operation, one write of the result."""

from __future__ import annotations

import functools
from collections.abc import Callable

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from irc.core.ops.gated import ACTIVATIONS as GATED_ACTIVATIONS
from irc.core.ops.registry import Shape, define_op

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **GATED_ACTIVATIONS,
    "tanh": torch.tanh,
    "relu6": F.relu6,
    "leaky_relu": functools.partial(F.leaky_relu, negative_slope=0.01),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
}

# Operations an element, as everywhere in the cost functions: a transcendental counts as four.
_ACTIVATION_FLOPS = {"relu": 1, "relu6": 2, "leaky_relu": 2, "hardswish": 5, "hardsigmoid": 4}


def _activation_flops(activation: str) -> int:
    return _ACTIVATION_FLOPS.get(activation, 6)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str) -> Tensor:
    _known(activation)
    return F.linear(x, weight, bias)


def _linear_flops(x: Shape, weight: Shape, bias: Shape | None = None, *, activation: str) -> sympy.Expr:
    outputs = sympy.prod(x[:-1]) * weight[0]
    return outputs * (2 * x[-1] + (1 if bias is not None else 0) + _activation_flops(activation))


@define_op(
    "linear_activation(Tensor x, Tensor weight, Tensor? bias=None, *, str activation) -> Tensor",
    fake=_linear_fake,
    flops=_linear_flops,
)
def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str) -> Tensor:
    """activation(x · weightᵀ + bias).

    Shapes: x [..., K]; weight [N, K]; bias [N] or None; returns [..., N].
    `activation`: a name in `ACTIVATIONS`; leaky_relu has slope 0.01.
    """
    return _known(activation)(F.linear(x, weight, bias))


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    return torch.ops.aten.convolution.default(
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )


def _conv_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    *,
    activation: str,
) -> Tensor:
    _known(activation)
    return _convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def _conv_flops(
    x: Shape,
    weight: Shape,
    bias: Shape | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    *,
    activation: str,
) -> sympy.Expr:
    batch, kernel, sizes = x[0], weight[2:], []
    for i, (size, taps) in enumerate(zip(x[2:], kernel, strict=True)):
        reach = dilation[i] * (taps - 1)
        if transposed:
            sizes.append((size - 1) * stride[i] - 2 * padding[i] + reach + output_padding[i] + 1)
        else:
            sizes.append((size + 2 * padding[i] - reach - 1) // stride[i] + 1)
    channels = weight[1] * groups if transposed else weight[0]
    outputs = batch * channels * sympy.prod(sizes)
    # Each input element of a transposed convolution meets weight[1] · taps weights; otherwise each output does.
    products = sympy.prod(x) * sympy.prod(weight[1:]) if transposed else outputs * sympy.prod(weight[1:])
    return 2 * products + outputs * ((1 if bias is not None else 0) + _activation_flops(activation))


@define_op(
    "conv_activation(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation,"
    " bool transposed, int[] output_padding, int groups, *, str activation) -> Tensor",
    fake=_conv_fake,
    flops=_conv_flops,
)
def conv_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    *,
    activation: str,
) -> Tensor:
    """activation(convolution(x, weight) + bias), in one to three spatial dimensions.

    Shapes: x [B, C, ...]; weight [O, C / groups, ...], transposed: [C, O / groups, ...]; bias [O] or None.
    Arguments as of `aten.convolution`, every list with one entry a spatial dimension.
    """
    return _known(activation)(
        _convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    )


def _known(activation: str) -> Callable[[Tensor], Tensor]:
    try:
        return ACTIVATIONS[activation]
    except KeyError:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(sorted(ACTIVATIONS))}") from None
