"""Convolution over two axes, channels last, weights packed once: a matrix product that gathers its rows.

Groups, strides, zero padding and dilation; f32, bf16 and f16, summed in f32. `irc/conv.h` has the layout and the bound
on the error; `irc/winograd.h` has those of windows of 3 × 3 by F(2 × 2, 3 × 3).

`epilogue(m, n0, n1, values)` gets channels n0 to n1 of pixel m (of all images) as f32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from irc.core.errors import TargetError
from irc.lowering.cpp.templates import float_matmul
from irc.lowering.cpp.templates.base import C_TYPES, PANEL, MatmulProblem, as_bytes, pad_to, wrong_shape

INCLUDES = ("irc/conv.h", "irc/conv_groups.h", "irc/winograd.h")
# Rows between two calls of the epilogue for the same columns: a tile, as C++ text.
ROWS_AHEAD = "irc::gemm_height"
# Channels that a unit of the packed weights of `winograd` holds, its places, and the largest product of both channels
# that it is faster for: beyond, its weights (16 places, not 9) do not come out of a cache as fast as they are needed.
_GROUP, _PLACES, _MOST_CHANNELS = 64, 16, 1 << 17
# Channels, tiles and outputs of a block: gemm_depth, winograd_rows and conv_group.
_DEPTH, _TILES, _COLUMNS = 256, 48, 128
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ConvProblem:
    """`aten.conv2d` of x [B, H, W, C] (as it lies in memory) with w [O, C / groups, KH, KW].

    Attributes:
        activation, weight: their types.
        winograd: by F(2 × 2, 3 × 3) (irc/winograd.h), which has an error bound of its own; see `winograd_pays`.
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
    winograd: bool = False

    @property
    def places(self) -> int:
        """Inputs under one output."""
        return self.channels // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def depthwise(self) -> bool:
        """Every channel is a group of its own."""
        return self.groups == self.channels == self.out_channels

    @property
    def narrow_groups(self) -> bool:
        """Groups that `irc/conv_groups.h` is for."""
        width = self.channels // self.groups
        return (
            self.groups > 1 and width in (4, 8) and self.channels == self.out_channels and self.channels % PANEL == 0
            and max(self.kernel) <= 7 and max(self.stride) <= 2 and self.dilation == (1, 1)
        )  # fmt: skip

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
    plain = problem.kernel == (3, 3) and problem.stride == problem.dilation == (1, 1) and problem.groups == 1
    if problem.winograd and not (plain and problem.channels % 16 == 0):
        return "minimal filtering of other than 3 × 3 with stride 1 over multiples of 16 channels"
    return None


def winograd_pays(problem: ConvProblem) -> bool:
    """Whether F(2 × 2, 3 × 3) can do the problem and is expected to be faster."""
    wanted = replace(problem, winograd=True)
    return (
        refuses(wanted, "plain") is None
        and min(problem.channels, problem.out_channels) >= 32
        and problem.channels * problem.out_channels <= _MOST_CHANNELS
    )


def pack(problem: ConvProblem, weight: Tensor) -> Tensor:
    """w [O, C / groups, KH, KW] as the panels of each group, as bytes; depthwise as f32 [KH KW][channels];
    narrow groups as f32 [channels / 16][KH KW][C / groups][16]; for `winograd` G w Gᵀ as f32
    [O / 64][16 places][4][C][16].

    Raises:
        TargetError: the weight does not fit the problem.
    """
    reason = refuses(problem, "plain")
    if reason:
        raise TargetError(f"conv2d cannot do {problem}: {reason}")
    wanted = (problem.out_channels, problem.channels // problem.groups, *problem.kernel)
    if tuple(weight.shape) != wanted or weight.dtype != DTYPES[problem.weight]:
        raise wrong_shape("weight", f"{weight.dtype}{list(weight.shape)}", f"{problem.weight}{list(wanted)}")
    if problem.winograd:
        sides = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
        spread = torch.einsum("ai,ocij,bj->ocab", sides, weight.double(), sides).float().flatten(2)
        panels = pad_to(spread, 0, _GROUP).unflatten(0, (-1, _GROUP // PANEL, PANEL))
        return as_bytes(panels.permute(0, 4, 1, 3, 2).flatten())
    if problem.depthwise:
        return as_bytes(pad_to(weight.float().flatten(1).t(), 1, PANEL).flatten())
    if problem.narrow_groups:
        vectors = weight.float().flatten(2).unflatten(0, (-1, PANEL))
        return as_bytes(vectors.permute(0, 3, 2, 1).flatten())
    return torch.cat([float_matmul.pack(problem.product, rows) for rows in rows_of_groups(problem, weight)])


def rows_of_groups(problem: ConvProblem, weight: Tensor) -> list[Tensor]:
    """A weight as one matrix [O / groups, KH KW C / groups] for each group."""
    return list(weight.permute(0, 2, 3, 1).flatten(1).unflatten(0, (problem.groups, -1)))


def packed_bytes(problem: ConvProblem) -> int:
    """Bytes of `pack`'s result."""
    if problem.winograd:
        return -(-problem.out_channels // _GROUP) * _GROUP * problem.channels * _PLACES * 4
    if problem.depthwise:
        return problem.places * -(-problem.channels // PANEL) * PANEL * 4
    if problem.narrow_groups:
        return problem.places * problem.channels * 4
    return problem.groups * float_matmul.packed_bytes(problem.product)


def scratch_bytes(problem: ConvProblem, num_rows: int, num_workers: int) -> int:
    """What `winograd` spreads a worker's tiles to (irc::WinogradScratch); other blocks live in the workers' memory."""
    if not problem.winograd:
        return 0
    inputs = -(-problem.channels // _DEPTH) * _PLACES * _TILES * (_DEPTH + 16)
    return num_workers * (inputs + _PLACES * _TILES * _COLUMNS) * 4


def call(problem: ConvProblem, args: Mapping[str, str], epilogue: str) -> str:
    """Convolves.

    Args: worker, x (dense, channels last), packed (const uint8_t*), batch, height, width, out_height, out_width; for
        `winograd` scratch (uint8_t*).
    """
    shape, sources = shape_text(problem, args), f"{args['x']}, {args['packed']}"
    if problem.winograd:
        return f"irc::winograd_conv2d({args['worker']}, {shape}, {sources}, {args['scratch']}, {epilogue});\n"
    if problem.narrow_groups:
        width = problem.channels // problem.groups
        return f"irc::conv2d_groups<{width}>({args['worker']}, {shape}, {sources}, {epilogue});\n"
    return f"irc::conv2d<{C_TYPES[problem.weight]}>({args['worker']}, {shape}, {sources}, {epilogue});\n"


def shape_text(problem: ConvProblem, args: Mapping[str, str]) -> str:
    """The problem at the sizes in `args` as irc::ConvShape."""
    sizes = (
        f"{args['batch']}, {problem.channels}, {args['height']}, {args['width']}, {problem.out_channels},"
        f" {args['out_height']}, {args['out_width']}, {problem.groups}"
    )
    pairs = (problem.kernel, problem.stride, problem.padding, problem.dilation)
    window = ", ".join(str(size) for pair in pairs for size in pair)
    return f"irc::ConvShape{{{sizes}, {window}}}"
