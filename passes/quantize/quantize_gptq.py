"""Weights of linear layers quantized by GPTQ: each layer's output on calibration data keeps its value.

Runs on a canonical program, before merges (small layers, small Gram matrices) and before the KV cache. Scales are
fixed before the columns are rounded (static groups), so that the order of the columns costs nothing at run time. Does
not handle: convolutions, embeddings, weights that several operations share; each is a skip.
Source: Frantar et al. 2022, https://arxiv.org/abs/2210.17323.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from irc.core.contract import register_pass
from irc.core.formats import QuantFormat
from irc.passes.quantize._calibrated_weights import CalibratedWeights, RowQuantizer
from irc.passes.quantize._gptq import GptqSolver, Grid, make_grid
from irc.passes.quantize._gram import InputStatistics

_SEARCHES = ("absmax", "error")


@register_pass
@dataclass(frozen=True, kw_only=True)
class QuantizeGptq(CalibratedWeights):
    """W → irc.dequantize(Q, scale), Q minimising ‖(W - Ŵ)·X‖² over calibration inputs X column by column.

    Attributes:
        act_order: columns of the most active inputs first.
        search: scales from the largest weight of a group (`absmax`), or from the least `error` of a group weighted
            by what remains of an error after the other inputs have made up for it.
        damping: share of the Gram matrix's mean diagonal that is added to it.
        negative_scales: let `error` choose scales below zero, so that the extreme weight of every group, not only
            of those where it is negative, can use the one integer that has no positive twin. TensorRT and some
            other targets refuse such scales.

    Preserves: lossy, by bits.
    """

    name: ClassVar[str] = "quantize-gptq"
    act_order: bool = True
    search: str = "error"
    damping: float = 0.01
    negative_scales: bool = False

    def option_problems(self) -> list[str]:
        problems = super().option_problems()
        if self.search not in _SEARCHES:
            problems.append(f"search must be one of {', '.join(_SEARCHES)}, not {self.search!r}")
        if not 0 < self.damping < 1:
            problems.append(f"damping must be between 0 and 1, not {self.damping!r}")
        if self.negative_scales and (self.search != "error" or not self.symmetric):
            problems.append("negative_scales needs search=error and a symmetric format")
        return problems

    def row_quantizer(self, inputs: InputStatistics, form: QuantFormat) -> RowQuantizer:
        solver = GptqSolver(inputs.gram, damping=self.damping, act_order=self.act_order)
        importance = solver.importance if self.search == "error" else None

        def quantize(rows: Tensor) -> tuple[Tensor, Grid]:
            grid = make_grid(rows, form, importance, negative=self.negative_scales)
            return solver.integers(rows, grid), grid

        return quantize
