"""Histograms that grow with what they see: the ground of the observers that weigh values by how often they occur."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from irc.passes.quantize.observers.base import Observer

BINS = 4096
_HALF = BINS // 2
# Powers of two between which factors and limits stay exact f32 numbers.
_SMALLEST, _LARGEST = -100, 127


@dataclass(kw_only=True)
class HistogramObserver(Observer):
    """Counts of values in `BINS` equal bins of (-2^e, 2^e), where 2^e is the first power above all magnitudes.

    When e grows, pairs of bins are merged. As all limits are powers of two, the counts do not depend on how values
    were cut into batches, nor on their order. Memory: `BINS` counts a channel.
    """

    exponent: Tensor | None = field(default=None, init=False)
    counts: Tensor | None = field(default=None, init=False)

    def _add(self, rows: Tensor) -> None:
        channels = rows.shape[0]
        needed = torch.frexp(rows.abs().amax(1)).exponent.clamp(_SMALLEST, _LARGEST)
        if self.exponent is None or self.counts is None:
            self.exponent = torch.full_like(needed, _SMALLEST)
            self.counts = torch.zeros(channels, BINS, dtype=torch.int64, device=rows.device)
        self._widen(torch.maximum(self.exponent, needed))
        factor = _power(_HALF, -self.exponent).unsqueeze(1)
        bins = (rows * factor).floor().add_(_HALF).clamp_(0, BINS - 1).long()
        bins += torch.arange(channels, device=rows.device).unsqueeze(1) * BINS
        self.counts += torch.bincount(bins.flatten(), minlength=channels * BINS).view(channels, BINS)

    def _widen(self, exponent: Tensor) -> None:
        assert self.exponent is not None
        assert self.counts is not None
        shift = exponent - self.exponent
        for by in shift.unique().tolist():
            if by:
                place = torch.arange(BINS, device=shift.device) - _HALF
                merged = torch.div(place, 2 ** min(by, 40), rounding_mode="floor") + _HALF
                chosen = shift == by
                counts = self.counts[chosen]
                self.counts[chosen] = torch.zeros_like(counts).index_add_(1, merged, counts)
        self.exponent = exponent

    @property
    def bin_width(self) -> Tensor:
        """f32[channels]."""
        assert self.exponent is not None
        return _power(1 / _HALF, self.exponent)

    def centers(self) -> Tensor:
        """Middle of each bin, f32[channels, BINS]."""
        width = self.bin_width
        return (torch.arange(BINS, device=width.device) - _HALF + 0.5) * width.unsqueeze(1)

    def occupied(self) -> tuple[Tensor, Tensor]:
        """Counts f64 and middles f32 of the bins that hold something: [channels, most such bins of a channel].

        A channel with fewer has counts of zero at the end. The rows of a weight fill few of the bins.
        """
        assert self.counts is not None
        channel, place = self.counts.nonzero(as_tuple=True)
        sizes = torch.bincount(channel, minlength=self.counts.shape[0])
        column = torch.arange(len(channel), device=channel.device) - (sizes.cumsum(0) - sizes)[channel]
        counts, centers = torch.zeros(2, len(sizes), int(sizes.max()), dtype=torch.float64, device=channel.device)
        counts[channel, column] = self.counts[channel, place].double()
        centers[channel, column] = self.centers()[channel, place].double()
        return counts, centers.float()

    def magnitudes(self) -> Tensor:
        """Counts of |x| in bins of the same width from 0 on, i64[channels, BINS / 2]."""
        assert self.counts is not None
        return self.counts[:, _HALF:] + self.counts[:, :_HALF].flip(1)


def _power(factor: float, exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.full_like(exponent, factor, dtype=torch.float32), exponent)
