"""Size against quality, as a picture: what each variant costs and what it is worth."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from irc.core.errors import OptionError
from irc.evaluation.metrics import METRICS
from irc.evaluation.results import Comparison, Evaluation

FORMATS = ("svg", "png", "pdf")
_INK, _POINT, _REFERENCE = "#33373d", "#2f6fb3", "#c0562f"
_LABELS = {
    "perplexity": "perplexity (lower is better)", "accuracy": "accuracy", "kl": "KL divergence, nats",
    "spearman": "Spearman correlation with the grades",
}  # fmt: skip


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
    for one, size in points:
        color = _REFERENCE if one.name == reference else _POINT
        axes.plot(size, one.metrics[chosen], "o", color=color, markersize=7, zorder=3)
    base = next((one for one, _ in points if one.name == reference), None)
    if base is not None:
        axes.axhline(base.metrics[chosen], color=_REFERENCE, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    _label_points(axes, points, chosen)
    axes.set_xlabel("weights, MB (as the formats need, scales included)", color=_INK)
    axes.set_ylabel(_LABELS.get(chosen, METRICS[chosen].title if chosen in METRICS else chosen), color=_INK)
    axes.set_title(comparison.results[0].data, color=_INK, fontsize=10, loc="left")
    axes.set_xlim(left=0)
    axes.margins(x=0.14, y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(color="#e3e5e8", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
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
        raise OptionError(f"pictures are .{', .'.join(FORMATS)}, not {path.suffix or path.name!r}")
    if not path.parent.is_dir():
        raise OptionError(f"{path.parent} is no folder to put {path.name} in")


def _label_points(axes: object, points: list[tuple[Evaluation, float]], metric: str) -> None:
    """Names beside the points; a point close above another has its name above, else to the right."""
    values = [one.metrics[metric] for one, _ in points]
    sizes = [size for _, size in points]
    height = (max(values) - min(values)) or 1.0
    width = max(sizes) or 1.0
    for index, (one, size) in enumerate(points):
        value = values[index]
        crowded = any(
            other != index and abs(values[other] - value) < 0.06 * height and 0 <= sizes[other] - size < 0.3 * width
            for other in range(len(points))
        )
        offset, place = ((0, 9), "center") if crowded else ((8, 4), "left")
        axes.annotate(  # type: ignore[attr-defined]
            one.name, (size, value), xytext=offset, textcoords="offset points", ha=place, fontsize=8.5, color=_INK
        )
