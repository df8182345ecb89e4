"""Depthwise convolutions of 8-bit integers against exact sums."""

from __future__ import annotations

import ctypes

import pytest
import torch

from irc.core.errors import TargetError
from irc.lowering.cpp.templates import int8_depthwise as template
from irc.lowering.cpp.templates.conv2d import ConvProblem
from tests.kernels.building import needs_compiler
from tests.kernels.integers import (
    Case,
    Ending,
    check_ending,
    check_sums,
    problem_of,
)


def _problem(channels: int, kernel: tuple[int, int], **options: object) -> ConvProblem:
    return problem_of(channels, channels, kernel, groups=channels, **options)


# Places left over behind fours: 1, 1, 2, 0, 3; channels in whole blocks, in halves, fewer than one, more than are
# cached together; strides, dilation, images smaller than the window.
CASES = (
    Case(_problem(48, (3, 3), padding=(1, 1)), 9, 17, 131),
    Case(_problem(29, (5, 5), stride=(2, 2), padding=(2, 2), activation="i8"), 8, 11, -7),
    Case(_problem(70, (3, 2), padding=(2, 1), dilation=(2, 3)), 7, 6, 255),
    Case(_problem(96, (2, 2), stride=(1, 2), activation="i8"), 5, 7, -128),
    Case(_problem(260, (11, 5), padding=(5, 2)), 4, 3, 0),
)


# Weights of 8 bits, and of 7, which pairs in 16 bits hold.
@needs_compiler
@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("least", [-128, -64])
def test_sums_are_exact(adding_kernels: ctypes.CDLL, index: int, extreme: bool, least: int) -> None:
    check_sums(template, getattr(adding_kernels, f"case{index}"), CASES[index], index, least, extreme)


# With and without a residual sum; blocks, half a block, a part of a half.
ENDS = (
    Ending(CASES[0], "uint8_t", "irc::Nothing", 3, True),
    Ending(CASES[1], "int8_t", "float", -20, True),
    Ending(CASES[2], "uint8_t", "uint8_t", 100, False),
)


@needs_compiler
@pytest.mark.parametrize("index", range(len(ENDS)))
def test_results_in_integers(ending_kernels: ctypes.CDLL, index: int) -> None:
    check_ending(template, getattr(ending_kernels, f"end{index}"), ENDS[index], index)


def test_refuses() -> None:
    def reason(**options: object) -> str:
        sizes = {"channels": 4, "out_channels": 4, "kernel": (1, 1), "groups": 4} | options
        return template.refuses(problem_of(**sizes), "avx2") or ""

    assert not reason()
    assert "products of f32 with i8" in reason(activation="f32")
    assert "2 groups of 4 and 4 channels" in reason(groups=2)
    assert "4 groups of 4 and 8 channels" in reason(out_channels=8)
    assert "windows of 1056 places" in reason(kernel=(33, 32))
    problem = _problem(4, (3, 1))
    with pytest.raises(TargetError, match=r"\[4, 1, 3, 1\]"):
        template.pack(problem, torch.zeros(4, 3, 1, 1, dtype=torch.int8), torch.ones(4), 0)
    with pytest.raises(TargetError, match="scale is"):
        template.pack(problem, torch.zeros(4, 1, 3, 1, dtype=torch.int8), torch.ones(1), 0)
