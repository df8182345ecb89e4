"""Masks by evaluation: kinds, windows off by one, refusals with reasons, and the cost of probing."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from irc.core.masks import CAUSAL, FULL, MaskKind, NotAMaskKind, recognise
from irc.core.program import Program
from irc.core.row_evaluation import RowEvaluator
from irc.frontend import capture

MIN = torch.finfo(torch.float32).min


class Masked(nn.Module):
    """Returns a mask made of positions: query positions [S, 1], key positions [1, S]."""

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.register_buffer("table", torch.tril(torch.ones(40, 40, dtype=torch.bool)))
        self.register_buffer("width", torch.tensor(300))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        return self.make(positions[:, None], positions[None, :])


def program_of(module: nn.Module, length: int = 6) -> Program:
    return capture(module, (torch.zeros(3, length),), dynamic=({0: "B", 1: "S"},), canonicalize=False)


def kind_of(make: Callable[[Tensor, Tensor], Tensor], *, inverted: bool = False) -> MaskKind | NotAMaskKind:
    program = program_of(Masked(make))
    length = program.dims["S"].size
    return recognise(program, program.outputs[0], queries=length, keys=length, inverted=inverted)


def additive(keep: Tensor, fill: float) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, fill)


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], MaskKind]] = {
    "causal": (lambda p, t: t <= p, CAUSAL),
    "causal, triangle": (lambda p, t: torch.ones(p.shape[0], p.shape[0], dtype=torch.bool).tril(), CAUSAL),
    "causal, -inf": (lambda p, t: additive(t <= p, -torch.inf), CAUSAL),
    "causal, smallest number": (lambda p, t: additive(t <= p, MIN), CAUSAL),
    "causal, -1e9": (lambda p, t: additive(t <= p, -1e9), CAUSAL),
    "causal, float triangle": (lambda p, t: torch.full((p.shape[0], p.shape[0]), -torch.inf).triu(1), CAUSAL),
    "causal, batch and heads": (lambda p, t: (t <= p)[None, None].expand(2, 4, -1, -1), CAUSAL),
    "full": (lambda p, t: t >= 0 * p, FULL),
    "full, zeros": (lambda p, t: torch.zeros(p.shape[0], p.shape[0]), FULL),
    "sliding(1)": (lambda p, t: t == p, MaskKind("sliding", 1)),
    "sliding(4)": (lambda p, t: (t <= p) & (t > p - 4), MaskKind("sliding", 4)),
    "sliding(5)": (lambda p, t: (t <= p) & (t >= p - 4), MaskKind("sliding", 5)),
    "sliding(64), additive": (lambda p, t: additive((t <= p) & (t > p - 64), MIN), MaskKind("sliding", 64)),
    "sliding(4096)": (lambda p, t: (t <= p) & (t > p - 4096), MaskKind("sliding", 4096)),
    "sliding(4097)": (lambda p, t: (t <= p) & (p - t <= 4096), MaskKind("sliding", 4097)),
    "chunked(5)": (lambda p, t: (t <= p) & (t // 5 == p // 5), MaskKind("chunked", 5)),
    "chunked(6)": (lambda p, t: (t <= p) & (t // 6 == p // 6), MaskKind("chunked", 6)),
    "chunked(2048)": (lambda p, t: (t <= p) & (t // 2048 == p // 2048), MaskKind("chunked", 2048)),
}


@pytest.mark.parametrize("name", KINDS)
def test_kind(name: str) -> None:
    make, kind = KINDS[name]
    assert kind_of(make) == kind


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "anticausal": (lambda p, t: t >= p, "none of full, causal"),
    "causal but one entry": (lambda p, t: (t <= p) & ~((p == 7) & (t == 3)), "query 7 of"),
    "strictly causal": (lambda p, t: t < p, "none of full, causal"),
    "both ways": (lambda p, t: (t - p).abs() <= 3, "none of full, causal"),
    "prefix": (lambda p, t: (t <= p) | (t < 4), "none of full, causal"),
    "dilated": (lambda p, t: (t <= p) & ((p - t) % 2 == 0), "none of full, causal"),
    "slopes": (lambda p, t: (t - p).float() * 0.5, "neither 0 nor a mask value"),
    "weak fill": (lambda p, t: additive(t <= p, -100.0), "holds -100"),
    "by head": (lambda p, t: torch.stack([t <= p, t <= p + 1]), "differs between batch entries or heads"),
    "far constant": (lambda p, t: (t <= p) & (t > p - 10_000_000), "too large to probe"),
    "integers": (lambda p, t: (t <= p).long(), "has type"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, reason = REFUSED[name]
    found = kind_of(make)
    assert isinstance(found, NotAMaskKind)
    assert reason in found.reason


def test_inverted_mask_drops_where_true() -> None:
    assert kind_of(lambda p, t: t > p, inverted=True) == CAUSAL
    assert isinstance(kind_of(lambda p, t: t <= p, inverted=True), NotAMaskKind)


class Table(Masked):
    def forward(self, x: Tensor) -> Tensor:
        return self.table[: x.shape[1], : x.shape[1]]


class WidthInBuffer(Masked):
    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        p, t = positions[:, None], positions[None, :]
        return (t <= p) & (t > p - self.width)


def recognise_output(module: nn.Module) -> MaskKind | NotAMaskKind:
    program = program_of(module)
    length = program.dims["S"].size
    return recognise(program, program.outputs[0], queries=length, keys=length)


def test_slice_of_a_fixed_table_is_probed_up_to_its_end() -> None:
    assert recognise_output(Table(torch.le)) == CAUSAL
    spoiled = Table(torch.le)
    spoiled.table[39, 5] = False
    assert isinstance(recognise_output(spoiled), NotAMaskKind)


def test_window_in_a_buffer_counts_as_a_constant() -> None:
    assert recognise_output(WidthInBuffer(torch.le)) == MaskKind("sliding", 300)


class Padding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0)[:, None, :].expand(-1, x.shape[1], -1)


def test_data_dependent_mask_is_refused() -> None:
    found = recognise_output(Padding())
    assert isinstance(found, NotAMaskKind)
    assert "not known before the program runs" in found.reason


class Offset(nn.Module):
    """Queries sit at the end of the keys: y has P more positions in front."""

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        num_past = past.shape[1]
        keys = torch.arange(num_past + x.shape[1])
        return keys[None, :] <= (torch.arange(x.shape[1]) + num_past)[:, None]


def test_more_keys_than_queries_align_at_the_end() -> None:
    inputs, names = (torch.zeros(3, 5), torch.zeros(3, 4)), ({0: "B", 1: "S"}, {0: "B", 1: "P"})
    program = capture(Offset(), inputs, dynamic=names, canonicalize=False)
    new, past = program.dims["S"].size, program.dims["P"].size
    assert recognise(program, program.outputs[0], queries=new, keys=new + past) == CAUSAL


def test_two_masks_are_one_kind_together() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            positions = torch.arange(x.shape[1])
            p, t = positions[:, None], positions[None, :]
            return t <= p, t > p - 3

    program = program_of(Two())
    length = program.dims["S"].size
    assert recognise(program, program.outputs, queries=length, keys=length) == MaskKind("sliding", 3)
    assert isinstance(recognise(program, program.outputs[1], queries=length, keys=length), NotAMaskKind)


def test_wide_windows_are_cheap() -> None:
    program = program_of(Masked(lambda p, t: (t <= p) & (t > p - 32768)))
    length = program.dims["S"].size
    start = time.perf_counter()
    assert recognise(program, program.outputs[0], queries=length, keys=length) == MaskKind("sliding", 32768)
    assert time.perf_counter() - start < 3.0  # 4·10^9 entries if it were evaluated whole


@pytest.mark.parametrize("name", ["causal, -inf", "causal, float triangle", "sliding(4)", "causal, batch and heads"])
def test_rows_equal_the_whole(name: str) -> None:
    program = program_of(Masked(KINDS[name][0]))
    rows = [0, 3, 4, 9]
    mask = program.outputs[0]
    whole = RowEvaluator(program, {"B": 2, "S": 10}).whole(mask)
    assert torch.equal(RowEvaluator(program, {"B": 2, "S": 10}).rows(mask, rows), whole[..., rows, :])
