"""Round-to-nearest quantization of a weight to integers, in row blocks, and the check of results in any format."""

from __future__ import annotations

import torch
from torch import Tensor

from irc.core.formats import Format, Parts, QuantFormat, dequantize_tensor
from irc.core.memory import empty
from irc.passes.quantize._compiled_rounding import quantize_rows, worst_error

# Numbers a block: small enough for the blocks' temporaries to stay in the cache.
BLOCK = 1 << 19


def round_to_nearest(
    weight: Tensor, chosen: QuantFormat, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed integers, scale and zero point (None if symmetric) of a weight [N, K].

    Below 8 bits, a symmetric scale is absmax / (high + 1/2), and integers run from -2^(bits-1): a smaller step, and
    what is at the end of the range is still at most half a step off. With 8 bits that gains nothing, and integer
    products of bytes like it better without -128: absmax / high, as `QuantFormat.scales_of_range` has it. Not for
    per-tensor formats (`formats.quantize_tensor` takes those). On the meta device: types only.
    """
    rows, width = weight.shape
    scale_shape = chosen.scale_shape((rows, width))
    device = weight.device
    stored = empty(chosen.stored_shape((rows, width)), chosen.storage_dtype, device)
    scale = empty(scale_shape, scale_dtype, device)
    zero_point = None if chosen.symmetric else torch.empty(scale_shape, dtype=chosen.zero_point_dtype, device=device)
    if device.type == "meta":
        return stored, scale, zero_point
    weight = weight.detach()
    if quantize_rows(weight, chosen, stored, scale, zero_point):
        return stored, scale, zero_point
    step = max(1, BLOCK // width)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        part = None if zero_point is None else zero_point[block]
        stored[block] = _quantize_block(weight[block].float(), chosen, scale[block], part)
    return stored, scale, zero_point


def _quantize_block(x: Tensor, chosen: QuantFormat, scale_out: Tensor, zero_out: Tensor | None) -> Tensor:
    """Packed integers of a block of rows; writes the block's scales and zero points."""
    groups = x.unflatten(-1, (scale_out.shape[-1], -1))
    low, high = groups.amin(-1), groups.amax(-1)  # aminmax takes six times as long
    found, zero_point, _ = chosen.scales_of_range(low, high, scale_out.dtype)
    assert found is not None
    lowest = chosen.low
    if chosen.symmetric and chosen.bits < 8:
        lowest = chosen.lowest_stored
        found = torch.where(torch.maximum(-low, high) > 0, found.float() * (chosen.high / (chosen.high + 0.5)), 1.0).to(
            scale_out.dtype
        )
    scale_out.copy_(found)
    values = groups.mul(found.float().reciprocal().unsqueeze(-1)).round_()
    if zero_out is not None and zero_point is not None:
        zero_out.copy_(zero_point)
        values.add_(zero_point.unsqueeze(-1))
    return chosen.pack(values.clamp_(lowest, chosen.high).flatten(-2))


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
    most = 0.5 + slack
    quick = worst_error(weight.detach(), chosen, stored, scale, zero_point, dtype)
    if quick is not None and quick <= most:
        return None
    step_rows = max(1, BLOCK // width)
    worst: tuple[float, int, int] | None = None
    for start in range(0, rows, step_rows):
        block = slice(start, min(start + step_rows, rows))
        original = weight[block].detach().float()
        zeros = None if zero_point is None else zero_point[block]
        restored = torch.ops.irc.dequantize(stored[block], scale[block], zeros, format=str(chosen), dtype=dtype)
        error = restored.float().sub_(original).abs_().unflatten(-1, (num_groups, -1)).amax(-1)
        steps = error / _natural_step(original, chosen, num_groups)
        value, index = steps.flatten().nan_to_num(nan=torch.inf).max(0)
        if float(value) > most and (worst is None or float(value) > worst[0]):
            worst = (float(value), start + int(index) // num_groups, int(index) % num_groups)
    return worst


def _natural_step(original: Tensor, chosen: QuantFormat, num_groups: int) -> Tensor:
    groups = original.unflatten(-1, (num_groups, -1))
    if chosen.symmetric:
        step = torch.maximum(-groups.amin(-1), groups.amax(-1)) / ((1 << (chosen.bits - 1)) - 1)
    else:
        step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / ((1 << chosen.bits) - 1)
    # Below this a half-precision scale has lost its digits, and the whole group is as good as zero.
    return step.clamp_min(1e-6)


def worst_block(weight: Tensor, parts: Parts, chosen: Format, dtype: torch.dtype) -> tuple[float, int, int] | None:
    """As `worst_group`, for formats whose steps differ in size: the error in units of the largest that is right.

    Returns:
        (error over the largest right one, row, group), or None if no group is beyond 1.
    """
    width = weight.shape[1]
    group = width if chosen.check_group is None else chosen.check_group
    num_groups = width // group
    right = _right_errors(weight.detach(), parts, chosen, dtype, num_groups)
    errors = torch.empty_like(right)
    step_rows = max(1, BLOCK // width)
    for start in range(0, weight.shape[0], step_rows):
        block = slice(start, start + step_rows)
        own = parts._replace(
            stored=parts.stored[block],
            scale=parts.scale if parts.scale is None or chosen.per_tensor else parts.scale[block],
            zero_point=parts.zero_point if parts.zero_point is None or chosen.per_tensor else parts.zero_point[block],
        )
        error = dequantize_tensor(own, chosen, dtype).float() - weight[block].detach().float()
        errors[block] = error.unflatten(-1, (num_groups, group)).abs().amax(-1)
    share = errors / right
    value, index = share.flatten().nan_to_num(nan=torch.inf).max(0)
    if float(value) <= 1:
        return None
    return float(value), int(index) // num_groups, int(index) % num_groups


def _right_errors(weight: Tensor, parts: Parts, chosen: Format, dtype: torch.dtype, num_groups: int) -> Tensor:
    """The largest error of each group that is still right."""
    groups = weight.float().unflatten(-1, (num_groups, -1))
    right = chosen.worst_errors(groups.reshape(1, 1, -1) if chosen.per_tensor else groups).expand(groups.shape[:-1])
    # Rounding of scales (f16 at the coarsest) and of the result may come on top; see `_natural_step` for 1e-6.
    slack = (2 * torch.finfo(dtype).eps + 2**-10) * groups.abs().amax(-1) + 1e-6
    if parts.scale is not None and parts.scale.dtype == torch.float16:
        # A small scale has lost digits: half the smallest step of f16, at the format's largest number.
        slack = slack + 2.0**-25 * float(getattr(chosen, "high", 8))
    return right + slack
