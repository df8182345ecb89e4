"""Compare two stages of a program by meaning: which operations became which, and where.

Nodes are matched by name and operation; what is left over on either side is grouped by the captured
operations it stands for (provenance), and groups that change in the same way are counted together.
So a fused norm in twenty-two layers is one line, ×22.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
import torch.fx as fx
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from irc.core import provenance
from irc.core.errors import OptionError
from irc.core.program import Program, describe, is_size
from irc.view.folding import fold

_WIDTH = 120


@dataclass(frozen=True)
class Change:
    """A group of operations that became another group.

    Attributes:
        before, after: operation names with counts, e.g. `mul ×2, mean, rsqrt`; empty for none.
        places: module paths at which this happened.
    """

    before: str
    after: str
    places: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """What changed between two stages; `str()` and rich print it as tables.

    Attributes:
        kept: number of operations that are the same in both.
        changes: groups, most frequent first.
        weights: lines about weights that were added, removed or replaced.
        inputs: lines about inputs that differ.
    """

    before_name: str
    after_name: str
    kept: int
    changes: tuple[Change, ...]
    weights: tuple[str, ...]
    inputs: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        return not (self.changes or self.weights or self.inputs)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Tables as wide as the console, before and after side by side: operations, then weights, then inputs."""
        if self.is_empty:
            yield Text(f"{self.before_name} and {self.after_name} are the same: {self.kept} operations")
            return
        yield Text(f"{self.before_name} → {self.after_name}: {self.kept} operations kept")
        operations = [(one.before or "·", one.after or "·", _places(one.places)) for one in self.changes]
        width = options.max_width
        for columns, rows in (
            (("operations before", "after", "places"), operations),
            (("weights before", "after"), list(_side_by_side(self.weights))),
            (("inputs before", "after"), list(_side_by_side(self.inputs))),
        ):
            if rows:
                yield ""
                yield _table(columns, rows, width)

    def __str__(self) -> str:
        console = Console(width=_WIDTH, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    """A table of equally wide columns, with names folded at their dots."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    each = (width - len(columns) + 1) // len(columns)
    for column in columns:
        table.add_column(Text(fold(column, each)), width=each, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(fold(cell, each)) for cell in row))
    return table


def _side_by_side(lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Removed lines on the left, beside them what was added under their name; then the rest, and what changed."""
    split = [tuple(line.split(" → ", 1)) for line in lines]
    gone, new = [old for old, now in split if not now], [now for old, now in split if not old]
    heirs = {old: [now for now in new if now.startswith(f"{old.split(' ')[0]}_")] for old in gone}
    for old, found in heirs.items():
        if found:
            yield from itertools.zip_longest([old], found, fillvalue="")
    inherited = {now for found in heirs.values() for now in found}
    others = (now for now in new if now not in inherited)
    yield from itertools.zip_longest((old for old in gone if not heirs[old]), others, fillvalue="")
    yield from ((old, now) for old, now in split if old and now)


def diff(before: Program, after: Program, *, names: tuple[str, str] = ("before", "after")) -> Difference:
    """Compare two programs, best two stages of one pipeline.

    Raises:
        OptionError: one of the two is no program.
    """
    for given in (before, after):
        if not isinstance(given, Program):
            raise OptionError(f"diff compares two programs, such as compiled.stages[…]; not a {type(given).__name__}")
    left, right = {n.name: n for n in before.operations()}, {n.name: n for n in after.operations()}
    same = {
        name for name in left.keys() & right.keys() if _signature(before, left[name]) == _signature(after, right[name])
    }
    gone = [node for name, node in left.items() if name not in same]
    new = [node for name, node in right.items() if name not in same]
    return Difference(
        names[0], names[1], len(same), tuple(_changes(gone, new)),
        tuple(_weight_lines(before, after)), tuple(_input_lines(before, after)),
    )  # fmt: skip


def _signature(program: Program, node: fx.Node) -> tuple[object, ...]:
    """Operation and constants; which nodes it reads is left out, since a neighbour's change is told there."""

    def constant(value: object) -> object:
        if isinstance(value, fx.Node):
            return (
                str(program.expr(value.meta["val"])) if is_size(value) and value.op != "get_attr" else _weight_of(value)
            )
        if isinstance(value, (list, tuple)):
            return tuple(constant(v) for v in value)
        return value

    return (node.target, constant(node.args), tuple((k, constant(v)) for k, v in sorted(node.kwargs.items())))


def _weight_of(node: fx.Node) -> str:
    return f"@{node.target}" if node.op == "get_attr" else "%"


def _changes(gone: list[fx.Node], new: list[fx.Node]) -> Iterable[Change]:
    """Connected groups of removed and added nodes that share captured operations."""
    graph = nx.Graph()
    for side, nodes in (("before", gone), ("after", new)):
        for node in nodes:
            graph.add_node((side, node))
            for source in provenance.sources_of(node):
                graph.add_edge((side, node), source)
    groups: dict[tuple[str, str], list[str]] = {}
    for component in nx.connected_components(graph):
        members = [item for item in component if isinstance(item, tuple)]
        sides = {s: [n for side, n in members if side == s] for s in ("before", "after")}
        if not any(sides.values()):
            continue
        place = _common_path([provenance.module_path(n) for nodes in sides.values() for n in nodes])
        groups.setdefault((_count(sides["before"]), _count(sides["after"])), []).append(place)
    for (old, now), places in sorted(groups.items(), key=lambda item: -len(item[1])):
        yield Change(old, now, tuple(sorted(places, key=_natural)))


def _count(nodes: Iterable[fx.Node]) -> str:
    counts = Counter(_operation(node) for node in nodes)
    return ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in sorted(counts.items()))


def _operation(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    return str(getattr(node.target, "_schema", node).name).replace("::", ".")


def _common_path(paths: list[str]) -> str:
    parts = [path.split(".") for path in paths if path]
    if not parts:
        return ""
    common: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common)


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _places(places: tuple[str, ...]) -> str:
    """`layers.*.norm1 ×5` instead of five paths."""
    patterns = Counter(_star(place) or "(top)" for place in places)
    return ", ".join(f"{pattern} ×{n}" if n > 1 else pattern for pattern, n in patterns.items())


def _bundles(lines: Iterable[str]) -> list[str]:
    """Lines that differ only in layer numbers counted together."""
    counts: Counter[str] = Counter()
    for line in lines:
        name, _, kind = line.partition(" ")
        counts[f"{_star(name.rstrip(':'))}{':' if name.endswith(':') else ''} {kind}"] += 1
    return [f"{line} ×{n}" if n > 1 else line for line, n in counts.items()]


def _star(path: str) -> str:
    """`layers.3.norm1` → `layers.*.norm1`, `cache_k_3` → `cache_k_*`."""
    return re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])|(?<=_)\d+$", "*", path)


def _weight_lines(before: Program, after: Program) -> Iterable[str]:
    left, right = before.weights, after.weights

    changed = [n for n in left.keys() & right.keys() if left[n] is not right[n] and not _same_tensor(left[n], right[n])]
    gone = _bundles([f"{n} {describe(w)}" for n, w in left.items() if n not in right])
    new = _bundles([f"{n} {describe(w)}" for n, w in right.items() if n not in left])
    yield from (f"{line} → " for line in gone)
    yield from (f" → {line}" for line in new)
    for name in sorted(changed):
        yield f"{name} {describe(left[name])} → {name} {describe(right[name])} (other values)"
    if before.weight_bytes != after.weight_bytes:
        yield f"{before.weight_bytes / 1e6:.2f} MB → {after.weight_bytes / 1e6:.2f} MB"


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or bool((a == b).all())


def _input_lines(before: Program, after: Program) -> Iterable[str]:
    def listing(program: Program) -> list[str]:
        return [f"{n.target}: {program.type_text(n)}" for n in program.placeholders]

    left, right = listing(before), listing(after)
    yield from (f"{line} → " for line in _bundles(line for line in left if line not in right))
    yield from (f" → {line}" for line in _bundles(line for line in right if line not in left))
