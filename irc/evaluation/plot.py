"""Size against quality, as a picture: what each variant costs and what it is worth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from irc.core.errors import OptionError
from irc.evaluation.metrics import METRICS
from irc.evaluation.results import Comparison

FORMATS = ("svg", "png", "pdf")
Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in typographic points."""
_FONT = 8.5
_FAR = 1.8
_INK, _POINT, _REFERENCE = "#33373d", "#2f6fb3", "#c0562f"
_LABELS = {
    "perplexity": "perplexity (lower is better)",
    "accuracy": "accuracy (higher is better)",
    "spearman": "Spearman correlation with the grades (higher is better)",
    "kl": "KL divergence, nats (lower is better)",
    "top1": "same first choice as the reference (higher is better)",
    "rank": "rank correlation with the reference (higher is better)",
    "drift": "mean change of a cosine (lower is better)",
}


def plot(comparison: Comparison, path: str | Path, *, metric: str | None = None, reference: str | None = None) -> Path:
    """Draw size (as the formats need it) against a metric, a point a variant; `reference` also as a line.

    Args:
        path: `.svg`, `.png` or `.pdf`; written aside and renamed.
        metric: None: the first that the results have.

    Raises:
        OptionError: another kind of file, or nothing that could be drawn.
    """
    target = Path(path)
    check_plot_path(target)
    chosen = metric or next(iter(comparison.results[0].metrics))
    points = [(one, one.size_bytes / 1e6) for one in comparison if one.size_bytes and chosen in one.metrics]
    if not points:
        raise OptionError(f"nothing to draw: no variant has both a size and {chosen!r}")
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    base = next(((one, size) for one, size in points if one.name == reference), None)
    others = [(one, size) for one, size in points if one.name != reference]
    # A reference of several times the size would push all variants into a corner: its line says enough.
    far = base is not None and bool(others) and base[1] > _FAR * max(size for _, size in others)
    shown = others if far else points
    for one, size in shown:
        color = _REFERENCE if one.name == reference else _POINT
        axes.plot(size, one.metrics[chosen], "o", color=color, markersize=6, zorder=3)
    axes.margins(x=0.3, y=0.12)
    if base is not None:
        axes.plot(shown[0][1], base[0].metrics[chosen], alpha=0)  # so that the line is well inside the frame
        axes.axhline(base[0].metrics[chosen], color=_REFERENCE, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
    axes.set_xlabel("weights, MB (as the formats need, scales included)", color=_INK)
    axes.set_ylabel(_LABELS.get(chosen, METRICS[chosen].title if chosen in METRICS else chosen), color=_INK)
    axes.set_title(comparison.results[0].data, color=_INK, fontsize=10, loc="left")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(color="#e3e5e8", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    figure.draw_without_rendering()  # settles limits and layout
    taken: list[Box] = []
    if base is not None:
        y = _points(axes, 0.0, base[0].metrics[chosen])[1]
        taken.append((0, y - 1, 72 * figure.get_figwidth(), y + 1))
    if base is not None and far:
        label = f"{base[0].name}: {base[1]:.1f} MB, beyond this scale"
        places = [_points(axes, size, one.metrics[chosen]) for one, size in shown]
        taken.append(_label_line(axes, label, base[0].metrics[chosen], places))
    _label_points(axes, [(one.name, size, one.metrics[chosen]) for one, size in shown], taken)
    aside = target.with_name(f".{target.name}.part")
    try:
        figure.savefig(aside, format=target.suffix[1:].lower(), dpi=160)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def check_plot_path(path: Path) -> None:
    """Raise unless the file can be written as a picture: asked before the long work.

    Raises:
        OptionError: another kind of file, or no such folder.
    """
    if path.suffix[1:].lower() not in FORMATS:
        raise OptionError(f"pictures are .{', .'.join(FORMATS)}, not {path.suffix or path.name}")
    if not path.parent.is_dir():
        raise OptionError(f"{path.parent} is no folder to put {path.name} in")


def _label_line(axes: Axes, label: str, value: float, points: Sequence[tuple[float, float]]) -> Box:
    """The name of a horizontal line at an end of it, where no point lies under the text; gives the text's box."""
    frame = axes.get_window_extent()
    left, right = frame.x0 * 72 / axes.figure.dpi + 5, frame.x1 * 72 / axes.figure.dpi - 5
    y, width = _points(axes, 0.0, value)[1], _width(label)
    boxes = [(right - width, y, right, y + 14), (left, y, left + width, y + 14)]
    dots = [(px - 4, py - 4, px + 4, py + 4) for px, py in points]
    box = next((one for one in boxes if not _overlaps(one, dots)), boxes[0])
    axes.annotate(
        label, (box[0] / 72, (y + 3) / 72), xycoords=axes.figure.dpi_scale_trans, fontsize=_FONT, color=_REFERENCE
    )
    return box


def _label_points(axes: Axes, points: Sequence[tuple[str, float, float]], taken: list[Box]) -> None:
    """Names beside the points, each at the nearest place that is free; a line leads to what had to go further."""
    frame = axes.get_window_extent()
    scale = 72 / axes.figure.dpi
    left, right = frame.x0 * scale, frame.x1 * scale
    places = {name: _points(axes, x, y) for name, x, y in points}
    taken = [*taken, *((x - 4, y - 4, x + 4, y + 4) for x, y in places.values())]
    for name, x, y in sorted(points, key=lambda point: -point[2]):
        px, py = places[name]
        width = _width(name)
        offsets = [(side, dy) for dy in (0, 11, -11, 22, -22, 33, -33, 44, -44, 55, -55) for side in (8, -8 - width)]
        boxes = [(dx, dy, (px + dx, py + dy - 5, px + dx + width, py + dy + 6)) for dx, dy in offsets]
        free = [one for one in boxes if left <= one[2][0] and one[2][2] <= right and not _overlaps(one[2], taken)]
        dx, dy, box = (free or boxes)[0]
        taken.append(box)
        line = {
            "arrowstyle": "-", "color": "#9aa0a8", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3,
            "relpos": (float(dx < 0), 0.5),  # from the end of the name that is near the point
        }  # fmt: skip
        axes.annotate(
            name, (x, y), xytext=(max(dx, -8), dy), textcoords="offset points", ha="left" if dx > 0 else "right",
            va="center", fontsize=_FONT, color=_INK, arrowprops=line if dy else None,
        )  # fmt: skip


def _points(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """Data coordinates → typographic points on the page."""
    px, py = axes.transData.transform((x, y))
    return float(px) * 72 / axes.figure.dpi, float(py) * 72 / axes.figure.dpi


def _width(text: str) -> float:
    return 0.58 * _FONT * len(text)


def _overlaps(box: Box, others: Sequence[Box]) -> bool:
    return any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)
