"""Scales of GGUF super-blocks by search: each group tries several scales and keeps the one with least error.

For a scale under trial the integers follow by rounding, and for those integers the best scale (and minimum) follow by
least squares; the pair of least weighted error wins. Then the groups' scales are themselves rounded to the
super-block's unit, and the integers are rounded once more to fit. With an importance for each column, scales and
minima are fitted to their units by error, too.

llama.cpp computes all of this in f32, one number after the other. So do the functions here, for all groups at once:
sums are taken in its order, quotients are quotients, and the bytes are the same.

Shapes: a group's n numbers lie along the first axis, [n, blocks…, groups], so that a sum in order is n additions.

Source: what make_qkx2_quants, make_qkx3_quants, make_qp_quants, make_qx_quants and make_q3_quants of llama.cpp compute
(`ggml/src/ggml-quants.c`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_TINY = 1e-15  # below it llama.cpp takes a group for zeros
_TRIES = 5  # rounds of moving single integers


class _Affine(NamedTuple):
    """How groups of integers 0 to high with a minimum are searched: scales (first + step * i + high) / range."""

    high: int
    unit: int
    first: float
    step: float
    trials: int
    absolute: bool = False  # errors count by size, not squared


def search_q2_k(x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    groups = _first_axis(x, 16)
    if importance is None:
        return _with_minima(groups, groups.abs(), None, _Affine(3, 15, -0.5, 0.1, 16, absolute=True))
    weights = _weighted(x, importance, 16, 1.0)
    return _with_minima(groups, weights, _sum(weights), _Affine(3, 15, -0.9, 0.05, 37))


def search_q4_k(x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    return _of_32(x, importance, _Affine(15, 63, -1.0, 0.1, 21))


def search_q5_k(x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    return _of_32(x, importance, _Affine(31, 63, -0.5, 0.1, 16))


def _of_32(x: Tensor, importance: Tensor | None, plan: _Affine) -> tuple[Tensor, ...]:
    groups = _first_axis(x, 32)
    if importance is None:
        weights = _root(_sum(groups * groups) / 32) + groups.abs()
        return _with_minima(groups, weights, None, plan)
    weights = _weighted(x, importance, 32, 2.0)
    return _with_minima(groups, weights, _sum(weights), plan._replace(first=-0.9, step=0.05, trials=37))


def search_q3_k(x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    groups = _first_axis(x, 16)
    if importance is None:
        scale, integers = _descend(groups, 4)
        d, scales = _signed_units(scale, 32)
        d = _as_half(d)
    else:
        weights = _weighted(x, importance, 16, 2.0)
        scale, integers = _centred_search(groups, weights, 4)
        d, scales = _centred_search(scale.movedim(-1, 0), _sum(weights).movedim(-1, 0), 32)
        d, scales = _as_half(d).unsqueeze(-1), scales.movedim(0, -1)
    return _round_centred(groups, integers, scales, d, 4)


def search_q6_k(x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    groups = _first_axis(x, 16)
    weights = groups * groups if importance is None else _first_axis(importance.to(groups.dtype), 16)
    scale, integers = _centred_search(groups, weights, 32)
    d, scales = _signed_units(scale, 128)
    empty = scale.abs().amax(-1, keepdim=True) < _TINY
    d, scales = torch.where(empty, 0, _as_half(d)), torch.where(empty, 0, scales)
    return _round_centred(groups, torch.where(empty, -32, integers), scales, d, 32)


# ------------------------------------------------------------------ in llama.cpp's order


def _first_axis(x: Tensor, size: int) -> Tensor:
    """[blocks…, 256] → [size, blocks…, groups]."""
    return x.unflatten(-1, (-1, size)).movedim(-1, 0).contiguous()


def _sum(terms: Tensor) -> Tensor:
    """Over the first axis, from the first term on."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def _over(numerator: float, values: Tensor) -> Tensor:
    """numerator / values; a plain number over a tensor would be multiplied by the rounded inverse."""
    return torch.div(torch.full((), numerator, dtype=values.dtype, device=values.device), values)


def _numbers(first: float, step: float, count: Iterable[int], offset: float) -> list[float]:
    """(first + step * i) + offset in f32."""
    single = np.float32
    return [float(single(single(first) + single(step) * single(i)) + single(offset)) for i in count]


def _weighted(x: Tensor, importance: Tensor, size: int, factor: float) -> Tensor:
    """What errors count where each column's inputs are known: their mean square, times the number's own size."""
    total = _sum((x * x).movedim(-1, 0)) * factor / 256
    spread = _root(total.unsqueeze(-1) + x * x)
    return _first_axis(importance.to(x.dtype) * spread, size)


def _root(values: Tensor) -> Tensor:
    """Rounded to nearest, which the f32 square root of vector libraries is not always."""
    return values.double().sqrt().to(values.dtype)


def _as_half(values: Tensor) -> Tensor:
    return values.to(torch.float16).float()


# ------------------------------------------------------------------ integers from 0, with a minimum


def _with_minima(groups: Tensor, weights: Tensor, sizes: Tensor | None, plan: _Affine) -> tuple[Tensor, ...]:
    """(codes, scales, minima, d, dmin) with number = d * scale * code - dmin * minimum; minima are not negative.

    `sizes`: what errors of each group's scale count, to fit the scales to their unit by; None: the largest fits it.
    """
    scale, minimum, codes = _affine_search(groups, weights, plan)
    if sizes is None:
        (d, scales), (dmin, minima) = _units(scale, plan.unit), _units(minimum, plan.unit)
    else:
        (d, scales), (dmin, minima) = _fit_units(scale, sizes, plan.unit), _fit_units(minimum, sizes, plan.unit)
    d, dmin = _as_half(d), _as_half(dmin)
    step, base = d * scales, dmin * minima
    again = ((groups + base) / step).round_().clamp_(0, plan.high)
    codes = torch.where(step == 0, codes, again)
    return codes.movedim(0, -1).flatten(-2), scales, minima, d, dmin


def _affine_search(groups: Tensor, weights: Tensor, plan: _Affine) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, minimum (as a positive offset) and codes of each group with least weighted error."""
    top, low = groups.amax(0), groups.amin(0).clamp_(max=0)
    flat = top == low
    sum_w, sum_x = _sum(weights), _sum(weights * groups)
    inverse = _over(plan.high, top - low)
    scale, codes = _over(1.0, inverse), _codes(groups, low, inverse, plan.high)
    best = _error(groups, weights, codes, scale, low, plan.absolute)
    first_low = low
    for number in _numbers(plan.first, plan.step, range(plan.trials), plan.high):
        tried = _codes(groups, low, _over(number, top - low), plan.high)
        weighted = weights * tried
        sum_q, sum_qq, sum_xq = _sum(weighted), _sum(weighted * tried), _sum(weighted * groups)
        determinant = sum_w * sum_qq - sum_q * sum_q
        slope = (sum_w * sum_xq - sum_x * sum_q) / determinant
        offset = (sum_qq * sum_x - sum_q * sum_xq) / determinant
        # The minimum is stored without a sign: one above zero becomes zero, and the scale is fitted alone.
        slope, offset = torch.where(offset > 0, sum_xq / sum_qq, slope), offset.clamp(max=0)
        error = _error(groups, weights, tried, slope, offset, plan.absolute)
        better = (error < best) & (determinant > 0)
        best, scale = torch.where(better, error, best), torch.where(better, slope, scale)
        # The range that later scales are tried over begins at the minimum found so far.
        low, codes = torch.where(better, offset, low), torch.where(better, tried, codes)
    zero = torch.zeros_like(scale)
    return torch.where(flat, zero, scale), -torch.where(flat, first_low, low), torch.where(flat, zero, codes)


def _codes(groups: Tensor, low: Tensor, inverse: Tensor, high: int) -> Tensor:
    return ((groups - low) * inverse).round_().clamp_(0, high)


def _error(groups: Tensor, weights: Tensor, codes: Tensor, scale: Tensor, low: Tensor, absolute: bool) -> Tensor:
    difference = codes * scale + low - groups
    return _sum(weights * (difference.abs() if absolute else difference * difference))


def _units(values: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """(d, integers 0 to unit) so that d * integer is near each value, the largest value exactly."""
    largest = values.amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 0)  # never -0
    integers = (torch.where(largest > 0, _over(unit, largest), 0) * values).round().clamp(0, unit)
    return largest / torch.full_like(largest, unit), integers


def _fit_units(values: Tensor, sizes: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """The same, where errors count by size: the best of nine units, and then one integer after the other."""
    x, w = values.movedim(-1, 0), sizes.movedim(-1, 0)
    largest = x.amax(0).clamp(min=0)
    inverse = _over(unit, largest)
    best = _unit_error(x, w, (inverse * x).round(), inverse)
    for number in _numbers(0.0, 0.1, range(-4, 5), unit):
        tried = _over(number, largest)
        error = _unit_error(x, w, (tried * x).round().clamp(max=unit), tried)
        better = error < best
        best, inverse = torch.where(better, error, best), torch.where(better, tried, inverse)
    integers = (inverse * x).round().clamp(max=unit)
    d, integers = _move_single(x, w, integers, 0, unit, both_positive=True)
    empty = largest < _TINY
    return torch.where(empty, 0, d).unsqueeze(-1), torch.where(empty, 0, integers).movedim(0, -1)


def _unit_error(x: Tensor, w: Tensor, integers: Tensor, inverse: Tensor) -> Tensor:
    difference = x - _over(1.0, inverse) * integers
    return _sum(w * difference * difference)


def _move_single(
    x: Tensor, w: Tensor, integers: Tensor, low: int, high: int, *, both_positive: bool
) -> tuple[Tensor, Tensor]:
    """The best scale of given integers, each of which in turn moves where that explains more."""
    rows = list(integers.unbind(0))
    sum_xq, sum_qq = _sum(w * x * integers), _sum(w * integers * integers)
    for _ in range(_TRIES):
        before = list(rows)
        for index, (value, weight) in enumerate(zip(x, w, strict=True)):
            old = rows[index]
            rest_xq, rest_qq = sum_xq - weight * value * old, sum_qq - weight * old * old
            moved = (value * rest_qq / rest_xq).round().clamp(low, high)
            new_xq, new_qq = rest_xq + weight * value * moved, rest_qq + weight * moved * moved
            better = (rest_xq > 0) & (moved != old) & (new_xq * new_xq * sum_qq > sum_xq * sum_xq * new_qq)
            better &= (rest_qq > 0) if both_positive else (new_qq > 0)
            rows[index] = torch.where(better, moved, old)
            sum_xq, sum_qq = torch.where(better, new_xq, sum_xq), torch.where(better, new_qq, sum_qq)
        if _are_same(before, rows):
            break
    return torch.where(sum_qq > 0, sum_xq / sum_qq, 0), torch.stack(rows)


def _are_same(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether nothing moved, so that a further round would not either; of tensors without numbers nobody knows."""
    if any(isinstance(one, FakeTensor) or one.device.type == "meta" for one in after):
        return False
    return all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


# ------------------------------------------------------------------ integers around 0


def _largest(x: Tensor) -> Tensor:
    """The first number of largest magnitude along the first axis."""
    size = x.abs().amax(0)
    found = x[-1]
    for row in x.flip(0)[1:]:
        found = torch.where(row.abs() == size, row, found)
    return found


def _descend(groups: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Scale and integers, from the range's own scale on by moving single integers."""
    largest = _largest(groups)
    integers = (_over(-half, largest) * groups).round().clamp(-half, half - 1)
    scale, integers = _move_single(groups, groups * groups, integers, -half, half - 1, both_positive=False)
    empty = largest.abs() < _TINY
    return torch.where(empty, 0, scale), torch.where(empty, -half, integers)


def _centred_search(x: Tensor, weights: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Scale and integers of each group with least weighted error; the scale may be negative."""
    largest = _largest(x)
    products = weights * x

    def fit(number: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        integers = (_over(-number, largest) * x).round_().clamp_(-half, half - 1)
        sum_xq, sum_qq = _sum(products * integers), _sum(weights * integers * integers)
        return integers, sum_xq, sum_qq, torch.where(sum_qq == 0, 0, sum_xq / sum_qq)

    chosen, sum_xq, _, scale = fit(float(half))
    best = scale * sum_xq
    for number in _numbers(0.0, 0.1, [*range(-9, 0), *range(1, 10)], half):
        integers, sum_xq, sum_qq, slope = fit(number)
        # What a fit explains of the weighted squares: most is best.
        better = (sum_qq > 0) & (sum_xq * sum_xq > best * sum_qq)
        scale, best = torch.where(better, slope, scale), torch.where(better, slope * sum_xq, best)
        chosen = torch.where(better, integers, chosen)
    empty = largest.abs() < _TINY
    return torch.where(empty, 0, scale), torch.where(empty, -half, chosen)


def _signed_units(scale: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """(d, integers): the scale of largest magnitude becomes -unit, which has no positive twin."""
    largest = _largest(scale.movedim(-1, 0)).unsqueeze(-1)
    inverse = _over(-unit, largest)
    integers = (inverse * scale).round().clamp(-unit, unit - 1)
    empty = largest == 0
    return torch.where(empty, 0, _over(1.0, inverse)), torch.where(empty, -unit, integers)


def _round_centred(groups: Tensor, integers: Tensor, scales: Tensor, d: Tensor, half: int) -> tuple[Tensor, ...]:
    """(integers, scales, d) with number = d * scale * integer; where that scale is 0, the search's integers."""
    step = d * scales
    again = (groups / step).round_().clamp_(-half, half - 1)
    return torch.where(step == 0, integers, again).movedim(0, -1).flatten(-2), scales, d
