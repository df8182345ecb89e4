"""Reports: values in rows, and the table that people read."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from irc.core.contract import Skip
from irc.core.report import Report, Row, bytes_text, flops_text, nearest_miss

TABLE = """\
passes over toy
pass        matches  skips  nodes  weights  FLOPs   rel. error       KL  top-1  memory    time  check
──────────────────────────────────────────────────────────────────────────────────────────────────────
capture                        20   1.5 MB   2.0G                                         0 ms   5 ms
good              4            16   1.5 MB   2.0G      1.2e-07  3.0e-09  99.5%  2.0 kB   12 ms   9 ms
idle          0 (!)      2     16   1.5 MB   2.0G    unchanged                     0 B    1 ms   2 ms
idle-blind    0 (!)            16   1.5 MB      ?    unchanged                     0 B    1 ms   2 ms
unchecked         1            16   1.5 MB   2.0G  not checked                     0 B  12.0 s   0 ms
total 12.0 s in passes, 18 ms in checks
idle matched nothing: nearest miss %b (layers.0 m.py:3): eps is no constant
idle-blind matched nothing: no candidate was seen
unchecked: a note"""


@pytest.fixture
def report() -> Report:
    def row(name: str, **values: object) -> Row:
        common = {"nodes": 16, "weight_bytes": 1_500_000, "flops": 2_000_000_000}
        return Row(name=name, **(common | values))

    skips = [Skip("a", "another shape"), Skip("b", "eps is no constant", "layers.0 m.py:3", progress=3)]
    good = {"relative_error": 1.2e-7, "kl": 3e-9, "top1": 0.995, "memory_bytes": 2000}
    return Report(
        "toy",
        [
            row("capture", nodes=20, verify_ms=5.0),
            row("good", matches=4, modified=True, ms=12.0, verify_ms=9.0, **good),
            row("idle", matches=0, skips=skips, ms=1.0, verify_ms=2.0),
            row("idle-blind", matches=0, flops=None, ms=1.0, verify_ms=2.0),
            row("unchecked", matches=1, modified=True, ms=12_000.0, notes=["a note"]),
        ],
    )


def test_table(report: Report) -> None:
    assert "\n".join(line.rstrip() for line in str(report).splitlines()) == TABLE


def test_a_narrow_window_leaves_out_the_least_telling_columns(report: Report) -> None:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text
    assert "too narrow for: skips, top-1, memory, check" in text
    for title in ("pass", "matches", "nodes", "weights", "FLOPs", "rel. error", "KL", "time"):
        assert title in text.splitlines()[1]


def test_rows_by_name(report: Report) -> None:
    assert report["good"].matches == 4
    with pytest.raises(KeyError, match="the report has no row 'bad'; it has capture, good, idle"):
        report["bad"]
    assert (report.total_ms, report.verify_ms) == (12_014.0, 18.0)


def test_matching_nothing_is_marked_only_then(report: Report) -> None:
    assert [row.name for row in report.rows if row.matched_nothing] == ["idle", "idle-blind"]
    assert not Row(name="counts-not", matches=0, modified=True).matched_nothing


def test_the_nearest_miss_got_furthest() -> None:
    skips = [Skip("a", "x"), Skip("b", "y", progress=2), Skip("c", "z", progress=2)]
    found = nearest_miss(skips)
    assert found is not None
    assert found.node == "b"
    assert nearest_miss([]) is None


def test_units() -> None:
    assert [bytes_text(n) for n in (0, 999, 1000, 123_456, 5 * 10**9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "123.5 kB",
        "5.0 GB",
    ]
    assert [flops_text(n) for n in (None, 7, 2_500_000, 3 * 10**12)] == ["?", "7", "2.5M", "3.0T"]
