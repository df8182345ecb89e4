"""Percentile calibration: a range that leaves out a share of outliers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from irc.core.errors import OptionError
from irc.passes.quantize.observers.histogram import BINS, HistogramObserver


@dataclass(kw_only=True)
class PercentileObserver(HistogramObserver):
    """The smallest range, to a bin, that holds `percentile` percent of the values.

    Symmetric: of the magnitudes. Asymmetric: half of the rest is left out on each side.
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise OptionError(f"percentile must be above 50 and at most 100, not {self.percentile}")

    def _chosen(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        assert self.counts is not None
        rest = self.num_values * (1 - self.percentile / 100)
        width = self.bin_width
        if self.form.symmetric:
            edge = _first(self.magnitudes(), rest) * width
            return torch.maximum(low, -edge), torch.minimum(high, edge)
        upper = (_first(self.counts, rest / 2) - BINS // 2) * width
        lower = (_first(self.counts.flip(1), rest / 2) - BINS // 2) * -width
        # Zero stays in the range, and the edge of a bin is no reason to go beyond what was seen.
        return torch.maximum(low, lower).clamp(max=0), torch.minimum(high, upper).clamp(min=0)


def _first(counts: Tensor, rest: float) -> Tensor:
    """How many of the first bins hold all but at most `rest` values, [channels]."""
    beyond = counts.sum(1, keepdim=True) - counts.cumsum(1)
    return (beyond > rest).sum(1) + 1
