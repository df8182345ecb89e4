"""What an observer is, the plain one, and the way from a range to scale and zero point."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field

import torch
from torch import Tensor

from irc.core.errors import IrcError
from irc.core.formats import QuantFormat


@dataclass(kw_only=True)
class Observer(abc.ABC):
    """Summary of values that stream by.

    Attributes:
        form: the integers that the range is meant for: their number and whether they lie symmetrically.
        axis: dimension whose entries get a range of their own; None: one range for all values.
    """

    form: QuantFormat
    axis: int | None = None
    low: Tensor | None = field(default=None, init=False)
    high: Tensor | None = field(default=None, init=False)
    num_values: int = field(default=0, init=False)

    def update(self, values: Tensor) -> None:
        """Take in a batch.

        Raises:
            IrcError: a value is not finite.
        """
        if values.numel() == 0:
            return
        rows = values.detach().reshape(1, -1)
        if self.axis is not None:
            rows = values.detach().movedim(self.axis, 0).flatten(1) if values.ndim > 1 else values.detach().view(-1, 1)
        rows = rows.float()
        low, high = torch.aminmax(rows, dim=1)
        if not bool((low.isfinite() & high.isfinite()).all()):
            count = int((~rows.isfinite()).sum())
            raise IrcError(f"{count} of {rows.numel()} numbers are not finite")
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.num_values += rows.shape[1]
        self._add(rows)

    def range(self) -> tuple[Tensor, Tensor]:
        """(low, high) of each channel, f32; low ≤ 0 ≤ high, and low = -high for a symmetric format.

        Raises:
            IrcError: nothing was seen, or nothing but zeros.
        """
        if self.low is None or self.high is None:
            raise IrcError("no values were seen")
        if not bool(self.low.any() | self.high.any()):
            raise IrcError("all values that were seen are zero")
        low, high = self._chosen(self.low.clamp(max=0), self.high.clamp(min=0))
        if self.form.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        return low, high

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None if symmetric) of each channel."""
        return grid(self.form, *self.range())

    @abc.abstractmethod
    def _add(self, rows: Tensor) -> None:
        """Take in values [channels, n], all finite; `low` and `high` know them already."""

    @abc.abstractmethod
    def _chosen(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range to cover, within what was seen (low ≤ 0 ≤ high)."""


@dataclass(kw_only=True)
class MinMaxObserver(Observer):
    """The whole range that was seen."""

    def _add(self, rows: Tensor) -> None:
        """Nothing but the range is kept."""

    def _chosen(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low, high


def grid(form: QuantFormat, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale f32 and zero point (None if symmetric) that spread a format's integers over [low, high] ∋ 0.

    An empty range gets scale 1.
    """
    if form.symmetric:
        scale = torch.maximum(-low, high) / form.high
        return torch.where(scale > 0, scale, 1.0), None
    scale = (high - low) / (form.high - form.low)
    scale = torch.where(scale > 0, scale, 1.0)
    zero_point = (form.low - torch.round(low / scale)).clamp(form.low, form.high)
    return scale, zero_point.to(form.zero_point_dtype)
