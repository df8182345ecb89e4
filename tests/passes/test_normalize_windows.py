"""normalize-windows: padding by name and rounding up become numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import irc
from irc.core.program import Program
from irc.passes import NormalizeWindows
from tests.passes.running import assert_same, operations, reasons, run_pass

aten = torch.ops.aten
# PyTorch itself warns about the copy that uneven padding needs.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def program_of(model: nn.Module, *size: int) -> Program:
    return irc.capture(model.eval(), (torch.randn(3, *size),), dynamic=({0: "B"},), canonicalize=False)


# (layer, size of an image, padding in the result, zeros put around it from the last dimension on)
CONVOLUTIONS = {
    "1d, odd": (lambda: nn.Conv1d(3, 4, 5, padding="same"), (3, 9), [2], None),
    "1d, even": (lambda: nn.Conv1d(3, 4, 4, padding="same"), (3, 9), [0], [1, 2]),
    "1d, valid": (lambda: nn.Conv1d(3, 4, 4, stride=3, padding="valid"), (3, 10), [0], None),
    "2d, odd, dilated, in groups": (
        lambda: nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 3), groups=2),
        (4, 9, 14),
        [2, 6],
        None,
    ),
    "2d, even": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same", bias=False), (3, 5, 6), [0, 0], [1, 2, 0, 1]),
    "2d, even, dilated by 2": (lambda: nn.Conv2d(3, 4, 2, padding="same", dilation=2), (3, 5, 6), [1, 1], None),
    "2d, one even, dilated by 3": (
        lambda: nn.Conv2d(4, 4, (4, 3), padding="same", dilation=(3, 1), groups=4),
        (4, 11, 6),
        [0, 1],
        [0, 0, 4, 5],
    ),
    "2d, valid": (lambda: nn.Conv2d(3, 4, 3, stride=(2, 1), padding="valid"), (3, 8, 9), [0, 0], None),
    "3d, one even": (lambda: nn.Conv3d(2, 3, (3, 2, 1), padding="same"), (2, 4, 5, 3), [1, 0, 0], [0, 0, 0, 1, 0, 0]),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_padding_becomes_numbers(case: str) -> None:
    build, size, padding, around = CONVOLUTIONS[case]
    torch.manual_seed(0)
    before = program_of(build(), *size)
    result = run_pass(NormalizeWindows(), before)
    assert (result.matches, list(result.skips)) == (1, [])
    *pads, conv = result.program.operations()
    assert conv.target in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
    assert list(conv.args[4]) == padding
    assert [pad.target for pad in pads] == ([aten.constant_pad_nd.default] if around else [])
    assert not around or list(pads[0].args[1]) == around
    for batch in (1, 2, 5):
        assert_same(before, result.program, (torch.randn(batch, *size),))
    assert run_pass(NormalizeWindows(), result.program).matches == 0


def test_an_image_without_a_batch() -> None:
    model = nn.Conv2d(3, 4, 2, padding="same").eval()
    before = irc.capture(model, (torch.randn(3, 6, 7),), canonicalize=False)
    after = run_pass(NormalizeWindows(), before).program
    assert set(operations(after)) == {"constant_pad_nd", "conv2d"}
    assert_same(before, after, (torch.randn(3, 6, 7),))


class UnknownKernel(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv1d(x, weight, padding="same")


def test_refuses_a_kernel_of_unknown_size() -> None:
    example = (torch.randn(2, 3, 9), torch.randn(4, 3, 5))
    program = irc.capture(UnknownKernel(), example, dynamic=(None, {2: "K"}), canonicalize=False)
    result = run_pass(NormalizeWindows(), program)
    assert result.matches == 0
    assert "is not known" in reasons(result)


# (pool that rounds up, size, whether that changes nothing)
POOLS = {
    "divides": (nn.AvgPool2d(2, ceil_mode=True), (3, 6, 8), True),
    "divides in one dimension": (nn.AvgPool2d(2, ceil_mode=True), (3, 6, 7), False),
    "smaller than its window": (nn.AvgPool2d(9, ceil_mode=True), (3, 4, 4), False),
    "padded, strided": (nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True), (3, 7, 9), True),
    "padded, strided, not": (nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True), (3, 8, 8), False),
    "1d": (nn.AvgPool1d(3, stride=2, ceil_mode=True), (3, 9), True),
    "maximum": (nn.MaxPool2d(3, stride=2, dilation=2, ceil_mode=True), (3, 9, 11), True),
    "maximum, not": (nn.MaxPool2d(3, stride=2, ceil_mode=True), (3, 8, 9), False),
    "rounds down": (nn.AvgPool2d(2), (3, 6, 8), False),
}


@pytest.mark.parametrize("case", POOLS)
def test_rounding_up_goes_where_it_changes_nothing(case: str) -> None:
    pool, size, is_free = POOLS[case]
    torch.manual_seed(0)
    before = program_of(pool, *size)
    result = run_pass(NormalizeWindows(), before)
    assert result.matches == int(is_free)
    for batch in (1, 4):
        assert_same(before, result.program, (torch.randn(batch, *size),), rtol=0)
    assert run_pass(NormalizeWindows(), result.program).matches == 0


def test_a_size_that_is_not_known_may_need_rounding() -> None:
    example = (torch.randn(2, 3, 8, 8),)
    program = irc.capture(nn.AvgPool2d(2, ceil_mode=True), example, dynamic=({2: "H"},), canonicalize=False)
    assert run_pass(NormalizeWindows(), program).matches == 0


def test_runs_after_every_capture() -> None:
    program = irc.capture(nn.Conv2d(3, 4, 3, padding="same").eval(), (torch.randn(1, 3, 8, 8),))
    assert [node.target for node in program.operations()] == [aten.conv2d.default]
