"""Convolution over two axes, channels last, weights packed once: a matrix product that gathers its rows.

Groups, strides, zero padding and dilation; f32, bf16 and f16, summed in f32. `irc/conv.h` has the layout and the bound
on the error.

`epilogue(m, n0, n1, values)` gets channels n0 to n1 of pixel m (of all images) as f32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from irc.core.errors import TargetError
from irc.lowering.cpp.templates import float_matmul
from irc.lowering.cpp.templates.base import C_TYPES, PANEL, MatmulProblem, as_bytes, pad_to, wrong_shape

INCLUDES = ("irc/conv.h",)
# Rows between two calls of the epilogue for the same columns: a tile, as C++ text.
ROWS_AHEAD = "irc::gemm_height"
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ConvProblem:
    """`aten.conv2d` of x [B, H, W, C] (as it lies in memory) with w [O, C / groups, KH, KW].

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

    @property
    def depthwise(self) -> bool:
        """Every channel is a group of its own."""
        return self.groups == self.channels == self.out_channels

    @property
    def product(self) -> MatmulProblem:
        """One group as a matrix product over pixels."""
        return MatmulProblem(
            rows="pixels", columns=self.out_channels // self.groups, depth=self.places, weight=self.weight,
            activation=self.activation,
        )  # fmt: skip


def refuses(problem: ConvProblem, isa: str) -> str | None:
    """Why the template cannot do the problem, or None. The same on every instruction set."""
    for what, kind in (("activations", problem.activation), ("weights", problem.weight)):
        if kind not in C_TYPES:
            return f"convolution of {what} in {kind}; known: {', '.join(C_TYPES)}"
    if problem.channels % problem.groups or problem.out_channels % problem.groups:
        return f"{problem.groups} groups do not divide {problem.channels} and {problem.out_channels} channels"
    return None


def pack(problem: ConvProblem, weight: Tensor) -> Tensor:
    """w [O, C / groups, KH, KW] as the panels of each group, as bytes; depthwise as f32 [KH KW][channels].

    Raises:
        TargetError: the weight does not fit the problem.
    """
    reason = refuses(problem, "plain")
    if reason:
        raise TargetError(f"conv2d cannot do {problem}: {reason}")
    wanted = (problem.out_channels, problem.channels // problem.groups, *problem.kernel)
    if tuple(weight.shape) != wanted or weight.dtype != _DTYPES[problem.weight]:
        raise wrong_shape("weight", f"{weight.dtype}{list(weight.shape)}", f"{problem.weight}{list(wanted)}")
    if problem.depthwise:
        return as_bytes(pad_to(weight.float().flatten(1).t(), 1, PANEL).flatten())
    return torch.cat([float_matmul.pack(problem.product, rows) for rows in rows_of_groups(problem, weight)])


def rows_of_groups(problem: ConvProblem, weight: Tensor) -> list[Tensor]:
    """A weight as one matrix [O / groups, KH KW C / groups] for each group."""
    return list(weight.permute(0, 2, 3, 1).flatten(1).unflatten(0, (problem.groups, -1)))


def packed_bytes(problem: ConvProblem) -> int:
    """Bytes of `pack`'s result."""
    if problem.depthwise:
        return problem.places * -(-problem.channels // PANEL) * PANEL * 4
    return problem.groups * float_matmul.packed_bytes(problem.product)


def scratch_bytes(problem: ConvProblem, num_rows: int, num_workers: int) -> int:
    """None: blocks live on the workers' stacks."""
    return 0


def call(problem: ConvProblem, args: Mapping[str, str], epilogue: str) -> str:
    """Convolves.

    Args: worker, x (dense, channels last), packed (const uint8_t*), batch, height, width, out_height, out_width.
    """
    return (
        f"irc::conv2d<{C_TYPES[problem.weight]}>({args['worker']}, {shape_text(problem, args)}, {args['x']},"
        f" {args['packed']}, {epilogue});\n"
    )


def shape_text(problem: ConvProblem, args: Mapping[str, str]) -> str:
    """The problem at the sizes in `args` as irc::ConvShape."""
    sizes = (
        f"{args['batch']}, {problem.channels}, {args['height']}, {args['width']}, {problem.out_channels},"
        f" {args['out_height']}, {args['out_width']}, {problem.groups}"
    )
    pairs = (problem.kernel, problem.stride, problem.padding, problem.dilation)
    window = ", ".join(str(size) for pair in pairs for size in pair)
    return f"irc::ConvShape{{{sizes}, {window}}}"
