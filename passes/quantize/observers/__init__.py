"""Observers: what range of numbers a quantizer should cover, from values that stream by.

An observer sees batch after batch, keeps a bounded summary, and answers with a range for each channel (or one for
the tensor). `grid` makes scale and zero point of it.

    min-max      everything that was seen
    percentile   all but a share of outliers
    mse          the least squared error of what was seen
    entropy      the least KL divergence between the magnitudes before and after (TensorRT's INT8 calibration)
"""

from __future__ import annotations

from irc.core.errors import OptionError, nearest
from irc.core.formats import QuantFormat
from irc.passes.quantize.observers.base import MinMaxObserver, Observer, grid
from irc.passes.quantize.observers.entropy import EntropyObserver
from irc.passes.quantize.observers.histogram import HistogramObserver
from irc.passes.quantize.observers.mse import MseObserver
from irc.passes.quantize.observers.percentile import PercentileObserver

OBSERVERS: dict[str, type[Observer]] = {
    "min-max": MinMaxObserver,
    "percentile": PercentileObserver,
    "mse": MseObserver,
    "entropy": EntropyObserver,
}


def make_observer(name: str, form: QuantFormat, *, axis: int | None = None, percentile: float = 99.99) -> Observer:
    """An observer by name, for the integers of a format; `percentile` is for the one of that name.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in OBSERVERS:
        raise OptionError(f"no observer is called {name!r}{nearest(name, OBSERVERS)}")
    if name == "percentile":
        return PercentileObserver(form=form, axis=axis, percentile=percentile)
    return OBSERVERS[name](form=form, axis=axis)


__all__ = [
    "OBSERVERS", "EntropyObserver", "HistogramObserver", "MinMaxObserver", "MseObserver", "Observer",
    "PercentileObserver", "grid", "make_observer",
]  # fmt: skip
