"""Observers of a pass manager: timing, printing, dumping, progress. Subclass `Instrument` for your own.

The manager calls `started`, then `before_pass` and `after_pass` (or `failed`) for each pass, then `finished`.
Passes are counted from 1; 0 is the program that the pipeline started from.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from irc.core.contract import Pass
from irc.core.program import Program
from irc.core.report import Report, Row

_DUMP_NAME = re.compile(r"\d{2,}-[\w.#-]+\.irc")


class Instrument:
    """Base: does nothing at any point."""

    def started(self, program: Program, passes: Sequence[Pass], row: Row) -> None:
        """Before the first pass; `row` describes the program as it came."""

    def before_pass(self, index: int, one: Pass, program: Program) -> None:
        """Before a pass runs on (a copy of) the program."""

    def after_pass(self, index: int, one: Pass, before: Program, after: Program, row: Row) -> None:
        """After a pass ran and was checked."""

    def failed(self, index: int, one: Pass, before: Program, error: Exception) -> None:
        """After a pass, or a check of it, failed; the error is raised next."""

    def finished(self, report: Report) -> None:
        """After the last pass."""


class TimingInstrument(Instrument):
    """Collects milliseconds of each stage, without and with checks: `times["fold-constants"]`."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.verify_times: dict[str, float] = {}

    def after_pass(self, index: int, one: Pass, before: Program, after: Program, row: Row) -> None:
        self.times[row.name] = row.ms
        self.verify_times[row.name] = row.verify_ms


class PrintAfterChange(Instrument):
    """Prints the program after every pass that changed it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream

    def after_pass(self, index: int, one: Pass, before: Program, after: Program, row: Row) -> None:
        stream = self.stream or sys.stdout
        if row.modified:
            stream.write(f"# after {row.name} ({row.matches} matches, {row.ms:.0f} ms)\n{after}\n\n")
        else:
            stream.write(f"# {row.name} changed nothing\n\n")


class DumpInstrument(Instrument):
    """Writes every stage into a folder: `00-capture.irc`, `01-drop-noise.irc`, …

    A dump is written aside and renamed, so that no reader sees half of one. Dumps of an earlier run in
    the same folder are removed first.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def started(self, program: Program, passes: Sequence[Pass], row: Row) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.iterdir():
            if _DUMP_NAME.fullmatch(old.name):
                old.unlink()
        self._write(0, row.name, program)

    def after_pass(self, index: int, one: Pass, before: Program, after: Program, row: Row) -> None:
        self._write(index, row.name, after)

    def _write(self, index: int, name: str, program: Program) -> None:
        write_text(self.folder / f"{index:02d}-{name}.irc", f"{program}\n")


class ProgressInstrument(Instrument):
    """A progress bar over the passes, on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console or Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("passes", total=None)

    def started(self, program: Program, passes: Sequence[Pass], row: Row) -> None:
        self._progress.reset(self._task, total=len(passes))
        self._progress.start()

    def before_pass(self, index: int, one: Pass, program: Program) -> None:
        self._progress.update(self._task, description=one.name)

    def after_pass(self, index: int, one: Pass, before: Program, after: Program, row: Row) -> None:
        self._progress.advance(self._task)

    def failed(self, index: int, one: Pass, before: Program, error: Exception) -> None:
        self._progress.stop()

    def finished(self, report: Report) -> None:
        self._progress.stop()


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either there whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
