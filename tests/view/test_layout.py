"""Layered layout: edges point down, boxes in a row do not overlap, long edges bend between."""

from __future__ import annotations

import itertools
import random

import pytest

from irc.view.layout import layered_layout


def random_dag(seed: int, size: int) -> tuple[list[int], list[tuple[int, int]]]:
    rng = random.Random(seed)
    edges = {(rng.randrange(v), v) for v in range(1, size) for _ in range(rng.randint(1, 3))}
    return list(range(size)), sorted(edges)


@pytest.mark.parametrize("seed", range(5))
def test_layout_is_legal(seed: int) -> None:
    vertices, edges = random_dag(seed, 40)
    widths = {v: 1.0 + v % 3 for v in vertices}
    layout = layered_layout(vertices, edges, widths, gap=0.5)
    for a, b in edges:
        assert layout.layer[a] < layout.layer[b]
        assert [row for _, row in layout.bends[a, b]] == list(range(layout.layer[a] + 1, layout.layer[b]))
    for a, b in itertools.combinations(vertices, 2):
        if layout.layer[a] == layout.layer[b]:
            assert abs(layout.x[a] - layout.x[b]) >= (widths[a] + widths[b]) / 2 + 0.5 - 1e-9


def test_chain_is_straight() -> None:
    layout = layered_layout("abc", [("a", "b"), ("b", "c")], dict.fromkeys("abc", 2.0), gap=1.0)
    assert max(layout.x.values()) - min(layout.x.values()) < 1e-6
    assert layout.layer == {"a": 0, "b": 1, "c": 2}


def test_a_long_edge_runs_straight_beside_what_it_passes() -> None:
    chain = ["in", "a", "b", "c", "d", "sum", "out"]
    edges = [*itertools.pairwise(chain), ("in", "sum")]
    layout = layered_layout(chain, edges, dict.fromkeys(chain, 2.0), gap=0.5)
    beside = [x for x, _ in layout.bends["in", "sum"]]
    assert len(beside) == 4
    assert max(beside) - min(beside) < 1e-6
    passed = [layout.x[v] for v in chain]
    assert max(passed) - min(passed) < 1e-6
    assert abs(beside[0] - passed[0]) >= 1.75 - 1e-9
