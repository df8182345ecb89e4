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
_SHRINK_STEPS = 80
# Numbers whose temporaries stay in the cache while all steps of a search pass over them.
_CACHED = 1 << 17


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


def damping_of(hessian: Tensor, damping: float) -> Tensor:
    """What to add to H's diagonal [K]: `damping` of its mean, and the mean itself where an input is never active.

    Raises:
        IrcError: H holds numbers that are not finite, or is zero.
    """
    diagonal = hessian.diagonal()
    if not bool(hessian.isfinite().all()):
        raise IrcError("its inputs hold numbers that are not finite")
    mean = float(diagonal.mean())
    if mean <= 0:
        raise IrcError("its inputs are zero in all calibration data")
    return torch.where(diagonal > 0, damping * mean, (1 + damping) * mean)


def search_scales(
    weight: Tensor, chosen: QuantFormat, importance: Tensor, *, smallest: float = 0.3, negative: bool = False
) -> Grid:
    """Scales that round a group with the least importance-weighted error, from a grid between full range and less.

    Integers run over all that can be stored, -2^(bits-1) included: the extreme weight of a group that is negative
    fits with a smaller step. With `negative`, scales may be negative, so that this holds for every group.

    Shapes: weight f32[N, K]; importance [K], of the squared errors.
    """
    rows, width = weight.shape
    num_groups = chosen.scale_shape((rows, width))[-1]
    by_group = importance.clamp_min(1e-30).view(1, num_groups, -1)
    step = max(1, _CACHED // width)
    found = [
        _search_block(part.unflatten(-1, (num_groups, -1)), chosen, by_group, smallest, negative)
        for part in weight.split(step)
    ]
    zeros = [zero for _, zero in found if zero is not None]
    scale = torch.cat([scale for scale, _ in found])
    return Grid(scale, torch.cat(zeros) if zeros else None, chosen.lowest_stored, chosen.high)


def _search_block(
    groups: Tensor, chosen: QuantFormat, by_group: Tensor, smallest: float, negative: bool
) -> tuple[Tensor, Tensor | None]:
    low, high = torch.aminmax(groups, dim=-1)
    best, kept = _range_grid(low, high, chosen)
    least = torch.full_like(low, torch.inf)
    signs = (1.0, -1.0) if negative and chosen.symmetric else (1.0,)
    for ratio in torch.linspace(1.0, smallest, _SHRINK_STEPS).tolist():
        positive, zero = _range_grid(low * ratio, high * ratio, chosen)
        shift = 0.0 if zero is None else zero.unsqueeze(-1)
        for sign in signs:
            scale = positive * sign
            q = (groups / scale.unsqueeze(-1)).round_().add_(shift).clamp_(chosen.lowest_stored, chosen.high)
            error = ((q.sub_(shift)).mul_(scale.unsqueeze(-1)).sub_(groups).square_().mul_(by_group)).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, scale, best)
            kept = None if kept is None or zero is None else torch.where(better, zero, kept)
    return best, kept


def make_grid(weight: Tensor, chosen: QuantFormat, importance: Tensor | None = None, *, negative: bool = False) -> Grid:
    """Scales from each group's range, or, with `importance` [K], those of the least weighted error."""
    if importance is not None:
        return search_scales(weight, chosen, importance, negative=negative)
    num_groups = chosen.scale_shape(tuple(weight.shape))[-1]
    low, high = torch.aminmax(weight.unflatten(-1, (num_groups, -1)), dim=-1)
    return Grid(*_range_grid(low, high, chosen), chosen.lowest_stored, chosen.high)


def _range_grid(low: Tensor, high: Tensor, chosen: QuantFormat) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of groups that run from `low` to `high`."""
    if chosen.symmetric:
        scale = torch.maximum(-low, high) / chosen.high
        return torch.where(scale > 0, scale, 1.0), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (chosen.high - chosen.low)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (chosen.low - low / scale).round().clamp(chosen.low, chosen.high)


class GptqSolver:
    """GPTQ for the rows of one layer, which are independent: the factor of H⁻¹ is computed once.

    Args:
        hessian: f32[K, K], left as it is.
        damping: share of H's mean diagonal that is added to the diagonal.
        act_order: columns of the most active inputs first. Scales are fixed beforehand (static groups), so the order
            costs nothing at run time.

    Raises:
        IrcError: H is not positive definite: more damping or more calibration data.
    """

    def __init__(self, hessian: Tensor, *, damping: float, act_order: bool = True) -> None:
        added = damping_of(hessian, damping)
        diagonal = hessian.diagonal() + added
        self._order = torch.argsort(diagonal, descending=True) if act_order else torch.arange(len(diagonal))
        # From here on one f64 matrix is all there is beside H: for wide layers it is what memory is needed for.
        wide = hessian[self._order[:, None], self._order].double()
        wide.diagonal().add_(added[self._order])
        self._factor = _inverse_factor(wide)

    @property
    def importance(self) -> Tensor:
        """What a squared error of each input's weights costs once all the others have made up for it: 1 / (H⁻¹)_ii."""
        result = torch.empty(len(self._order))
        result[self._order] = self._factor.square().sum(0).reciprocal_()
        return result

    def integers(self, weight: Tensor, grid: Grid) -> Tensor:
        """Integers f32[N, K] of rows f32[N, K]: each column is rounded, the rest take over its error as H says."""
        width = weight.shape[1]
        order, factor = self._order, self._factor
        group_of = (order // (width // grid.scale.shape[1])).tolist()
        scales = grid.scale.T.contiguous()  # columns are worked on as rows, whose numbers are neighbours in memory
        zeros = None if grid.zero_point is None else grid.zero_point.T.contiguous()
        left = weight[:, order]
        found = torch.empty_like(weight)
        for start in range(0, width, _BLOCK):
            stop = min(start + _BLOCK, width)
            block, local = left[:, start:stop].T.contiguous(), factor[start:stop, start:stop]
            rounded, errors = torch.empty_like(block), torch.empty_like(block)
            for i in range(stop - start):
                scale = scales[group_of[start + i]]
                zero = 0.0 if zeros is None else zeros[group_of[start + i]]
                q = torch.div(block[i], scale, out=rounded[i]).round_().add_(zero).clamp_(grid.low, grid.high)
                errors[i] = (block[i] - (q - zero) * scale) / local[i, i]
                block[i:].addr_(local[i, i:], errors[i], alpha=-1)
            found[:, order[start:stop]] = rounded.T
            left[:, stop:].addmm_(errors.T, factor[start:stop, stop:], alpha=-1)
        return found


def _inverse_factor(wide: Tensor) -> Tensor:
    """The upper Cholesky factor f32[K, K] of the inverse of a matrix f64[K, K], which is overwritten."""
    _, info = torch.linalg.cholesky_ex(wide, out=(wide, torch.empty((), dtype=torch.int32)))
    if int(info):
        raise IrcError(
            "the Gram matrix of its inputs is not positive definite: raise damping, or calibrate on more data"
        )
    torch.cholesky_inverse(wide, out=wide)
    _, info = torch.linalg.cholesky_ex(wide, upper=True, out=(wide, torch.empty((), dtype=torch.int32)))
    if int(info):
        raise IrcError("the inverse of its inputs' Gram matrix is not positive definite: raise damping")
    return wide.float()
