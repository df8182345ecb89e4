"""Convolutions and linear layers of 8-bit integers: static activation scales, weight scales a channel, exact sums.

Activations are u8 or s8 with one scale and zero point for the tensor, weights s8 without zero points. `irc/conv8.h` has
the layout and the arithmetic. A linear layer is a convolution of one pixel an image.

`epilogue(m, n0, n1, values)` gets channels n0 to n1 of pixel m (of all images) as f32; an `irc::Requantize` gets sums.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from irc.core.errors import TargetError
from irc.lowering.cpp.templates.base import PANEL, as_bytes, by_panel, pad_to, wrong_shape
from irc.lowering.cpp.templates.conv2d import ConvProblem, rows_of_groups, shape_text

INCLUDES = ("irc/conv8.h", "irc/requantize.h")
_INPUTS = {"u8": "uint8_t", "i8": "int8_t"}
# Neighbours along the depth that lie together, how many of them are multiplied at a time, and the largest weight that
# pairs in 16 bits take.
_LINE, _STEP, _NARROW = 4, 8, 64
# Products of 255 · 128 whose sum surely fits 32 bits.
_MOST_PLACES = 65792


def refuses(problem: ConvProblem, isa: str) -> str | None:
    """Why the template cannot do the problem, or None. The same on every instruction set."""
    if problem.activation not in _INPUTS or problem.weight != "i8":
        return f"products of {problem.activation} with {problem.weight}; known: u8 or i8 with i8"
    if problem.channels % problem.groups or problem.out_channels % problem.groups:
        return f"{problem.groups} groups do not divide {problem.channels} and {problem.out_channels} channels"
    if problem.places > _MOST_PLACES:
        return f"sums of {problem.places} products may not fit 32 bits; at most {_MOST_PLACES}"
    if problem.depthwise and problem.groups > 1:
        return "depthwise convolution of integers"
    return None


def pack(problem: ConvProblem, weight: Tensor, scale: Tensor, zero: int) -> Tensor:
    """s8 w [O, C / groups, KH, KW] as panels of each group, then scales, corrections and `_heavy`, as bytes.

    Args:
        scale: [O], the input's times the channel's.
        zero: zero point of the input.

    Raises:
        TargetError: the weight or the scales do not fit the problem.
    """
    reason = refuses(problem, "plain")
    if reason:
        raise TargetError(f"int8_conv2d cannot do {problem}: {reason}")
    wanted = (problem.out_channels, problem.channels // problem.groups, *problem.kernel)
    if tuple(weight.shape) != wanted or weight.dtype != torch.int8:
        raise wrong_shape("weight", f"{weight.dtype}{list(weight.shape)}", f"i8{list(wanted)}")
    if scale.shape != (problem.out_channels,):
        raise wrong_shape("scale", list(scale.shape), [problem.out_channels])
    groups, heavy = [], []
    for rows in rows_of_groups(problem, weight):
        panels = by_panel(pad_to(rows, 1, _STEP))
        groups.append(as_bytes(panels.unflatten(2, (-1, _LINE)).permute(0, 2, 1, 3).flatten()))
        heavy.append(_heavy(panels))
    stored_zero = zero + (128 if problem.activation == "i8" else 0)
    corrections = (-stored_zero * weight.flatten(1).sum(1, dtype=torch.int64)).to(torch.int32)
    behind = [as_bytes(torch.cat([pad_to(x, 0, PANEL), x.new_zeros(PANEL)])) for x in (scale.float(), corrections)]
    return torch.cat([*groups, *behind, *heavy])


def _heavy(panels: Tensor) -> Tensor:
    """u8 [panels, steps], flat: 1 where products of a step with unsigned bytes may leave 16 bits.

    A lane of 16 bits holds two neighbours of the first four places of a step, and the same two of the last four. Two
    panels are multiplied together, so the first of them says it for both.

    Args:
        panels: s8 [panels, 16, places].
    """
    lanes = panels.unflatten(2, (-1, 2, _LINE // 2, 2)).to(torch.int16)  # [panels, 16, steps, first or last, lane, 2]
    ends = [lanes.clamp(min=0).sum((3, 5)), -lanes.clamp(max=0).sum((3, 5))]
    found = (torch.maximum(*ends) > 2 * _NARROW).any(3).any(1)
    found[0 : len(found) // 2 * 2 : 2] |= found[1::2]
    return found.to(torch.uint8).flatten()


def is_narrow(weight: Tensor) -> bool:
    """Whether sums of two products with any unsigned byte fit 16 bits."""
    return not bool((weight.abs() > _NARROW).any() or (weight == -128).any())


def packed_bytes(problem: ConvProblem) -> int:
    """Bytes of `pack`'s result."""
    panels = scales_at(problem)
    return panels + 2 * (-(-problem.out_channels // PANEL) + 1) * PANEL * 4 + panels // (_STEP * PANEL)


def scales_at(problem: ConvProblem) -> int:
    """Bytes of the panels, behind which the scales are."""
    panels = -(-(problem.out_channels // problem.groups) // PANEL)
    return problem.groups * panels * PANEL * -(-problem.places // _STEP) * _STEP


def scratch_bytes(problem: ConvProblem, num_rows: int, num_workers: int) -> int:
    """None: blocks live in the workers' memory."""
    return 0


def call(problem: ConvProblem, args: Mapping[str, str], epilogue: str) -> str:
    """Convolves.

    Args: worker, x (dense, channels last), zero (of x, an integer), packed (const uint8_t*), batch, height, width,
        out_height, out_width, narrow (`is_narrow` of the weight, as `true` or `false`).
    """
    return (
        f"irc::conv2d_bytes({args['worker']}, {shape_text(problem, args)}, {args['x']}, {args['zero']},"
        f" {args['packed']}, {scales_at(problem)}, {args['narrow']}, {epilogue});\n"
    )
