"""Convolution over two axes in f32, channels first, weights packed once: an implicit matrix product over pixels.

Groups, strides, zero padding and dilation. `irc/conv.h` has the layout and the bound on the error.

`epilogue(b, o, p0, p1, values)` gets pixels p0 to p1 (y · width + x) of output channel o as f32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from irc.core.errors import TargetError
from irc.lowering.cpp.templates.base import as_bytes, pad_to, wrong_shape

INCLUDES = ("irc/conv.h",)
# irc/conv.h: conv_depth, conv_stride.
_DEPTH, _STRIDE = 256, 272


@dataclass(frozen=True, kw_only=True)
class ConvProblem:
    """`aten.conv2d` of x [B, C, H, W] with w [O, C / groups, KH, KW].

    Attributes:
        activation, weight: their types.
    """

    channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str = "f32"
    weight: str = "f32"

    @property
    def places(self) -> int:
        """Inputs under one output."""
        return self.channels // self.groups * self.kernel[0] * self.kernel[1]


def refuses(problem: ConvProblem, isa: str) -> str | None:
    """Why the template cannot do the problem, or None. The same on every instruction set."""
    if (problem.activation, problem.weight) != ("f32", "f32"):
        return f"convolution of {problem.activation} with {problem.weight}; only f32 with f32"
    if problem.channels % problem.groups or problem.out_channels % problem.groups:
        return f"{problem.groups} groups do not divide {problem.channels} and {problem.out_channels} channels"
    return None


def pack(problem: ConvProblem, weight: Tensor) -> Tensor:
    """w [O, C / groups, KH, KW] as [groups][blocks of places][O / groups][272] f32, as bytes.

    Raises:
        TargetError: the weight does not fit the problem.
    """
    reason = refuses(problem, "plain")
    if reason:
        raise TargetError(f"conv2d cannot do {problem}: {reason}")
    wanted = (problem.out_channels, problem.channels // problem.groups, *problem.kernel)
    if tuple(weight.shape) != wanted or weight.dtype != torch.float32:
        raise wrong_shape("weight", f"{weight.dtype}{list(weight.shape)}", f"f32{list(wanted)}")
    rows = pad_to(weight.flatten(1), 1, _DEPTH).unflatten(0, (problem.groups, -1)).unflatten(2, (-1, _DEPTH))
    return as_bytes(torch.nn.functional.pad(rows.transpose(1, 2), (0, _STRIDE - _DEPTH)).flatten())


def packed_bytes(problem: ConvProblem) -> int:
    """Bytes of `pack`'s result."""
    return -(-problem.places // _DEPTH) * problem.out_channels * _STRIDE * 4


def scratch_bytes(problem: ConvProblem, num_rows: int, num_workers: int) -> int:
    """None: blocks live on the workers' stacks."""
    return 0


def call(problem: ConvProblem, args: Mapping[str, str], epilogue: str) -> str:
    """Convolves.

    Args: worker, x (const float*, contiguous), packed (const uint8_t*), batch, height, width, out_height, out_width.
    """
    sizes = (
        f"{args['batch']}, {problem.channels}, {args['height']}, {args['width']}, {problem.out_channels},"
        f" {args['out_height']}, {args['out_width']}, {problem.groups}"
    )
    pairs = (problem.kernel, problem.stride, problem.padding, problem.dilation)
    window = ", ".join(str(size) for pair in pairs for size in pair)
    return (
        f"irc::conv2d({args['worker']}, irc::ConvShape{{{sizes}, {window}}}, {args['x']},"
        f" reinterpret_cast<const float*>({args['packed']}), {epilogue});\n"
    )
