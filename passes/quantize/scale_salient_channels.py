"""Weights of salient channels scaled up before they are rounded, and the channels scaled down: AWQ's first half.

Runs on a canonical program with calibration data, before `quantize-clipped` or `quantize-weights` in the same
format. The factors are powers of the channels' mean magnitude; the exponent of each group is the one with the least
error of the layers' outputs after rounding. The function stays the same.
Source: Lin et al. 2023 (AWQ), https://arxiv.org/abs/2306.00978.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from irc.core.contract import Pass, PassContext, PassResult, register_pass
from irc.core.errors import OptionError
from irc.core.formats import QuantFormat
from irc.core.program import Program
from irc.passes.quantize._channel_scaling import scale_channels
from irc.passes.quantize._gptq import Grid, make_grid
from irc.passes.quantize._gram import InputStatistics
from irc.passes.quantize._scale_groups import ScaleGroup

_SMALLEST = 1e-4


@register_pass
@dataclass(frozen=True, kw_only=True)
class ScaleSalientChannels(Pass):
    """linear(x, W) → linear(x / s, W · s), s_j = mean|x_j|^a, a minimising ‖(W - Q(W · s) / s) · X‖².

    Attributes:
        bits, group_size, symmetric: the format that the weights will be rounded to.
        steps: exponents between 0 and 1 that are tried.

    Preserves: exact; factors are rounded into the weights.
    """

    name: ClassVar[str] = "scale-salient-channels"
    bits: int = 4
    group_size: int | None = 32
    symmetric: bool = True
    steps: int = 20

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            problems.append(f"bits must be 2 to 8, not {self.bits!r}")
        if self.steps < 1:
            problems.append(f"steps must be at least 1, not {self.steps!r}")
        if problems:
            raise OptionError(f"{self.name}: " + "; ".join(problems))

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        chosen = QuantFormat(self.bits, self.group_size, symmetric=self.symmetric, signed=self.symmetric)

        def choose(group: ScaleGroup, inputs: InputStatistics, weights: list[Tensor]) -> Tensor:
            unscaled = torch.ones(group.num_channels)
            if chosen.why_not_rows_of(group.num_channels) is not None:
                return unscaled  # these weights cannot have the format, so there is nothing to prepare
            magnitude = inputs.mean_abs.clamp_min(_SMALLEST)
            best, least = unscaled, torch.inf
            for step in range(self.steps):
                factors = magnitude ** (step / self.steps)
                factors = factors / (factors.max() * factors.min()).sqrt()
                factors = group.spread(group.fold(factors))
                error = sum(_output_error(w, factors, inputs.gram, chosen) for w in weights)
                if error < least:
                    best, least = factors, error
            return best

        return scale_channels(program, ctx, self.name, choose)


def _output_error(weight: Tensor, factors: Tensor, gram: Tensor, chosen: QuantFormat) -> float:
    """tr(D·G·Dᵀ) with D = W - Q(W · s) / s: the mean squared error of the layer's outputs, summed over them."""
    scaled = weight * factors
    difference = weight - round_to_grid(scaled, make_grid(scaled, chosen)) / factors
    return float(((difference @ gram) * difference).sum())


def round_to_grid(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest numbers of the grid: f32[N, K]."""
    scale, zero = grid.columns(weight.shape[1])
    return ((weight / scale).round_().add_(zero).clamp_(grid.low, grid.high).sub_(zero)).mul_(scale)
