"""Scales of GGUF super-blocks by search: each group tries several scales and keeps the one with least error.

For a scale under trial the integers follow by rounding, and for those integers the best scale (and minimum)
follow by least squares; the pair of least weighted error wins. Large numbers weigh more, since errors there cost a
product more. Then the groups' scales are themselves rounded to the super-block's unit, and the integers are
rounded once more to fit.

Source: the idea of llama.cpp's make_qx_quants and make_qkx2_quants (`ggml/src/ggml-quants.c`), for whole tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def search_q2_k(x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    groups = x.unflatten(-1, (16, 16))
    trials = [-0.5 + 0.1 * i for i in range(16)]
    weights = groups.abs() if importance is None else _weighted(groups, importance)
    return _with_minima(groups, weights, high=3, unit=15, trials=trials)


def search_q4_k(x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    groups = x.unflatten(-1, (8, 32))
    weights = _importance(groups) if importance is None else _weighted(groups, importance)
    return _with_minima(groups, weights, high=15, unit=63, trials=[-1 + 0.1 * i for i in range(21)])


def search_q5_k(x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    groups = x.unflatten(-1, (8, 32))
    weights = _importance(groups) if importance is None else _weighted(groups, importance)
    return _with_minima(groups, weights, high=31, unit=63, trials=[-0.5 + 0.1 * i for i in range(16)])


def search_q3_k(x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    groups = x.unflatten(-1, (16, 16))
    weights = groups.square() if importance is None else _weighted(groups, importance)
    return _centred(groups, weights, half=4, unit=32)


def search_q6_k(x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    groups = x.unflatten(-1, (16, 16))
    weights = groups.square() if importance is None else _weighted(groups, importance)
    return _centred(groups, weights, half=32, unit=128)


def _importance(groups: Tensor) -> Tensor:
    """A number's own size over the group's typical size, so that small numbers count too."""
    return groups.square().mean(-1, keepdim=True).sqrt() + groups.abs()


def _weighted(groups: Tensor, importance: Tensor) -> Tensor:
    """What errors count where each column's inputs are known: their mean square, times the number's own size."""
    spread = groups.square().mean((-1, -2), keepdim=True)
    return importance.unflatten(-1, groups.shape[-2:]).to(groups.dtype) * (spread + groups.square()).sqrt()


def _with_minima(
    groups: Tensor, weights: Tensor, *, high: int, unit: int, trials: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(codes, scales, minima, d, dmin) with number = d * scale * code - dmin * minimum; minima are not negative."""
    scale, minimum = _affine_search(groups, weights, high, trials)
    d, scales = _in_units(scale, unit)
    dmin, minima = _in_units(minimum, unit)
    step, base = d * scales, dmin * minima
    codes = ((groups + base.unsqueeze(-1)) * _inverse(step).unsqueeze(-1)).round().clamp(0, high)
    return codes.flatten(-2), scales, minima, d, dmin


def _affine_search(groups: Tensor, weights: Tensor, high: int, trials: list[float]) -> tuple[Tensor, Tensor]:
    """Scale and minimum (as a positive offset) of each group with least weighted squared error."""
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    span = groups.amax(-1, keepdim=True) - low
    sum_w, sum_x = weights.sum(-1, keepdim=True), (weights * groups).sum(-1, keepdim=True)
    best_scale, best_low = span / high, low
    best = _error(groups, weights, _codes(groups, low, _inverse(best_scale), high), best_scale, low)
    for trial in trials:
        codes = _codes(groups, low, (high + trial) * _inverse(span), high)
        weighted = weights * codes
        sum_q, sum_qq = weighted.sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True)
        sum_xq = (weighted * groups).sum(-1, keepdim=True)
        determinant = sum_w * sum_qq - sum_q * sum_q
        inverse = _inverse(determinant)
        scale, offset = (sum_w * sum_xq - sum_x * sum_q) * inverse, (sum_qq * sum_x - sum_q * sum_xq) * inverse
        # The minimum is stored without a sign: one above zero becomes zero, and the scale is fitted alone.
        positive = offset > 0
        scale = torch.where(positive, sum_xq * _inverse(sum_qq), scale)
        offset = torch.where(positive, 0, offset)
        error = _error(groups, weights, codes, scale, offset)
        better = (error < best) & (determinant > 0) & (scale > 0)
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
        best_low = torch.where(better, offset, best_low)
    return best_scale.squeeze(-1), -best_low.squeeze(-1)


def _codes(groups: Tensor, low: Tensor, inverse: Tensor, high: int) -> Tensor:
    return ((groups - low) * inverse).round_().clamp_(0, high)


def _error(groups: Tensor, weights: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return ((codes * scale + offset - groups).square_() * weights).sum(-1, keepdim=True)


def _centred(groups: Tensor, weights: Tensor, *, half: int, unit: int) -> tuple[Tensor, Tensor, Tensor]:
    """(integers, scales, d) with number = d * scale * integer, integers from -half to half - 1."""
    scale = _centred_search(groups, weights, half).squeeze(-1)
    # The lowest unit has no positive twin: the scale of largest magnitude takes it.
    largest = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))
    d = _as_half(largest / -unit)
    scales = (scale * _inverse(d)).round().clamp(-unit, unit - 1)
    integers = (groups * _inverse(d * scales).unsqueeze(-1)).round().clamp(-half, half - 1)
    return integers.flatten(-2), scales, d


def _centred_search(groups: Tensor, weights: Tensor, half: int) -> Tensor:
    """The scale of each group with least weighted error; it may be negative."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best_scale = torch.zeros_like(largest)
    best = torch.zeros_like(largest)
    for trial in range(-9, 10):
        integers = (groups * (-(half + 0.1 * trial) * _inverse(largest))).round_().clamp_(-half, half - 1)
        weighted = weights * integers
        sum_xq, sum_qq = (weighted * groups).sum(-1, keepdim=True), (weighted * integers).sum(-1, keepdim=True)
        scale = sum_xq * _inverse(sum_qq)
        # What the fit explains of the weighted squares: most is best.
        explained = scale * sum_xq
        better = explained > best
        best, best_scale = torch.where(better, explained, best), torch.where(better, scale, best_scale)
    return best_scale


def _in_units(values: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """(d, integers 0 to unit) so that d * integer is near each value; d as f16 will hold it."""
    d = _as_half(values.amax(-1, keepdim=True) / unit)
    return d, (values * _inverse(d)).round().clamp(0, unit)


def _as_half(values: Tensor) -> Tensor:
    return values.to(torch.float16).float()


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values == 0, 0, 1 / values)
