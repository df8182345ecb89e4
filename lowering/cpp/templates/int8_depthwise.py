"""Depthwise convolutions of 8-bit integers: static activation scales, weight scales a channel, exact sums.

Activations are u8 or s8 with one scale and zero point for the tensor, weights s8 without zero points; one output
a channel. `irc/conv8_depthwise.h` has the layout and the arithmetic.

`epilogue(m, n0, n1, values)` gets channels n0 to n1 of pixel m (of all images) as f32; an `irc::Requantize` gets sums.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from irc.core.errors import TargetError
from irc.lowering.cpp.templates.base import as_bytes, pad_to, wrong_shape
from irc.lowering.cpp.templates.conv2d import ConvProblem, shape_text
from irc.lowering.cpp.templates.int8_conv2d import is_narrow

__all__ = ["INCLUDES", "call", "is_narrow", "pack", "packed_bytes", "refuses", "scratch_bytes"]

INCLUDES = ("irc/conv8_depthwise.h", "irc/requantize.h")
_INPUTS = ("u8", "i8")
# Channels of a block, neighbouring places that lie together, and the places that memory is set aside for.
_BLOCK, _LINE, _MOST_PLACES = 32, 4, 1024


def refuses(problem: ConvProblem, isa: str) -> str | None:
    """Why the template cannot do the problem, or None. The same on every instruction set."""
    if problem.activation not in _INPUTS or problem.weight != "i8":
        return f"products of {problem.activation} with {problem.weight}; known: u8 or i8 with i8"
    if not problem.depthwise:
        return (
            f"{problem.groups} groups of {problem.channels} and {problem.out_channels} channels; known: one input and"
            " one output a group"
        )
    if problem.places > _MOST_PLACES:
        return f"windows of {problem.places} places; at most {_MOST_PLACES}"
    return None


def pack(problem: ConvProblem, weight: Tensor, scale: Tensor, zero: int) -> Tensor:
    """s8 w [C, 1, KH, KW] as lines of four places, then scales, corrections and a row of zero points, as bytes.

    Args:
        scale: [C], the input's times the channel's.
        zero: zero point of the input.

    Raises:
        TargetError: the weight or the scales do not fit the problem.
    """
    reason = refuses(problem, "plain")
    if reason:
        raise TargetError(f"int8_depthwise cannot do {problem}: {reason}")
    wanted = (problem.channels, 1, *problem.kernel)
    if tuple(weight.shape) != wanted or weight.dtype != torch.int8:
        raise wrong_shape("weight", f"{weight.dtype}{list(weight.shape)}", f"i8{list(wanted)}")
    if scale.shape != (problem.channels,):
        raise wrong_shape("scale", list(scale.shape), [problem.channels])
    rows = pad_to(weight.flatten(1), 0, _BLOCK)
    fours = pad_to(rows, 1, _LINE)
    if problem.places % _LINE == 1:  # the last place as 32 bits
        fours[:, -_LINE + 1 :] = (rows[:, -1:] < 0).to(torch.int8).neg()
    # [blocks, halves, lines, four channels, fours, places] → fours and lines outermost in a block.
    blocks = fours.unflatten(0, (-1, 2, 4, 4)).unflatten(4, (-1, _LINE))
    lines = blocks.permute(0, 4, 2, 1, 3, 5).flatten()
    stored_zero = zero + (128 if problem.activation == "i8" else 0)
    corrections = (-stored_zero * rows.sum(1, dtype=torch.int64)).to(torch.int32)
    outside = torch.full((len(rows),), zero % 256, dtype=torch.uint8)
    return torch.cat([as_bytes(x) for x in (lines, pad_to(scale.float(), 0, _BLOCK), corrections, outside)])


def packed_bytes(problem: ConvProblem) -> int:
    """Bytes of `pack`'s result."""
    channels = -(-problem.channels // _BLOCK) * _BLOCK
    return channels * (-(-problem.places // _LINE) * _LINE + 4 + 4 + 1)


def scratch_bytes(problem: ConvProblem, num_rows: int, num_workers: int) -> int:
    """None: what is widened or copied lives in the workers' memory."""
    return 0


def call(problem: ConvProblem, args: Mapping[str, str], epilogue: str) -> str:
    """Convolves.

    Args: worker, x (dense, channels last), packed (const uint8_t*), batch, height, width, out_height, out_width, narrow
        (`is_narrow` of the weight, as `true` or `false`).
    """
    return (
        f"irc::depthwise_bytes({args['worker']}, {shape_text(problem, args)}, {args['x']}, {args['packed']},"
        f" {args['narrow']}, {epilogue});\n"
    )
