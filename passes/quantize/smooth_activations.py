"""Outliers of activations moved into the weights behind them, so that both quantize well.

Runs on a canonical program with calibration data, before activations are quantized. Where channels can be scaled is
found by dataflow (`_scale_groups`): behind norms, gated products, ReLUs and attention. The function stays the same.
Source: Xiao et al. 2022 (SmoothQuant), https://arxiv.org/abs/2211.10438.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from irc.core.contract import Pass, PassContext, PassResult, register_pass
from irc.core.errors import OptionError
from irc.core.program import Program
from irc.passes.quantize._channel_scaling import scale_channels
from irc.passes.quantize._gram import InputStatistics
from irc.passes.quantize._scale_groups import ScaleGroup

_SMALLEST = 1e-5


@register_pass
@dataclass(frozen=True, kw_only=True)
class SmoothActivations(Pass):
    """linear(x, W) → linear(x / s, W · s), s_j = max|x_j|^α / max|W_j|^(1 - α).

    Attributes:
        alpha: how much of the difficulty goes into the weights: 0 none, 1 all of it.

    Preserves: exact; factors are rounded into the weights.
    """

    name: ClassVar[str] = "smooth-activations"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"{self.name}: alpha must be between 0 and 1, not {self.alpha!r}")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        def choose(group: ScaleGroup, inputs: InputStatistics, weights: list[Tensor]) -> Tensor:
            largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
            factors = inputs.max_abs.clamp_min(_SMALLEST) ** self.alpha
            factors = factors / largest.clamp_min(_SMALLEST) ** (1 - self.alpha)
            # A channel that is never active, or that nobody reads, has nothing to move.
            return torch.where((inputs.max_abs > 0) & (largest > 0), factors, 1.0).clamp(_SMALLEST, 1 / _SMALLEST)

        return scale_channels(program, ctx, self.name, choose)
