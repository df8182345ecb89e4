"""Instruments: when they are called, and what the shipped ones do."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from irc.core.errors import NumericError
from irc.core.instruments import (
    DumpInstrument,
    Instrument,
    PrintAfterChange,
    ProgressInstrument,
    TimingInstrument,
    write_text,
)
from irc.core.manager import PassManager
from irc.core.program import Program
from tests.manager.toys import PowToSquare, SquareToPow


class Recorder(Instrument):
    """Writes down every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def started(self, program: Program, passes: Any, row: Any) -> None:
        self.calls.append(("started", program.name, len(passes), row.name))

    def before_pass(self, index: int, one: Any, program: Program) -> None:
        self.calls.append(("before", index, one.name))

    def after_pass(self, index: int, one: Any, before: Program, after: Program, row: Any) -> None:
        self.calls.append(("after", index, one.name, before is not after, row.matches))

    def failed(self, index: int, one: Any, before: Program, error: Exception) -> None:
        self.calls.append(("failed", index, one.name, type(error).__name__))

    def finished(self, report: Any) -> None:
        self.calls.append(("finished", len(report.rows)))


def test_order_of_calls(program: Program) -> None:
    recorder = Recorder()
    PassManager([SquareToPow(), PowToSquare()], instruments=[recorder]).run(program)
    assert recorder.calls == [
        ("started", "toy", 2, "capture"),
        ("before", 1, "square-to-pow"),
        ("after", 1, "square-to-pow", True, 3),
        ("before", 2, "pow-to-square"),
        ("after", 2, "pow-to-square", True, 3),
        ("finished", 3),
    ]


def test_a_failure_is_reported_and_ends_the_run(program: Program) -> None:
    recorder = Recorder()
    with pytest.raises(NumericError):
        PassManager([SquareToPow(wrong=(0,)), PowToSquare()], instruments=[recorder]).run(program)
    assert recorder.calls[-1] == ("failed", 1, "square-to-pow", "NumericError")


def test_timing(program: Program) -> None:
    timing = TimingInstrument()
    report = PassManager([SquareToPow(), PowToSquare()], instruments=[timing]).run(program).report
    assert list(timing.times) == ["square-to-pow", "pow-to-square"]
    assert timing.times["square-to-pow"] == report["square-to-pow"].ms > 0
    assert timing.verify_times["square-to-pow"] == report["square-to-pow"].verify_ms > 0


def test_print_after_change(program: Program) -> None:
    stream = io.StringIO()
    result = PassManager([PowToSquare(), SquareToPow()], instruments=[PrintAfterChange(stream)]).run(program)
    text = stream.getvalue()
    assert text.startswith("# pow-to-square changed nothing\n\n# after square-to-pow (3 matches, ")
    assert str(result.program) in text


def test_dumps_are_numbered_and_whole(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    folder.mkdir()
    (folder / "07-an-older-run.irc").write_text("old")
    (folder / "notes.txt").write_text("mine")
    result = PassManager([SquareToPow(), PowToSquare(), PowToSquare()], dump_dir=folder).run(program)
    assert sorted(path.name for path in folder.iterdir()) == [
        "00-capture.irc",
        "01-square-to-pow.irc",
        "02-pow-to-square.irc",
        "03-pow-to-square#2.irc",
        "notes.txt",
    ]
    assert (folder / "01-square-to-pow.irc").read_text() == f"{result.stages['square-to-pow']}\n"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "dump.irc"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_pass_leaves_the_dumps_before_it(program: Program, tmp_path: Path) -> None:
    with pytest.raises(NumericError):
        PassManager([PowToSquare(), SquareToPow(wrong=(0,))], instruments=[DumpInstrument(tmp_path)]).run(program)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00-capture.irc", "01-pow-to-square.irc"]


def test_progress_ends_with_the_run(program: Program) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    progress = ProgressInstrument(console)
    PassManager([SquareToPow(), PowToSquare()], instruments=[progress]).run(program)
    assert "2/2" in console.file.getvalue()
    with pytest.raises(NumericError):
        PassManager([SquareToPow(wrong=(0,))], instruments=[progress]).run(program)
    assert not progress._progress.live.is_started
