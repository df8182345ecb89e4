"""What a layer's inputs look like to the quantizers: Gram matrix and channel magnitudes over all batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import PassError
from irc.core.provenance import location, module_path


@dataclass(frozen=True)
class InputStatistics:
    """Over all rows of a layer's inputs.

    Attributes:
        gram: XᵀX / number of rows, f32[K, K].
        mean_abs, max_abs: of each channel, f32[K].
        num_rows: tokens seen.
    """

    gram: Tensor
    mean_abs: Tensor
    max_abs: Tensor
    num_rows: int


def input_statistics(node: fx.Node, inputs: Sequence[Tensor], pass_name: str) -> InputStatistics:
    """Statistics of the inputs [..., K] that a layer gets in all batches.

    Raises:
        PassError: they are empty, or hold numbers that are not finite; names the layer.
    """
    width = inputs[0].shape[-1]
    gram, total, largest = torch.zeros(width, width), torch.zeros(width), torch.zeros(width)
    rows = 0
    for index, value in enumerate(inputs):
        flat = value.detach().reshape(-1, width).float()
        if not bool(flat.isfinite().all()):
            raise PassError(
                f"the inputs of {_where(node)} hold numbers that are not finite in calibration batch {index}",
                pass_name=pass_name,
                node=node.name,
            )
        gram.addmm_(flat.T, flat)
        magnitude = flat.abs()
        total += magnitude.sum(0)
        if len(flat):
            largest = torch.maximum(largest, magnitude.amax(0))
        rows += len(flat)
    if rows == 0:
        raise PassError(
            f"no calibration data reaches {_where(node)}: all batches are empty there",
            pass_name=pass_name,
            node=node.name,
        )
    return InputStatistics(gram / rows, total / rows, largest, rows)


def _where(node: fx.Node) -> str:
    return " ".join(filter(None, (node.name, module_path(node), location(node))))
