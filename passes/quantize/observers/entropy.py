"""Entropy calibration: the clipping threshold whose quantized magnitudes tell least from the original ones.

Source: Migacz 2017, "8-bit inference with TensorRT", GPU Technology Conference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from irc.passes.quantize.observers.histogram import HistogramObserver

_STEPS_A_LEVEL = 8
"""Thresholds are tried at every (levels / 8)th bin."""


@dataclass(kw_only=True)
class EntropyObserver(HistogramObserver):
    """The threshold T for |x| with the least KL(P ‖ Q).

    P: counts of magnitudes up to T, everything beyond in the last bin that is not empty (in an empty one it would
    make the divergence infinite); Q: the same counts summed to as many levels as there are integers for a sign, and
    spread evenly over the bins that were not empty. The first bin, mostly exact zeros, counts as much as its
    neighbour: zero is exact on any grid.
    """

    def _chosen(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        width = self.bin_width
        both = bool((low < 0).any() & (high > 0).any()) or self.form.symmetric
        levels = 1 << (self.form.bits - 1 if both else self.form.bits)
        counts = self.magnitudes().double()
        threshold = torch.stack([_best_bins(channel, levels) for channel in counts]) * width
        return torch.maximum(low, -threshold), torch.minimum(high, threshold)


def _best_bins(counts: Tensor, levels: int) -> Tensor:
    """How many bins of magnitudes to keep."""
    used = int(counts.nonzero().max()) + 1 if bool(counts.any()) else 0
    if used <= levels:
        return torch.tensor(float(used))
    counts = counts[:used].clone()
    counts[0] = counts[1]
    step = max(1, levels // _STEPS_A_LEVEL)
    candidates = [*range(levels, used, step), used]
    divergences = torch.stack([_divergence(counts, kept, levels) for kept in candidates])
    return torch.tensor(float(candidates[int(divergences.argmin())]))


def _divergence(counts: Tensor, kept: int, levels: int) -> Tensor:
    inside = counts[:kept]
    if not bool(inside.any()):
        return torch.tensor(torch.inf, dtype=counts.dtype)
    p = inside.clone()
    p[int(inside.nonzero().max())] += counts[kept:].sum()
    level = torch.arange(kept, device=counts.device) * levels // kept
    filled = (inside > 0).double()
    sums = torch.zeros(levels, dtype=counts.dtype, device=counts.device)
    q = (sums.index_add(0, level, inside) / sums.index_add(0, level, filled).clamp_min(1))[level] * filled
    p, q = p / p.sum(), q / q.sum()
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum()
