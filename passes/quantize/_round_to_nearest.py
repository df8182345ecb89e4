"""Round-to-nearest quantization of a weight, in row blocks, and the check of its result."""

from __future__ import annotations

import torch
from torch import Tensor

from irc.core.formats import QuantFormat

# Numbers a block: small enough for the blocks' temporaries to stay in the cache.
BLOCK = 1 << 19


def round_to_nearest(
    weight: Tensor, chosen: QuantFormat, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed integers, scale and zero point (None if symmetric) of a weight [N, K].

    Symmetric: scale = absmax / high of the group. Asymmetric: the group's range, widened to hold 0, is
    spread over all integers. A group of zeros gets scale 1. On the meta device: types only.
    """
    rows, width = weight.shape
    scale_shape = chosen.scale_shape((rows, width))
    device = weight.device
    stored = torch.empty(chosen.stored_shape((rows, width)), dtype=chosen.storage_dtype, device=device)
    scale = torch.empty(scale_shape, dtype=scale_dtype, device=device)
    zero_point = None if chosen.symmetric else torch.empty(scale_shape, dtype=torch.uint8, device=device)
    if device.type == "meta":
        return stored, scale, zero_point
    weight = weight.detach()
    step = max(1, BLOCK // width)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        part = None if zero_point is None else zero_point[block]
        stored[block] = _quantize_block(weight[block].float(), chosen, scale[block], part)
    return stored, scale, zero_point


def _quantize_block(x: Tensor, chosen: QuantFormat, scale_out: Tensor, zero_out: Tensor | None) -> Tensor:
    """Packed integers of a block of rows; writes the block's scales and zero points."""
    groups = x.unflatten(-1, (scale_out.shape[-1], -1))
    low, high = torch.aminmax(groups, dim=-1)
    if zero_out is None:
        span, integers = torch.maximum(-low, high), chosen.high
    else:
        low = low.clamp(max=0)
        span, integers = high.clamp(min=0) - low, chosen.high - chosen.low
    scale_out.copy_(span / integers)
    scale_out.masked_fill_(scale_out == 0, 1)
    # From the scale as stored, so that its rounding is made up for by the integers.
    scale = scale_out.float()
    values = groups.mul(scale.reciprocal().unsqueeze(-1)).round_()
    if zero_out is not None:
        zero_point = (-low / scale).round_().clamp_(chosen.low, chosen.high)
        zero_out.copy_(zero_point)
        values.add_(zero_point.unsqueeze(-1))
    return chosen.pack(values.clamp_(chosen.low, chosen.high).flatten(-2))


def worst_group(
    weight: Tensor, stored: Tensor, scale: Tensor, zero_point: Tensor | None, chosen: QuantFormat, dtype: torch.dtype
) -> tuple[float, int, int] | None:
    """The group [N, K] weight whose quantization error is furthest beyond half a step, or None if none is.

    Judged by the original alone: its own groups give the step that the quantization should have had.

    Returns:
        (error in steps, row, group).
    """
    rows, width = weight.shape
    num_groups = chosen.scale_shape((rows, width))[-1]
    # Rounding of the scale and of the result may come on top of the half step.
    slack = max(torch.finfo(scale.dtype).eps * chosen.high, 2 * torch.finfo(dtype).eps * chosen.high, 1e-5)
    step_rows = max(1, BLOCK // width)
    worst: tuple[float, int, int] | None = None
    for start in range(0, rows, step_rows):
        block = slice(start, min(start + step_rows, rows))
        original = weight[block].detach().float()
        zeros = None if zero_point is None else zero_point[block]
        restored = torch.ops.irc.dequantize(stored[block], scale[block], zeros, format=str(chosen), dtype=dtype)
        error = (original - restored.float()).unflatten(-1, (num_groups, -1)).abs().amax(-1)
        steps = error / _natural_step(original, chosen, num_groups)
        value, index = steps.flatten().nan_to_num(nan=torch.inf).max(0)
        if float(value) > 0.5 + slack and (worst is None or float(value) > worst[0]):
            worst = (float(value), start + int(index) // num_groups, int(index) % num_groups)
    return worst


def _natural_step(original: Tensor, chosen: QuantFormat, num_groups: int) -> Tensor:
    groups = original.unflatten(-1, (num_groups, -1))
    if chosen.symmetric:
        step = groups.abs().amax(-1) / ((1 << (chosen.bits - 1)) - 1)
    else:
        step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / ((1 << chosen.bits) - 1)
    # Below this a half-precision scale has lost its digits, and the whole group is as good as zero.
    return step.clamp_min(1e-6)
