"""What an evaluation found: one result, or several side by side, as tables, values and JSON."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from irc.core.report import bytes_text
from irc.evaluation.metrics import METRICS
from irc.view.folding import fold

_WIDTH = 140
_MARGIN, _SHORTEST_NAME = 2, 10


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model.

    Attributes:
        name: of the model or variant.
        metrics: value by name; see `irc.evaluation.metrics`.
        data: what it was evaluated on.
        num_samples: windows, inputs or sentences.
        weight_bytes: of the weights in memory.
        size_bytes: what their formats need, scales included, without padding.
        bits_per_weight: that over all numbers the weights stand for.
        seconds: that the model ran.
    """

    name: str
    metrics: Mapping[str, float]
    data: str = ""
    num_samples: int = 0
    weight_bytes: int | None = None
    size_bytes: int | None = None
    bits_per_weight: float | None = None
    seconds: float = 0.0

    def __getitem__(self, metric: str) -> float:
        return self.metrics[metric]

    def __getattr__(self, name: str) -> float:
        metrics = self.__dict__.get("metrics", {})
        if name in metrics:
            return metrics[name]
        known = f"measured: {', '.join(metrics)}" if name in METRICS else "no such metric or attribute"
        raise AttributeError(f"this evaluation has no {name!r}; {known}")

    def to_json(self) -> dict[str, Any]:
        """Values for JSON; what is not finite becomes None."""
        found = dict(vars(self))
        found["metrics"] = {k: v if math.isfinite(v) else None for k, v in self.metrics.items()}
        return found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Comparison([self]).table()

    def __str__(self) -> str:
        return str(Comparison([self]))


@dataclass
class Comparison:
    """Evaluations of several models on the same data, in the order they were given."""

    results: list[Evaluation] = field(default_factory=list)

    def __getitem__(self, name: str) -> Evaluation:
        for one in self.results:
            if one.name == name:
                return one
        raise KeyError(f"nothing called {name!r} was evaluated; there are {', '.join(r.name for r in self.results)}")

    def __iter__(self) -> Any:
        return iter(self.results)

    def table(self, width: int = _WIDTH) -> Table:
        """One row a model; long names are folded, so that the figures fit into `width` characters."""
        names = list(dict.fromkeys(name for one in self.results for name in one.metrics))
        titles = [METRICS[name].title if name in METRICS else name for name in names]
        columns = ["weights", "packed", "bits/weight", *titles, "time"]
        rows = [
            [
                "" if one.weight_bytes is None else bytes_text(one.weight_bytes),
                "" if one.size_bytes is None else bytes_text(one.size_bytes),
                "" if one.bits_per_weight is None else f"{one.bits_per_weight:.2f}",
                *(_shown(name, one.metrics.get(name)) for name in names),
                f"{one.seconds:.1f} s",
            ]
            for one in self.results
        ]
        figures = sum(max(map(len, cells)) + _MARGIN for cells in zip(columns, *rows, strict=True))
        room = max(width - figures - 1, _SHORTEST_NAME)
        table = Table(
            title=f"on {self.results[0].data}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
            show_edge=False,
        )  # fmt: skip
        table.add_column("", no_wrap=True)
        for title in columns:
            table.add_column(title, justify="right", no_wrap=True)
        for one, cells in zip(self.results, rows, strict=True):
            table.add_row(Text(fold(one.name, room)), *cells)
        return table

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {"data": self.results[0].data, "results": [one.to_json() for one in self.results]}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table(options.max_width)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
        console.print(self.table())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip("\n")


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return format(value, METRICS[name].style if name in METRICS else ".4f") if math.isfinite(value) else str(value)
