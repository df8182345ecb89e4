"""Whole tensors in a format: scales by extreme values and rounding to nearest, a block of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from irc.core.formats.base import Format, Parts, ScaledFormat, Scales

# Numbers a block: small enough for the blocks' temporaries to stay in the cache.
BLOCK = 1 << 19


def compute_scales(x: Tensor, chosen: Format, scale_dtype: torch.dtype = torch.float32) -> Scales:
    """Scale, zero point and tensor scale by the extreme values of each group; None where the format has none."""
    return chosen.compute_scales(x, scale_dtype)


def quantize_tensor(x: Tensor, chosen: Format, scale_dtype: torch.dtype = torch.float32) -> Parts:
    """Round a tensor [N, K] to nearest in a format. On the meta device: types only."""
    x = x.detach()
    if x.device.type == "meta":
        return _types_only(x, chosen, scale_dtype)
    whole = _scales_of_whole(x, chosen, scale_dtype)
    step = max(1, BLOCK // max(1, x.shape[-1]))
    blocks = []
    for start in range(0, x.shape[0], step):
        rows = x[start : start + step].float()
        if not isinstance(chosen, ScaledFormat):
            scales = Scales()
        elif chosen.per_tensor:
            scales = whole
        else:
            groups = rows.unflatten(-1, (chosen.scale_shape(tuple(rows.shape))[-1], -1))
            low, high = groups.amin(-1), groups.amax(-1)  # aminmax takes six times as long
            scales = chosen.scales_of_range(low, high, scale_dtype, whole.tensor_scale)
        blocks.append(Parts(chosen.quantize(rows, *scales), *scales))
    shared = chosen.per_tensor
    return Parts(
        torch.cat([block.stored for block in blocks]),
        whole.scale if shared else _cat([block.scale for block in blocks]),
        whole.zero_point if shared else _cat([block.zero_point for block in blocks]),
        whole.tensor_scale,
    )


def dequantize_tensor(parts: Parts, chosen: Format, dtype: torch.dtype | None = None) -> Tensor:
    """The real numbers of a tensor in a format."""
    stored, scale, zero_point, tensor_scale = parts
    dtype = dtype or chosen.result_dtype(scale)
    shape = chosen.logical_shape(tuple(stored.shape))
    step = max(1, BLOCK // max(1, shape[-1]))
    if stored.device.type == "meta" or stored.ndim != 2 or shape[0] <= step:
        return chosen.dequantize(stored, scale, zero_point, dtype, tensor_scale)
    result = torch.empty(shape, dtype=dtype, device=stored.device)
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        own = scale if scale is None or chosen.per_tensor else scale[rows]
        zeros = zero_point if zero_point is None or chosen.per_tensor else zero_point[rows]
        result[rows] = chosen.dequantize(stored[rows], own, zeros, dtype, tensor_scale)
    return result


def _scales_of_whole(x: Tensor, chosen: Format, scale_dtype: torch.dtype) -> Scales:
    """The scales that the whole tensor shares."""
    if not isinstance(chosen, ScaledFormat):
        return Scales()
    if not chosen.per_tensor:
        if not chosen.has_tensor_scale:
            return Scales()
        low, high = torch.aminmax(x)
        return Scales(tensor_scale=chosen.tensor_scale_of(low.float(), high.float()))
    return chosen.compute_scales(x, scale_dtype)


def _types_only(x: Tensor, chosen: Format, scale_dtype: torch.dtype) -> Parts:
    shape = tuple(x.shape)
    groups = chosen.scale_shape(shape)

    def empty(size: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor | None:
        return None if size is None else torch.empty(size, dtype=dtype, device=x.device)

    zero_dtype = getattr(chosen, "zero_point_dtype", torch.uint8)
    return Parts(
        torch.empty(chosen.stored_shape(shape), dtype=chosen.storage_dtype, device=x.device),
        empty(groups, chosen.scale_dtype(scale_dtype)),
        None if chosen.symmetric else empty(groups, zero_dtype),
        empty((1,), torch.float32) if chosen.has_tensor_scale else None,
    )


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None
