"""Mean-squared-error calibration: clip as far as the finer steps make up for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from irc.passes.quantize.observers.base import grid
from irc.passes.quantize.observers.histogram import HistogramObserver

_CANDIDATES = 100
_SMALLEST = 0.1


@dataclass(kw_only=True)
class MseObserver(HistogramObserver):
    """The seen range times the factor, of a hundred from 0.1 to 1, with the least mean squared error."""

    def _chosen(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.form.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        counts, centers = self.occupied()
        best = torch.full_like(low, torch.inf, dtype=torch.float64)
        factor = torch.ones_like(low)
        # From the whole range down, so that of equal candidates the one that clips least is kept.
        for candidate in torch.linspace(1.0, _SMALLEST, _CANDIDATES).tolist():
            off = (self._rounded(centers, low * candidate, high * candidate) - centers).double()
            error = (counts * off * off).sum(1)
            better = error < best
            best, factor = torch.where(better, error, best), torch.where(better, candidate, factor)
        return low * factor, high * factor

    def _rounded(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = grid(self.form, low, high)
        step = scale.unsqueeze(1)
        shift = 0 if zero_point is None else zero_point.unsqueeze(1).float()
        return ((torch.round(values / step) + shift).clamp(self.form.low, self.form.high) - shift) * step
