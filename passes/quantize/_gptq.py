"""The numerical core of GPTQ: integers that make up for one another's rounding, as seen by the layer's inputs.

With H = XᵀX over calibration inputs X, the squared error of a layer's outputs is tr((W - Ŵ) H (W - Ŵ)ᵀ), row by
row. Everything here lowers that number and nothing else; rows are independent.

Source: Frantar et al. 2022 (GPTQ), https://arxiv.org/abs/2210.17323, in its Cholesky form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from irc.core.errors import IrcError
from irc.core.formats import QuantFormat

_BLOCK = 128
_SHRINK_STEPS = 32


@dataclass(frozen=True)
class Grid:
    """What a row may be rounded to: scale [N, K / group], zero point likewise or None, smallest and largest integer."""

    scale: Tensor
    zero_point: Tensor | None
    low: int
    high: int

    def columns(self, width: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each column: [N, K] each."""
        repeats = width // self.scale.shape[1]
        scale = self.scale.repeat_interleave(repeats, 1)
        zero = torch.zeros_like(scale) if self.zero_point is None else self.zero_point.repeat_interleave(repeats, 1)
        return scale, zero


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H with `damping` of its mean diagonal added (and all of it where an input is never active).

    Raises:
        IrcError: H holds numbers that are not finite, or is zero.
    """
    diagonal = hessian.diagonal()
    if not bool(hessian.isfinite().all()):
        raise IrcError("its inputs hold numbers that are not finite")
    mean = float(diagonal.mean())
    if mean <= 0:
        raise IrcError("its inputs are zero in all calibration data")
    dead = diagonal <= 0
    added = torch.full_like(diagonal, damping * mean)
    added[dead] += mean
    return hessian + torch.diag(added)


def search_scales(weight: Tensor, chosen: QuantFormat, importance: Tensor, *, smallest: float = 0.35) -> Grid:
    """Scales that round a group with the least importance-weighted error, from a grid between full range and less.

    Shapes: weight f32[N, K]; importance [K], mostly H's diagonal.
    """
    rows, width = weight.shape
    num_groups = chosen.scale_shape((rows, width))[-1]
    groups = weight.unflatten(-1, (num_groups, -1))
    by_group = importance.clamp_min(1e-30).view(1, num_groups, -1)
    low, high = groups.amin(-1), groups.amax(-1)
    best: tuple[Tensor, Tensor | None] | None = None
    least = torch.full_like(low, torch.inf)
    for ratio in torch.linspace(1.0, smallest, _SHRINK_STEPS).tolist():
        scale, zero = _range_grid(low * ratio, high * ratio, chosen)
        shift = 0.0 if zero is None else zero.unsqueeze(-1)
        q = (groups / scale.unsqueeze(-1)).round_().add_(shift).clamp_(chosen.low, chosen.high)
        error = ((q.sub_(shift)).mul_(scale.unsqueeze(-1)).sub_(groups).square_() * by_group).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        if best is None:
            best = scale, zero
        else:
            kept = None if zero is None or best[1] is None else torch.where(better, zero, best[1])
            best = torch.where(better, scale, best[0]), kept
    assert best is not None
    return Grid(*best, chosen.low, chosen.high)


def make_grid(weight: Tensor, chosen: QuantFormat, importance: Tensor | None) -> Grid:
    """Scales from each group's range, or, with `importance` [K], those of the least weighted error."""
    if importance is not None:
        return search_scales(weight, chosen, importance)
    num_groups = chosen.scale_shape(tuple(weight.shape))[-1]
    low, high = torch.aminmax(weight.unflatten(-1, (num_groups, -1)), dim=-1)
    return Grid(*_range_grid(low, high, chosen), chosen.low, chosen.high)


def _range_grid(low: Tensor, high: Tensor, chosen: QuantFormat) -> tuple[Tensor, Tensor | None]:
    if chosen.symmetric:
        scale = torch.maximum(-low, high) / chosen.high
        return torch.where(scale > 0, scale, 1.0), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (chosen.high - chosen.low)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (chosen.low - low / scale).round().clamp(chosen.low, chosen.high)


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, *, act_order: bool = True) -> Tensor:
    """Integers f32[N, K]: each column is rounded, and the rest take over its error as H says.

    Shapes: weight f32[N, K]; hessian f32[K, K], damped.
    `act_order`: columns of the most active inputs first. Scales are fixed beforehand (static groups), so the order
    costs nothing at run time.

    Raises:
        IrcError: H is not positive definite: more damping or more calibration data.
    """
    width = weight.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True) if act_order else torch.arange(width)
    scale, zero = (part[:, order] for part in grid.columns(width))
    factor = _inverse_factor(hessian[order][:, order])
    left = weight[:, order].clone()
    found = torch.empty_like(left)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        block, errors = left[:, start:stop], torch.empty_like(left[:, start:stop])
        local = factor[start:stop, start:stop]
        for i in range(stop - start):
            column, s, z = block[:, i], scale[:, start + i], zero[:, start + i]
            q = (column / s).round_().add_(z).clamp_(grid.low, grid.high)
            found[:, start + i] = q
            error = (column - (q - z) * s) / local[i, i]
            block[:, i:].addr_(error, local[i, i:], alpha=-1)
            errors[:, i] = error
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    result = torch.empty_like(found)
    result[:, order] = found
    return result


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of H⁻¹."""
    wide = hessian.double()
    lower, info = torch.linalg.cholesky_ex(wide)
    if int(info):
        raise IrcError(
            "the Gram matrix of its inputs is not positive definite: raise damping, or calibrate on more data"
        )
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(info):
        raise IrcError("the inverse of its inputs' Gram matrix is not positive definite: raise damping")
    return upper.float()
