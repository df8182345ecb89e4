"""Weights rounded after the range of each group was cut to where its outputs err least: AWQ's second half.

Runs on a canonical program with calibration data, behind `scale-salient-channels` in the same format; useful alone,
too. Does not handle: convolutions, embeddings, weights that several operations share; each is a skip.
Source: Lin et al. 2023 (AWQ), https://arxiv.org/abs/2306.00978.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from irc.core.contract import register_pass
from irc.core.errors import IrcError
from irc.core.formats import QuantFormat
from irc.passes.quantize._calibrated_weights import CalibratedWeights, RowQuantizer
from irc.passes.quantize._gptq import Grid, make_grid
from irc.passes.quantize._gram import InputStatistics


@register_pass
@dataclass(frozen=True, kw_only=True)
class QuantizeClipped(CalibratedWeights):
    """W → irc.dequantize(Q, scale), Q = round(W / scale), scale of each group minimising ‖(w - ŵ)·x‖² of that group.

    Attributes:
        shrink: the smallest share of a group's range that is tried.
        steps: how many shares are tried.

    Preserves: lossy, by bits.
    """

    name: ClassVar[str] = "quantize-clipped"
    rounds_to_nearest: ClassVar[bool] = True
    shrink: float = 0.5
    steps: int = 20

    def option_problems(self) -> list[str]:
        problems = super().option_problems()
        if not 0 < self.shrink < 1:
            problems.append(f"shrink must be between 0 and 1, not {self.shrink!r}")
        if self.steps < 2:
            problems.append(f"steps must be at least 2, not {self.steps!r}")
        return problems

    def row_quantizer(self, inputs: InputStatistics, form: QuantFormat) -> RowQuantizer:
        if not bool(inputs.gram.isfinite().all()) or float(inputs.gram.diagonal().sum()) <= 0:
            raise IrcError("its inputs are zero in all calibration data")
        num_groups = form.scale_shape((1, inputs.gram.shape[0]))[-1]
        gram = _diagonal_blocks(inputs.gram, num_groups)
        return lambda rows: self._clipped(rows, gram, form)

    def _clipped(self, weight: Tensor, gram: Tensor, form: QuantFormat) -> tuple[Tensor, Grid]:
        """gram: [G, K / G, K / G], of each group's inputs with one another."""
        num_groups = len(gram)
        groups = weight.unflatten(-1, (num_groups, -1))
        low, high = torch.aminmax(groups, dim=-1, keepdim=True)
        best: Grid | None = None
        least = torch.empty(0)
        for share in torch.linspace(1.0, self.shrink, self.steps).tolist():
            grid = make_grid((groups.clamp(low * share, high * share)).flatten(1), form)
            scale, zero = grid.columns(weight.shape[1])
            rounded = ((weight / scale).round_().add_(zero).clamp_(grid.low, grid.high).sub_(zero)).mul_(scale)
            miss = (weight - rounded).unflatten(-1, (num_groups, -1))
            error = (torch.einsum("ngi,gij->ngj", miss, gram) * miss).sum(-1)
            if best is None:
                best, least = grid, error
                continue
            better = error < least
            least = torch.where(better, error, least)
            kept = None
            if grid.zero_point is not None and best.zero_point is not None:
                kept = torch.where(better, grid.zero_point, best.zero_point)
            best = Grid(torch.where(better, grid.scale, best.scale), kept, grid.low, grid.high)
        assert best is not None
        scale, zero = best.columns(weight.shape[1])
        return (weight / scale).round_().add_(zero).clamp_(best.low, best.high), best


def _diagonal_blocks(gram: Tensor, num_groups: int) -> Tensor:
    """[K, K] → the blocks of each group with itself: [G, K / G, K / G]."""
    size = gram.shape[0] // num_groups
    return torch.stack([gram[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(num_groups)])
