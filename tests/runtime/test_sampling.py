"""Sampling: what is kept, how likely it is chosen, and that a request's draws are its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from irc.core.errors import OptionError
from irc.runtime.requests import request_key
from irc.runtime.sampling import Row, Sampling, adjusted_logits, choose, kept_probabilities, uniforms

LOGITS = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))


def kept(**options: float) -> list[float]:
    return kept_probabilities(LOGITS, [Sampling(**{"temperature": 1.0, **options})])[0].tolist()


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
    probabilities = kept_probabilities(torch.zeros(1, 8), [Sampling(temperature=1.0, top_k=3)])
    assert (probabilities > 0).sum() == 3


def rows(*keys: int, position: int = 0, **options: Any) -> list[Row]:
    return [Row(Sampling(**{"temperature": 1.0, **options}), key, position) for key in keys]


def test_greedy_takes_the_likeliest() -> None:
    assert choose(torch.tensor([[0.0, 2.0], [3.0, 1.0]]), rows(1, 2, temperature=0.0)) == [1, 0]


def test_frequencies() -> None:
    counts = [0] * 4
    for position in range(2000):
        counts[choose(LOGITS, rows(5, position=position))[0]] += 1
    for count, p in zip(counts, (0.5, 0.3, 0.15, 0.05), strict=True):
        assert abs(count / 2000 - p) < 4 * math.sqrt(p * (1 - p) / 2000)


def test_numbers_are_uniform_and_depend_on_everything() -> None:
    numbers = uniforms(list(range(100)) * 100, [i // 100 for i in range(10000)])
    assert len(set(numbers.tolist())) == 10000
    counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 28  # chi-square with 9 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.04
    assert uniforms([3], [4]) != uniforms([3], [4], purpose=1)
    assert uniforms([3, 9], [4, 1])[0] == uniforms([3], [4])[0]


def test_a_request_draws_the_same_alone_and_in_a_batch() -> None:
    logits = torch.zeros(3, 1000)
    alone = [choose(logits[:1], rows(42, position=p))[0] for p in range(5)]
    batch = [choose(logits, rows(9, 42, 43, position=p)) for p in range(5)]
    assert [row[1] for row in batch] == alone
    assert [row[2] for row in batch] != alone
    assert [row[0] for row in batch] != alone


def test_each_row_has_its_own_options() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(3))
    options = [Sampling(temperature=0.7, top_k=3), Sampling(), Sampling(temperature=2.0, top_p=0.5, min_p=0.1),
               Sampling(temperature=1.0, typical_p=0.6)]  # fmt: skip
    together = kept_probabilities(logits, options)
    for row, one in enumerate(options):
        torch.testing.assert_close(together[row], kept_probabilities(logits[row : row + 1], [one])[0])


def test_typical_drops_what_is_too_likely_and_too_unlikely() -> None:
    # Information: 0.69, 1.2, 1.9, 3.0 nats; entropy 1.14: the second token is nearest.
    assert kept(typical_p=0.2) == pytest.approx([0, 1, 0, 0])
    assert kept(typical_p=0.7) == pytest.approx([0.625, 0.375, 0, 0])


def test_penalties_bias_and_masks() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0, 0.5]])

    def adjusted(ids: list[int], prompt_length: int, allowed: list[bool] | None = None, **options: Any) -> list[float]:
        mask = None if allowed is None else torch.tensor(allowed)
        return adjusted_logits(logits, [Row(Sampling(**options), 1, 5, ids, prompt_length, mask)])[0].tolist()

    assert adjusted([0, 2, 3], 2, repetition_penalty=2.0) == pytest.approx([1.0, 1.0, -2.0, 0.25])
    assert adjusted([0, 1, 1], 1, presence_penalty=0.5) == pytest.approx([2.0, 0.5, -1.0, 0.5])
    assert adjusted([0, 1, 1], 1, frequency_penalty=0.5) == pytest.approx([2.0, 0.0, -1.0, 0.5])
    assert adjusted([], 0, logit_bias={2: 4.0, 0: -1.0}) == pytest.approx([1.0, 1.0, 3.0, 0.5])
    assert adjusted([], 0, [False, True, True, False]) == [-math.inf, 1.0, -1.0, -math.inf]
    assert choose(logits, [Row(Sampling(), 1, 0, (), 0, torch.tensor([False, False, True, False]))]) == [2]


def test_seeds_differ() -> None:
    keys = [request_key(seed, 0, (1,)) for seed in range(20)]
    assert len(set(choose(torch.zeros(20, 10**5), rows(*keys)))) == 20


def test_wrong_values_are_reported_together() -> None:
    with pytest.raises(OptionError, match=r"temperature must .*top_k must .*top_p must .*min_p must"):
        Sampling(temperature=-1, top_k=0, top_p=0, min_p=2)
