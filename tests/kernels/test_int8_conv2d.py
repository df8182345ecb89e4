"""Convolutions of 8-bit integers against exact sums."""

from __future__ import annotations

import ctypes

import pytest
import torch

from irc.core.errors import TargetError
from irc.lowering.cpp.templates import int8_conv2d as template
from tests.kernels.building import needs_compiler
from tests.kernels.integers import (
    Case,
    Ending,
    check_ending,
    check_sums,
    problem_of,
)

# Odd depths, groups at the edge, more places than a block, a linear layer; pixels as they lie, in groups.
CASES = (
    Case(problem_of(3, 20, (7, 7), stride=(2, 2), padding=(3, 3)), 21, 30, 131),
    Case(problem_of(40, 300, (3, 3), padding=(1, 1)), 9, 17, 0),
    Case(problem_of(12, 18, (3, 2), padding=(2, 1), dilation=(2, 3), groups=6, activation="i8"), 15, 19, -7),
    Case(problem_of(517, 33, (1, 1)), 1, 1, 255),
    Case(problem_of(1024, 33, (1, 2), padding=(0, 1)), 3, 2, 17),
    Case(problem_of(1552, 46, (1, 1), groups=2), 5, 7, 9),
)


# Weights of 8 bits; of 7, which pairs in 16 bits hold; of which fours are held now and then, and always.
@needs_compiler
@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("least", [-128, -64, -45, -32])
def test_sums_are_exact(adding_kernels: ctypes.CDLL, index: int, extreme: bool, least: int) -> None:
    check_sums(template, getattr(adding_kernels, f"case{index}"), CASES[index], index, least, extreme)


def test_where_four_products_leave_16_bits() -> None:
    """Marks of pairs of steps: two neighbours of the first four places with the same two of the last four."""

    def marks(*weights: tuple[int, int, int]) -> list[int]:
        weight = torch.zeros(40, 16, 1, 1, dtype=torch.int8)
        for channel, place, value in weights:
            weight[channel, place] = value
        problem = problem_of(16, 40, (1, 1))
        packed = template.pack(problem, weight, torch.ones(40), 0)
        return packed[template.packed_bytes(problem) - 6 :].tolist()  # 3 panels of 2 steps

    assert marks((0, 0, 64), (0, 1, 64), (0, 2, 1), (1, 4, 1), (0, 5, -64)) == [0, 0, 0, 0, 0, 0]
    assert marks((0, 0, 64), (0, 1, 64), (0, 4, 1)) == [1, 0, 0, 0, 0, 0]
    assert marks((16, 10, -64), (16, 11, -64), (16, 15, -1)) == [0, 1, 0, 1, 0, 0]  # two panels go together
    assert marks((39, 10, -64), (39, 11, -64), (39, 15, -1)) == [0, 0, 0, 0, 0, 1]


# Groups, gathered; in place; two panels of which the second is not full.
ENDS = (
    Ending(CASES[2], "int8_t", "float", -20, True),
    Ending(CASES[4], "uint8_t", "uint8_t", 3, False),
    Ending(CASES[5], "int8_t", "int8_t", -3, False),
)


@needs_compiler
@pytest.mark.parametrize("index", range(len(ENDS)))
def test_results_in_integers(ending_kernels: ctypes.CDLL, index: int) -> None:
    check_ending(template, getattr(ending_kernels, f"end{index}"), ENDS[index], index)


def test_refuses() -> None:
    def reason(**options: object) -> str:
        sizes = {"channels": 4, "out_channels": 4, "kernel": (1, 1)} | options
        return template.refuses(problem_of(**sizes), "avx2") or ""

    assert "products of f32 with i8" in reason(activation="f32")
    assert "do not divide" in reason(groups=3)
    assert "depthwise" in reason(groups=4)
    assert "65792" in reason(channels=70000)
    problem = problem_of(4, 4, (1, 1))
    with pytest.raises(TargetError, match=r"\[4, 4, 1, 1\]"):
        template.pack(problem, torch.zeros(4, 1, 1, 1, dtype=torch.int8), torch.ones(4), 0)
    with pytest.raises(TargetError, match="scale is"):
        template.pack(problem, torch.zeros(4, 4, 1, 1, dtype=torch.int8), torch.ones(1), 0)
