"""Two stages side by side, by meaning."""

from __future__ import annotations

import pytest
from rich.console import Console

import irc
from irc.core.pipeline import parse_pipeline
from irc.core.program import Program
from tests.lowering import steps


@pytest.fixture(scope="module")
def pair() -> tuple[Program, Program]:
    before = steps.decoder()
    pipeline = parse_pipeline("quantize-weights{bits=8,group-size=16},insert-kv-cache{max-length=16}")
    return before, irc.PassManager(pipeline, verify="off").run(before).program


def printed(difference: irc.view.difference.Difference, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(difference)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_operations_weights_and_inputs_side_by_side(pair: tuple[Program, Program]) -> None:
    lines = printed(irc.diff(*pair), 120)
    assert lines[0].startswith("before → after: ")
    assert [line.split()[0] for line in lines if " before" in line and "→" not in line] == [
        "operations", "weights", "inputs",
    ]  # fmt: skip
    attention = next(line for line in lines if line.startswith("irc.attention"))
    assert attention.split() == ["irc.attention", "irc.attention,", "irc.cache_write", "×2", "layers.*.attn"]
    row = next(line for line in lines if "o_proj.weight_stored" in line)
    assert "o_proj.weight f32[" in row  # what took its place stands beside it
    assert "o_proj.weight_scale" in lines[lines.index(row) + 1]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_it_fits_and_cuts_no_name(pair: tuple[Program, Program], width: int) -> None:
    lines = printed(irc.diff(*pair), width)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    left = "".join(line[: width // 2].strip() for line in lines)
    assert all(f"layers.*.attn.{name}_proj.weight" in left for name in "qkvo")


def test_the_same_program_twice(pair: tuple[Program, Program]) -> None:
    difference = irc.diff(pair[0], pair[0], names=("a", "b"))
    assert difference.is_empty
    assert str(difference) == f"a and b are the same: {difference.kept} operations"
