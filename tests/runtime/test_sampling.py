"""Sampling: what is kept, how likely it is chosen, and that a request's draws are its own."""

from __future__ import annotations

import math

import pytest
import torch

from irc.core.errors import OptionError
from irc.runtime.sampling import Sampler, Sampling, kept_probabilities

LOGITS = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))


def kept(**options: float) -> list[float]:
    return kept_probabilities(LOGITS, Sampling(**{"temperature": 1.0, **options}))[0].tolist()  # type: ignore[arg-type]


def test_temperature_sharpens() -> None:
    assert kept() == pytest.approx([0.5, 0.3, 0.15, 0.05])
    squares = [p * p for p in (0.5, 0.3, 0.15, 0.05)]
    assert kept(temperature=0.5) == pytest.approx([s / sum(squares) for s in squares])
    assert kept(temperature=1e-30) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 100}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"min_p": 0.5}, [0.625, 0.375, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
    ],
)
def test_filters(options: dict[str, float], expected: list[float]) -> None:
    assert kept(**options) == pytest.approx(expected)


def test_ties_keep_exactly_k() -> None:
    probabilities = kept_probabilities(torch.zeros(1, 8), Sampling(temperature=1.0, top_k=3))
    assert (probabilities > 0).sum() == 3


def test_greedy_takes_the_likeliest() -> None:
    assert Sampler(Sampling(), [[1], [2]])(torch.tensor([[0.0, 2.0], [3.0, 1.0]]), [0, 1]) == [1, 0]


def test_frequencies() -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=5), [[1]])
    counts = [0] * 4
    for _ in range(2000):
        counts[sampler(LOGITS, [0])[0]] += 1
    for count, p in zip(counts, (0.5, 0.3, 0.15, 0.05), strict=True):
        assert abs(count / 2000 - p) < 4 * math.sqrt(p * (1 - p) / 2000)


def test_a_request_draws_the_same_alone_and_in_a_batch() -> None:
    sampling, logits = Sampling(temperature=1.0, seed=7), torch.zeros(1, 1000)
    alone = Sampler(sampling, [[4, 2]])
    batch = Sampler(sampling, [[9], [4, 2], [4, 2]])
    first = [alone(logits, [0])[0] for _ in range(5)]
    rows = [batch(logits.expand(3, -1), [0, 1, 2]) for _ in range(5)]
    assert [row[1] for row in rows] == first
    assert [row[2] for row in rows] != first, "the same prompt twice must not give the same sample twice"
    assert [row[0] for row in rows] != first


def test_seeds_differ() -> None:
    draws = {Sampler(Sampling(temperature=1.0, seed=s), [[1]])(torch.zeros(1, 10**6), [0])[0] for s in range(20)}
    assert len(draws) == 20


def test_wrong_values_are_reported_together() -> None:
    with pytest.raises(OptionError, match=r"temperature must .*top_k must .*top_p must .*min_p must"):
        Sampling(temperature=-1, top_k=0, top_p=0, min_p=2)
