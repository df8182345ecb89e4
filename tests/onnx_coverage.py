"""The ONNX table: what ONNX Runtime makes of every model of the zoo.

`python -m tests.onnx_coverage [models]` recomputes rows (all of them, in an hour) and writes the table in docs/onnx.md.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from irc.core.artifact_check import check_artifact
from irc.core.contract import PassContext
from irc.core.program import Program
from irc.core.target import get_target
from irc.passes.attention.insert_kv_cache import InsertKVCache
from tests import zoo

PAGE = Path(__file__).parent.parent / "docs" / "onnx.md"
TOLERANCE = 1e-4
COLUMNS = ("portable", "portable, cache", "ort, cache")
_START, _END = "<!-- table -->\n", "<!-- end of table -->"
_CACHE = "insert-kv-cache"


def compute(name: str) -> str:
    """The row of one model as the page shows it; a failure in one column does not hide the others."""
    cells, reasons = [], []
    makers: dict[str, Callable[[], Program]] = {
        "portable": lambda: zoo.captured(name),
        "portable, cache": lambda: _step(name),
        "ort, cache": lambda: _step(name),
    }
    for column, make in makers.items():
        if "cache" in column and not zoo.ZOO[name].causal:
            cells.append("–")
            continue
        try:
            cells.append(_error(make(), column.partition(",")[0]))
        except Exception as error:  # a table of what fails must not stop at a failure of whatever kind
            cells.append("fails")
            reasons.append(f"{column}: {_short(error)}")
    return f"| {name} | {zoo.ZOO[name].kind} | " + " | ".join(cells) + f" | {'; '.join(reasons) or 'agrees'} |"


def _step(name: str) -> Program:
    return InsertKVCache().run(zoo.captured(name).copy(), PassContext()).program


def _error(program: Program, flavour: str) -> str:
    """The largest relative error at batch 1 and 3 and three lengths, one of them 1."""
    artifact = get_target("onnx").lower(program, {"flavour": flavour})
    check = check_artifact("onnx", artifact.run, program, tolerance=TOLERANCE)
    check.require()
    if not check.runs:
        raise AssertionError("nothing could be run")
    note = f" ({len(check.skipped)} sizes the program itself does not take)" if check.skipped else ""
    return f"{_magnitude(check.relative)}{note}"


def _magnitude(error: float) -> str:
    """Only the order of magnitude, rounded up: the page should not change with the machine."""
    for bound in (1e-6, 1e-5, 1e-4):
        if error <= bound:
            return f"≤ {bound:.0e}".replace("e-0", "e-")
    return f"{error:.0e}"


def _short(error: Exception) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return (text[:297] + "…" if len(text) > 300 else text).replace("|", "\\|")


def rows_of(page: str) -> dict[str, str]:
    """Rows on the page by model."""
    table = page.partition(_START)[2].partition(_END)[0]
    found = {}
    for text in table.splitlines():
        name = text.strip("|").partition("|")[0].strip()
        if text.startswith("|") and name in zoo.ZOO:
            found[name] = text
    return found


def with_rows(page: str, rows: Mapping[str, str]) -> str:
    """The page with its table replaced."""
    listed = [rows[name] for name in zoo.ZOO if name in rows]
    head = "| model | kind | " + " | ".join(COLUMNS) + " | |\n|" + " --- |" * (len(COLUMNS) + 3)
    counts = Counter(text.endswith("| agrees |") for text in listed)
    table = "\n".join([head, *listed]) + f"\n\n{counts[True]} of {len(listed)} agree.\n"
    if _START not in page or _END not in page:
        raise SystemExit(f"{PAGE} has no place for the table ({_START.strip()} … {_END.strip()})")
    return re.sub(f"(?s){_START}.*{_END}", lambda _: f"{_START}{table}{_END}", page)


def main(names: Sequence[str]) -> None:
    """Recompute the given models' rows (all, if none is given) and rewrite the page after each."""
    for name in names or zoo.ZOO:
        row = compute(name)
        page = PAGE.read_text()
        PAGE.write_text(with_rows(page, rows_of(page) | {name: row}))
        print(row, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
