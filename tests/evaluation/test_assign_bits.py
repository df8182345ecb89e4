"""The solver against exhaustive search."""

from __future__ import annotations

import itertools
import random

import pytest

import irc
from irc.core.errors import OptionError
from irc.core.pipeline import parse_pipeline
from irc.evaluation import LayerSensitivity, Sensitivity, assign_bits
from irc.evaluation import assign_bits as solver_package
from irc.passes import QuantizeWeights

FORMATS = ("int2.row", "int3.row", "int4.row", "int8.row")


def result(*layers: LayerSensitivity) -> Sensitivity:
    return Sensitivity("toy", "kl", "nothing", 1, "f16", layers)


def random_result(seed: int, count: int = 5) -> Sensitivity:
    rng = random.Random(seed)
    layers = []
    for index in range(count):
        rows, width = rng.choice([(3, 10), (7, 16), (5, 24), (8, 8)])
        bits = {text: int(text[3]) + 16 / width for text in FORMATS}
        scale = 10 ** rng.uniform(-3, 0)
        damage = {text: scale * rng.uniform(0.5, 2) * 4.0 ** -int(text[3]) for text in FORMATS}
        layers.append(LayerSensitivity(f"layer{index}.weight", rows * width, damage, bits))
    return result(*layers)


def best(found: Sensitivity, average: float) -> float:
    total = sum(layer.num_weights for layer in found.layers)
    least = float("inf")
    for choice in itertools.product(FORMATS, repeat=len(found.layers)):
        size = sum(layer.bits[text] * layer.num_weights for layer, text in zip(found.layers, choice, strict=True))
        if size <= average * total + 1e-6:
            damage = sum(layer.damage[text] for layer, text in zip(found.layers, choice, strict=True))
            least = min(least, damage)
    return least


@pytest.mark.parametrize("seed", range(12))
def test_exact(seed: int) -> None:
    found = random_result(seed)
    for average in (4.0, 4.7, 5.5, 7.0, 20.0):
        chosen = assign_bits(found, average_bits=average)
        assert chosen.average_bits <= average + 1e-9
        assert chosen.damage == pytest.approx(best(found, average), rel=1e-12)


def test_coarse_units_keep_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__("importlib").import_module("irc.evaluation.assign_bits")
    monkeypatch.setattr(module, "_MAX_UNITS", 40)
    for seed in range(12):
        found = random_result(seed)
        for average in (4.5, 5.5, 20.0):
            chosen = assign_bits(found, average_bits=average)
            assert chosen.average_bits <= average + 1e-9
            assert chosen.damage <= best(found, average - 0.6 if average > 4.5 else average) * 3
    assert solver_package is irc.assign_bits


def test_the_smallest_budget_just_fits() -> None:
    found = random_result(3)
    total = sum(layer.num_weights for layer in found.layers)
    smallest = sum(layer.bits["int2.row"] * layer.num_weights for layer in found.layers) / total
    assert set(assign_bits(found, average_bits=smallest).formats.values()) == {"int2.row"}
    with pytest.raises(OptionError, match=rf"the smallest formats tried take {smallest:.3f}, scales included"):
        assign_bits(found, average_bits=smallest - 0.01)
    with pytest.raises(OptionError, match="cannot be met"):
        assign_bits(found, average_bits=float("nan"))


def test_rules_text() -> None:
    bits = {"int4.row": 4.0, "int8.row": 8.0}
    flat, steep = {"int4.row": 1e-6, "int8.row": 1e-9}, {"int4.row": 1.0, "int8.row": 1e-3}
    chosen = assign_bits(
        result(
            LayerSensitivity("a.weight", 64, flat, bits),
            LayerSensitivity("b[0].weight", 64, steep, bits),
            LayerSensitivity("c.weight", 64, flat, bits),
        ),
        average_bits=5.4,
    )
    assert chosen.formats == {"a.weight": "int4.row", "b[0].weight": "int8.row", "c.weight": "int4.row"}
    assert chosen.rules == ("b[[]0].weight=int8.row", "*=int4.row")
    assert chosen.rules_text == "rules=[b[[]0].weight=int8.row, *=int4.row]"
    assert parse_pipeline(chosen.pipeline) == [QuantizeWeights(rules=chosen.rules, scale_dtype="f16")]
    assert "int8.row" in str(chosen)
    assert chosen.pipeline in str(chosen)
