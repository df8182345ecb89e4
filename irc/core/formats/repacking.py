"""The same numbers in another format, or a refusal: nothing is ever rounded here.

A tensor in a format falls apart into values, scales and offsets, number = scale * value + offset, which are then asked
whether the target can hold each of them exactly. What is compared are the numbers that are stored: a
format that computes its product in f16 still rounds that product where one that computes in f32 does not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from irc.core.errors import OptionError
from irc.core.formats.base import Format, Parts, by_group
from irc.core.formats.float4 import Float4Format, MxFloat4Format, NvFloat4Format, decode_e2m1, encode_e2m1
from irc.core.formats.float8 import Float8Format
from irc.core.formats.gguf import GgufFormat
from irc.core.formats.gguf_simple import join_simple
from irc.core.formats.integer import QuantFormat
from irc.core.formats.nibbles import pack_nibbles


class Affine(NamedTuple):
    """number = scale * value + offset, exact in f64.

    Shapes: values [..., K]; scale, offset [..., G] with G groups a row; all f64.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor


def repack(
    stored: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    source: Format,
    target: Format,
    *,
    tensor_scale: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
) -> Parts:
    """A tensor's parts in `target`, holding exactly the numbers that it holds in `source`.

    `scale_dtype`: type of the new scales where the target leaves it open; default: the old scales' type, or f32.

    Raises:
        OptionError: the target cannot hold these numbers; says which it cannot.
    """
    parts = Parts(stored, scale, zero_point, tensor_scale)
    if source == target and (scale_dtype is None or scale is None or scale.dtype == scale_dtype):
        return parts
    where = f"{source} does not fit into {target}: "
    if isinstance(target, GgufFormat) and target.layout.simple is None:
        raise OptionError(where + "only Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 are written from other formats")
    affine = _fall_apart(parts, source)
    width = affine.values.shape[-1]
    why = target.why_not_rows_of(width)
    if why is not None:
        raise OptionError(where + why)
    if scale_dtype is None:
        scale_dtype = scale.dtype if scale is not None and scale.dtype in _FLOATS else torch.float32
    try:
        return _put_together(_regrouped(affine, target), target, scale_dtype)
    except _Misfit as misfit:
        raise OptionError(where + str(misfit)) from None


_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Misfit(Exception):
    """Why numbers do not fit; never leaves this file."""


def _fall_apart(parts: Parts, source: Format) -> Affine:
    if isinstance(source, GgufFormat):
        integers, scales, offsets = source.split(parts.stored)
        scales = scales.double().squeeze(-1).flatten(-2)
        offset = torch.zeros_like(scales) if offsets is None else offsets.double().squeeze(-1).flatten(-2)
        return Affine(integers.double().flatten(-3), scales, offset)
    assert parts.scale is not None
    if isinstance(source, Float4Format):
        scale = source.real_scale(parts.scale, parts.tensor_scale).double()
        if isinstance(source, NvFloat4Format):
            assert parts.tensor_scale is not None
            scale = parts.scale.double() * parts.tensor_scale.double()
        return Affine(source.unpack(parts.stored).double(), scale, torch.zeros_like(scale))
    scale = parts.scale.double()
    if isinstance(source, Float8Format):
        return Affine(parts.stored.double(), scale, torch.zeros_like(scale))
    assert isinstance(source, QuantFormat)
    zero = torch.zeros_like(scale) if parts.zero_point is None else parts.zero_point.double()
    return Affine(source.unpack(parts.stored).double(), scale, -zero * scale)


def _regrouped(affine: Affine, target: Format) -> Affine:
    """Scales and offsets a group of the target: repeated where its groups are smaller, merged where all are equal."""
    values, scale, offset = affine
    width, rows = values.shape[-1], tuple(values.shape[:-1])
    scale, offset = (t.expand(*rows, t.shape[-1]) for t in (scale, offset))
    wanted = 1 if target.group_size is None else width // target.group_size
    have = scale.shape[-1]
    if wanted % have == 0:
        scale, offset = (t.repeat_interleave(wanted // have, dim=-1) for t in (scale, offset))
    elif have % wanted == 0:
        scale, offset = _merged(scale, wanted), _merged(offset, wanted)
    else:
        raise _Misfit(f"{have} groups a row cannot be laid over {wanted}")
    if target.per_tensor:
        scale, offset = (_merged(t.reshape(1, -1), 1).reshape((1,) * values.ndim) for t in (scale, offset))
    return Affine(values, scale, offset)


def _merged(per_group: Tensor, wanted: int) -> Tensor:
    together = per_group.unflatten(-1, (wanted, -1))
    first = together[..., :1]
    differing = (together != first).any(-1)
    if bool(differing.any()):
        raise _Misfit(f"{int(differing.sum())} of its groups would join others of another scale or offset")
    return first.squeeze(-1)


def _put_together(affine: Affine, target: Format, scale_dtype: torch.dtype) -> Parts:
    if isinstance(target, GgufFormat):
        return _to_gguf(affine, target)
    if isinstance(target, QuantFormat):
        return _to_integers(affine, target, scale_dtype)
    _must(affine.offset == 0, "groups have an offset, and it has none", affine.offset)
    if isinstance(target, Float8Format):
        stored = affine.values.float().to(target.storage_dtype)
        _must(stored.double() == affine.values, f"numbers are no {target.kind} values", affine.values)
        return Parts(stored, _exactly(affine.scale, scale_dtype, "scales"))
    assert isinstance(target, Float4Format)
    codes = encode_e2m1(affine.values.float())
    _must(decode_e2m1(codes).double() == affine.values, "numbers are no e2m1 values", affine.values)
    return Parts(pack_nibbles(codes), *_float4_scales(affine.scale, target, scale_dtype))


def _float4_scales(scale: Tensor, target: Float4Format, scale_dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    if isinstance(target, NvFloat4Format):
        # e4m3 times one f32 number: with a tensor scale of 1, the scales themselves must be e4m3 numbers.
        one = torch.ones(1, dtype=torch.float32, device=scale.device)
        return _exactly(scale, torch.float8_e4m3fn, "scales"), None, one
    if isinstance(target, MxFloat4Format):
        mantissa, exponent = torch.frexp(scale)
        _must(mantissa == 0.5, "scales are no powers of two", scale)
        _must((exponent >= -126) & (exponent <= 128), "scales lie outside of 2^-127 to 2^127", scale)
        return ((exponent - 1 + 127).to(torch.uint8),)
    return (_exactly(scale, scale_dtype, "scales"),)


def _to_integers(affine: Affine, target: QuantFormat, scale_dtype: torch.dtype) -> Parts:
    values, scale, offset = affine
    # A group of scale 0 holds its offset and nothing else.
    shift = torch.where(scale == 0, 0, -offset / torch.where(scale == 0, 1, scale))
    _must((shift * scale == -offset) & (shift == shift.round()), "offsets are no whole number of steps", offset)
    if target.symmetric:
        # Without a zero point: the integers move instead.
        values, shift = (by_group(values, shift) - shift.unsqueeze(-1)).flatten(-2), torch.zeros_like(shift)
    else:
        values, shift = (t + _move_into(values, target) for t in (values, shift))
    inside = (values >= target.lowest_stored) & (values <= target.high) & (values == values.round())
    _must(inside, f"numbers are no integers from {target.lowest_stored} to {target.high}", values)
    stored = target.pack(values.to(torch.int16))
    new_scale = _exactly(scale, scale_dtype, "scales")
    if target.symmetric:
        return Parts(stored, new_scale)
    return Parts(stored, new_scale, _exactly(shift, target.zero_point_dtype, "zero points"))


def _move_into(values: Tensor, target: QuantFormat) -> float:
    """What to add to integers, and to their zero points, so that the integers lie in the target's range."""
    lowest, highest = float(values.min()), float(values.max())
    if lowest < target.lowest_stored:
        return target.lowest_stored - lowest
    return target.high - highest if highest > target.high else 0.0


def _to_gguf(affine: Affine, target: GgufFormat) -> Parts:
    form = target.layout.simple
    assert form is not None
    values, scale, offset = affine
    if form.has_offset:
        move = _lift(by_group(values, scale), form.high)
        values, offset = (by_group(values, scale) + move.unsqueeze(-1)).flatten(-2), offset - move * scale
    else:
        shift = torch.where(scale == 0, 0, offset / torch.where(scale == 0, 1, scale))
        _must(shift * scale == offset, "offsets are no whole number of steps, and it has none", offset)
        values, offset = (by_group(values, scale) + shift.unsqueeze(-1)).flatten(-2), torch.zeros_like(offset)
    inside = (values >= form.low) & (values <= form.high) & (values == values.round())
    _must(inside, f"numbers are no integers from {form.low} to {form.high}", values)
    scales = _exactly(scale, torch.float16, "scales").float().unsqueeze(-1)
    offsets = _exactly(offset, torch.float16, "offsets").float().unsqueeze(-1) if form.has_offset else None
    return Parts(join_simple(form, by_group(values.float(), scale), scales, offsets).flatten(-2))


def _lift(groups: Tensor, high: int) -> Tensor:
    """What to add to each group's integers so that none is negative.

    A power of two if it leaves them within `high`: its product with the scale has no more digits than the scale.
    """
    below = -groups.amin(-1)
    power = torch.exp2(below.clamp(min=1).log2().ceil())
    lift = torch.where(groups.amax(-1) + power <= high, power, below)
    return torch.where(below > 0, lift, 0)


def _exactly(values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    if dtype.is_floating_point:
        result = values.to(dtype)
    else:
        limits = torch.iinfo(dtype)
        result = values.clamp(limits.min, limits.max).to(dtype)
    _must(result.double() == values, f"{what} cannot be held as {str(dtype).removeprefix('torch.')}", values)
    return result


def _must(holds: Tensor, what: str, values: Tensor) -> None:
    wrong = ~holds
    if bool(wrong.any()):
        raise _Misfit(f"{int(wrong.sum())} of {wrong.numel()} {what} (first: {float(values[wrong][0]):g})")
