"""What a pipeline did: one row a pass, as a table for people and as values for programs."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from irc.core.contract import Skip

_WIDTH = 140
_COLUMN_MARGIN = 2


@dataclass(kw_only=True)
class Row:
    """One pass of a run, or (first row) the program it started from.

    Attributes:
        name: stage name: the pass's, with `#2` and so on when it runs again.
        matches: places rewritten; None for the first row.
        flops: of one run at the example sizes; None when an operation has no cost.
        modified: whether the program changed, found by structural hash.
        absolute_error, relative_error: largest over all outputs and input sizes; None: not compared.
        kl, top1: mean KL divergence (nats a token) and top-1 agreement, for programs that give logits.
        memory_bytes: growth of the process's resident memory while the pass ran (its peak where the pass
            set a new one).
        verify_ms: cost of checking, which is not part of `ms`.
    """

    name: str
    matches: int | None = None
    skips: list[Skip] = field(default_factory=list)
    nodes: int = 0
    weight_bytes: int = 0
    flops: int | None = None
    modified: bool = False
    absolute_error: float | None = None
    relative_error: float | None = None
    kl: float | None = None
    top1: float | None = None
    ms: float = 0.0
    verify_ms: float = 0.0
    memory_bytes: int = 0
    statistics: dict[str, int | float | str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def matched_nothing(self) -> bool:
        return self.matches == 0 and not self.modified


@dataclass
class Report:
    """Rows of a run, in order; `str(report)` is the table."""

    program: str
    rows: list[Row] = field(default_factory=list)

    def __getitem__(self, name: str) -> Row:
        """The row of that stage."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"the report has no row {name!r}; it has {', '.join(row.name for row in self.rows)}")

    @property
    def total_ms(self) -> float:
        return sum(row.ms for row in self.rows)

    @property
    def verify_ms(self) -> float:
        return sum(row.verify_ms for row in self.rows)

    def table(self, width: int = _WIDTH) -> Table:
        """A rich table of all rows, with what matched nothing marked and explained below.

        Columns that do not fit into `width` characters are left out, the least telling first, and named below.
        """
        shown, left_out = self._fitting_columns(width)
        table = Table(
            title=f"passes over {self.program}", title_justify="left", caption_justify="left",
            box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False,
        )  # fmt: skip
        for column in shown:
            table.add_column(column.title, justify="left" if column is _COLUMNS[0] else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(column.cell(row) for column in shown))
        remarks = self._remarks()
        if left_out:
            remarks.insert(0, f"too narrow for: {', '.join(column.title for column in left_out)}")
        table.caption = Text("\n".join(remarks), style="not dim not italic")
        return table

    def _fitting_columns(self, width: int) -> tuple[list[_Column], list[_Column]]:
        has_logits = any(row.kl is not None for row in self.rows)
        shown = [c for c in _COLUMNS if has_logits or not c.for_logits]
        widths = {
            c.title: max(len(c.title), *(len(str(c.cell(row))) for row in self.rows)) if self.rows else len(c.title)
            for c in shown
        }
        left_out: list[_Column] = []
        while len(shown) > 1 and sum(widths[c.title] + _COLUMN_MARGIN for c in shown) > width:
            least = max(shown, key=lambda c: c.rank)
            shown.remove(least)
            left_out.append(least)
        return shown, [c for c in _COLUMNS if c in left_out]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table(options.max_width)

    def _remarks(self) -> list[str]:
        remarks = [f"total {_ms(self.total_ms)} in passes, {_ms(self.verify_ms)} in checks"]
        for row in self.rows:
            if row.matched_nothing:
                miss = nearest_miss(row.skips)
                reason = f"nearest miss {skip_text(miss)}" if miss else "no candidate was seen"
                remarks.append(f"{row.name} matched nothing: {reason}")
            remarks.extend(f"{row.name}: {note}" for note in row.notes)
        return remarks

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
        console.print(self.table())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip("\n")


def nearest_miss(skips: list[Skip]) -> Skip | None:
    """The skip whose match got furthest (the first of them)."""
    return max(skips, key=lambda skip: skip.progress, default=None)


def skip_text(skip: Skip) -> str:
    """`%node (layers.0 model.py:12): reason`."""
    return f"%{skip.node}{f' ({skip.location})' if skip.location else ''}: {skip.reason}"


def bytes_text(count: int) -> str:
    """`1.5 MB`, with decimal units."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def flops_text(count: int | None) -> str:
    """`1.5G`; `?` when unknown."""
    return "?" if count is None else _scaled(count, ("", "k", "M", "G", "T", "P")).replace(" ", "")


def _scaled(count: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(count) < 1000:
            return f"{count:.0f} {unit}".rstrip() if unit == units[0] else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} {units[-1]}"


def _matches(row: Row) -> Text:
    if row.matches is None:
        return Text("")
    return Text("0 (!)", style="bold yellow") if row.matched_nothing else Text(str(row.matches))


def _error(row: Row) -> str:
    if row.matches is None:
        return ""
    if not row.modified:
        return "unchanged"
    return "not checked" if row.relative_error is None else f"{row.relative_error:.1e}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value < 10_000 else f"{value / 1000:.1f} s"


@dataclass(frozen=True)
class _Column:
    """A column of the table; the higher its rank, the sooner a narrow window does without it."""

    title: str
    rank: int
    cell: Callable[[Row], Text | str]
    for_logits: bool = False


_COLUMNS = (
    _Column("pass", 0, lambda row: row.name),
    _Column("matches", 1, lambda row: _matches(row)),
    _Column("skips", 8, lambda row: str(len(row.skips)) if row.skips else ""),
    _Column("nodes", 4, lambda row: str(row.nodes)),
    _Column("weights", 3, lambda row: bytes_text(row.weight_bytes)),
    _Column("FLOPs", 6, lambda row: flops_text(row.flops)),
    _Column("rel. error", 2, _error),
    _Column("KL", 7, lambda row: _number(row.kl), for_logits=True),
    _Column("top-1", 9, lambda row: _percent(row.top1), for_logits=True),
    _Column("memory", 11, lambda row: bytes_text(row.memory_bytes) if row.matches is not None else ""),
    _Column("time", 5, lambda row: _ms(row.ms)),
    _Column("check", 10, lambda row: _ms(row.verify_ms)),
)
