"""Observers: streaming equals one look, memory is bounded, and each finds the range that its definition says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from irc.core.errors import IrcError, OptionError
from irc.core.formats import QuantFormat
from irc.passes.quantize.observers import OBSERVERS, HistogramObserver, Observer, grid, make_observer
from irc.passes.quantize.observers.histogram import BINS

SYMMETRIC = QuantFormat(8, per_tensor=True)
UNSIGNED = QuantFormat(8, symmetric=False, signed=False, per_tensor=True)
each_observer = pytest.mark.parametrize("name", OBSERVERS)
each_form = pytest.mark.parametrize("form", [SYMMETRIC, UNSIGNED], ids=str)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(name: str, form: QuantFormat, *batches: Tensor, axis: int | None = None) -> Observer:
    observer = make_observer(name, form, axis=axis)
    for batch in batches:
        observer.update(batch)
    return observer


@each_observer
@each_form
@pytest.mark.parametrize("axis", [None, 1])
def test_batches_and_their_order_do_not_matter(name: str, form: QuantFormat, axis: int | None) -> None:
    """Magnitudes grow over seven powers of two, so that histograms must widen in between."""
    x = values(40, 3, 5) * torch.logspace(-2, 2, 40).view(-1, 1, 1)
    x[:7] = 0
    whole = seen(name, form, x, axis=axis).range()
    for batches in (x.split(7), reversed(x.split(1)), x[torch.randperm(40)].split(13)):
        for a, b in zip(seen(name, form, *batches, axis=axis).range(), whole, strict=True):
            assert torch.equal(a, b)
    assert whole[0].shape == ((1,) if axis is None else (3,))


@each_observer
@each_form
def test_channels_are_ranges_of_their_own(name: str, form: QuantFormat) -> None:
    x = values(3, 500) * torch.tensor([[1.0], [100.0], [0.01]])
    low, high = seen(name, form, x, axis=0).range()
    for channel in range(3):
        alone = seen(name, form, x[channel]).range()
        assert (low[channel], high[channel]) == (alone[0][0], alone[1][0])


@each_observer
@each_form
def test_ranges_hold_zero_and_are_symmetric_where_formats_are(name: str, form: QuantFormat) -> None:
    for x in (values(1000), values(1000).abs() + 1, -values(1000).abs() - 1):
        low, high = seen(name, form, x).range()
        assert float(low) <= 0 <= float(high)
        if form.symmetric:
            assert float(low) == -float(high)
        else:
            assert float(low) >= min(float(x.min()), 0)
            assert float(high) <= max(float(x.max()), 0)


def test_min_max() -> None:
    low, high = seen("min-max", UNSIGNED, torch.tensor([-1.5, 3.0]), torch.tensor([0.5, 4.0])).range()
    assert (float(low), float(high)) == (-1.5, 4.0)
    low, high = seen("min-max", SYMMETRIC, torch.tensor([-5.5, 3.0])).range()
    assert (float(low), float(high)) == (-5.5, 5.5)


@pytest.mark.parametrize("percent", [99.0, 90.0, 100.0])
def test_percentile_is_the_quantile_to_a_bin(percent: float) -> None:
    x = values(20001)
    width = 2 * 2 ** math.ceil(math.log2(float(x.abs().max()))) / BINS
    observer = make_observer("percentile", SYMMETRIC, percentile=percent)
    observer.update(x)
    exact = float(x.abs().quantile(percent / 100))
    assert exact <= float(observer.range()[1]) <= exact + 2 * width
    observer = make_observer("percentile", UNSIGNED, percentile=percent)
    observer.update(x)
    low, high = (float(edge) for edge in observer.range())
    rest = (1 - percent / 100) / 2
    assert float(x.quantile(1 - rest)) <= high + 1e-6
    assert high <= float(x.quantile(1 - rest)) + 2 * width
    assert float(x.quantile(rest)) - 2 * width <= low <= float(x.quantile(rest)) + 1e-6


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_near_the_best_of_all_ranges(bits: int, symmetric: bool) -> None:
    """Against a search over the values themselves, on data with an outlier."""
    form = QuantFormat(bits, symmetric=symmetric, signed=symmetric, per_tensor=True)
    x = torch.cat((values(19999), torch.tensor([9.0])))

    def error(low: Tensor, high: Tensor) -> float:
        scale, zero = grid(form, low, high)
        stored = form.quantize(x, scale, zero)
        return float((form.dequantize(stored, scale, zero, torch.float32) - x).square().mean())

    observer = seen("mse", form, x)
    low, high = seen("min-max", form, x).range()
    best = min(error(low * f, high * f) for f in torch.linspace(0.1, 1, 200).tolist())
    assert error(*observer.range()) <= best * 1.05
    assert error(*observer.range()) < error(low, high) or bits == 8


def test_entropy_is_the_least_divergence_of_the_published_loop() -> None:
    """Migacz 2017, written out in plain Python, for the chosen threshold and every sixteenth."""
    form = QuantFormat(4, per_tensor=True)
    x = torch.cat((values(5000), torch.tensor([6.0, 7.5])))
    observer = seen("entropy", form, x)
    assert isinstance(observer, HistogramObserver)
    raw = observer.magnitudes()[0].tolist()
    while raw[-1] == 0:
        raw.pop()
    counts = [raw[1], *raw[1:]]
    chosen = round(float(observer.range()[1] / observer.bin_width))
    divergences = {}
    for kept in [*range(8, len(counts) + 1, 16), chosen]:
        p = [float(c) for c in counts[:kept]]
        p[max(i for i in range(kept) if counts[i])] += sum(counts[kept:])
        members = [[i for i in range(kept) if i * 8 // kept == level and counts[i] > 0] for level in range(8)]
        q = [0.0] * kept
        for inside in members:
            for i in inside:
                q[i] = sum(counts[j] for j in inside) / len(inside) if i == inside[0] else q[inside[0]]
        total, mass = sum(q), sum(p)
        if not any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
            terms = (a / mass * math.log(a / mass * total / b) for a, b in zip(p, q, strict=True) if a)
            divergences[kept] = sum(terms)
    assert len(divergences) > 20
    assert divergences[chosen] <= min(divergences.values()) + 1e-12


def test_entropy_clips_an_outlier_and_leaves_even_values_alone() -> None:
    far = float(seen("entropy", SYMMETRIC, torch.cat((values(50000), torch.tensor([40.0])))).range()[1])
    assert 2 < far < 10
    even = torch.linspace(-1, 1, 50001)
    assert float(seen("entropy", SYMMETRIC, even).range()[1]) > 0.95


def test_histograms_are_bounded() -> None:
    observer = make_observer("mse", SYMMETRIC)
    assert isinstance(observer, HistogramObserver)
    for i in range(50):
        observer.update(values(100, seed=i) * 10.0 ** (i % 20 - 10))
    assert observer.counts is not None
    assert observer.counts.shape == (1, BINS)
    assert int(observer.counts.sum()) == observer.num_values == 5000


@pytest.mark.parametrize("tiny", [1e-38, 3e38])
def test_extreme_magnitudes(tiny: float) -> None:
    for name in OBSERVERS:
        low, high = seen(name, SYMMETRIC, values(100).clamp(-1, 1) * tiny).range()
        assert bool(low.isfinite() & high.isfinite())


@each_observer
def test_nothing_zeros_and_nan_are_errors(name: str) -> None:
    with pytest.raises(IrcError, match="no values were seen"):
        make_observer(name, SYMMETRIC).range()
    with pytest.raises(IrcError, match="no values were seen"):
        seen(name, SYMMETRIC, torch.zeros(0, 4)).range()
    with pytest.raises(IrcError, match="all values that were seen are zero"):
        seen(name, SYMMETRIC, torch.zeros(3, 4)).range()
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(IrcError, match="2 of 6 numbers are not finite"):
            seen(name, SYMMETRIC, torch.tensor([1.0, wrong, 2.0, -wrong, 0.0, 1.0]))


def test_grids() -> None:
    scale, zero = grid(SYMMETRIC, torch.tensor([-2.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert zero is None
    assert torch.equal(scale, torch.tensor([2 / 127, 1.0]))
    scale, zero = grid(UNSIGNED, torch.tensor([-1.0, 0.0, -3.0]), torch.tensor([3.0, 5.1, 0.0]))
    torch.testing.assert_close(scale, torch.tensor([4 / 255, 5.1 / 255, 3 / 255]))
    assert zero is not None
    assert zero.dtype == torch.uint8
    assert zero.tolist() == [64, 0, 255]
    signed = QuantFormat(8, symmetric=False, per_tensor=True)
    assert grid(signed, torch.tensor([-1.0]), torch.tensor([3.0]))[1].tolist() == [-64]


def test_options() -> None:
    with pytest.raises(OptionError, match=r"no observer is called 'minmax' \(did you mean 'min-max'\?\)"):
        make_observer("minmax", SYMMETRIC)
    with pytest.raises(OptionError, match="percentile must be above 50 and at most 100, not 20"):
        make_observer("percentile", SYMMETRIC, percentile=20)
