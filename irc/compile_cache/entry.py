"""Entries of a cache folder: a saved model, the graph that was captured, the report, and the files it all came from.

<folder>/key                secret bytes under which weights are digested
<folder>/<digest>/entry.json, capture.irc, model/
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irc.compile_cache import sources
from irc.compile_cache.identity import Doubt
from irc.core.contract import Skip
from irc.core.errors import StorageError
from irc.core.report import Report, Row

_FORMAT = 1
_ENTRY, _CAPTURE, _MODEL, _KEY = "entry.json", "capture.irc", "model", "key"


@dataclass(frozen=True)
class Kept:
    """A compilation that was kept.

    Attributes:
        model: folder of the saved model.
        captured: text of the program that was captured.
        report: of that compilation.
    """

    model: Path
    captured: str
    report: Report


def secret(folder: Path) -> bytes:
    """The folder's key; made at the first call."""
    path = folder / _KEY
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(os.urandom(32))
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)  # whoever comes first
        os.unlink(file.name)
    return path.read_bytes()


def find(folder: Path, key: str) -> Kept | str:
    """The entry of that key, or why there is none that can be used."""
    place = folder / key
    if not place.is_dir():
        return "nothing was kept for this compilation"
    try:
        entry = json.loads((place / _ENTRY).read_text())
        if entry["format"] != _FORMAT:
            return f"{place} is of another version"
        changed = sources.why_changed(entry["sources"])
        if changed is not None:
            return changed
        rows = [Row(**{**row, "skips": [Skip(**skip) for skip in row["skips"]]}) for row in entry["rows"]]
        captured = (place / _CAPTURE).read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{place} is damaged: {error}"
    return Kept(place / _MODEL, captured, Report(entry["program"], rows))


def keep(folder: Path, key: str, *, captured: str, report: Report, save: Callable[[Path], Any]) -> None:
    """Put a compilation there, in the place of an older one; `save` writes its model.

    Raises:
        Doubt: it cannot be kept as a folder, or not be written.
    """
    try:
        work = Path(tempfile.mkdtemp(dir=folder, prefix=".making-"))
        try:
            _write(work, captured, report, save)
            shutil.rmtree(folder / key, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process has just put the same there
                os.replace(work, folder / key)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, StorageError) as error:
        raise Doubt(f"it could not be written: {error}") from error


def _write(work: Path, captured: str, report: Report, save: Callable[[Path], Any]) -> None:
    save(work / _MODEL)
    if not (work / _MODEL).is_dir():
        raise Doubt("the artifact is no folder")
    (work / _CAPTURE).write_text(captured, encoding="utf-8")
    rows = [dataclasses.asdict(row) for row in report.rows]
    noted = sources.loaded()  # now, for saving may have loaded more
    entry = {"format": _FORMAT, "program": report.program, "rows": rows, "sources": noted}
    (work / _ENTRY).write_text(json.dumps(entry))
