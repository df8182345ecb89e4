"""The convolutions and linear layers of a graph, read the same way however they are spelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from irc.core.program import VAL

aten = torch.ops.aten

CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
        aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
        aten.convolution.default,
    }
)  # fmt: skip
_TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input})


@dataclass(frozen=True)
class Convolution:
    """A convolution node's arguments, in the form of `aten.convolution`: one entry a spatial dimension."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node by name, with the defaults of its schema filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


def read_convolution(node: fx.Node) -> Convolution | str:
    """The convolution at a node of `CONVOLUTIONS`, or the reason why it cannot be written as `aten.convolution`."""
    args = arguments(node)
    weight = args["weight"]
    kernel = tuple(weight.meta[VAL].shape[2:])
    rank = len(kernel)
    if not is_batched(node):
        return "its input has no batch dimension"
    dilation = _per_dimension(args["dilation"], rank)
    padding = _padding(args["padding"], kernel, dilation)
    if isinstance(padding, str):
        return padding
    return Convolution(
        x=args["input"],
        weight=weight,
        bias=args["bias"],
        stride=_per_dimension(args["stride"], rank),
        padding=padding,
        dilation=dilation,
        transposed=is_transposed(node),
        output_padding=_per_dimension(args.get("output_padding", 0), rank),
        groups=args["groups"],
    )


def is_transposed(node: fx.Node) -> bool:
    """True for a transposed convolution."""
    return bool(arguments(node).get("transposed", node.target in _TRANSPOSED))


def is_batched(node: fx.Node) -> bool:
    """True if a convolution's input has a batch dimension (ATen also takes one without)."""
    return node.meta[VAL].ndim == arguments(node)["weight"].meta[VAL].ndim


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...] | str:
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            return f"padding 'same' of an even kernel {list(kernel)} is uneven"
        return tuple(t // 2 for t in total)
    return _per_dimension(padding, len(kernel))


def _per_dimension(value: int | list[int] | tuple[int, ...], rank: int) -> tuple[int, ...]:
    """One number a dimension from a number, a list of one, or a full list."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * rank if len(values) == 1 else values
