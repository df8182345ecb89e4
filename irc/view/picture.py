"""Draw a program, or one layer of it, as SVG, PNG or PDF.

One box an operation, with its result type and the weights it reads; colours by kind of operation.
"""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch.fx as fx
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve
from torch import Tensor

from irc.core import provenance
from irc.core.errors import OptionError
from irc.core.program import VAL, Program, is_size
from irc.view.layout import layered_layout

FORMATS = ("svg", "png", "pdf")
_MAX_BOXES = 600
_LINE, _BOX_PAD, _ROW_GAP, _CHAR, _TITLE_CHAR, _COLUMN_GAP = 0.17, 0.09, 0.34, 0.088, 0.105, 0.3

# Fill colours by kind of operation; ink is the same dark grey everywhere.
_KINDS = (
    ("attention", "#f6c6b6", ("attention", "scaled_dot_product")),
    ("cache", "#f3dfa2", ("cache",)),
    ("quantization", "#e4c5ea", ("quantize",)),
    ("linear, convolution", "#bcd7f0", ("linear", "mm", "matmul", "conv", "bmm", "embedding")),
    ("norm", "#c8e6c0", ("norm",)),
    ("position", "#cde8e5", ("rope",)),
    ("pointwise", "#e8e8ee", ()),
)
# What more operations than these read is named beside each of them: lines from one place to everywhere are unreadable.
_MOST_LINES = 4
_MOVEMENT = frozenset(
    [
        "view",
        "reshape",
        "transpose",
        "permute",
        "unsqueeze",
        "squeeze",
        "expand",
        "cat",
        "slice",
        "split",
        "chunk",
        "flatten",
        "index",
        "select",
        "t",
        "contiguous",
        "_unsafe_view",
        "unflatten",
        "movedim",
        "clone",
    ]
)


@dataclass
class _Box:
    """A drawn operation: text lines, colour, and the nodes that it stands for."""

    lines: list[str]
    colour: str
    inputs: list[str] = field(default_factory=list)

    @property
    def width(self) -> float:
        return max(len(line) for line in self.lines) * _CHAR + 0.24

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + 2 * _BOX_PAD


def draw(program: Program, path: str | Path, *, layer: str | None = None) -> int:
    """Write a picture of the program; `layer` keeps only the operations under that module path.

    Returns the number of operations drawn.

    Raises:
        OptionError: unknown file type, or no operation under `layer`.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise OptionError(f"cannot draw to {path.name!r}: known picture types are {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise OptionError(f"cannot draw to {path}: there is no folder {path.parent}")
    boxes = _boxes(program, layer)
    drawn = sum(1 for box in boxes.values() if box.colour != "none")
    if drawn > _MAX_BOXES:
        raise OptionError(
            f"{drawn} operations are too many for one picture (at most {_MAX_BOXES}):"
            f" choose a layer, e.g. --layer {_some_layer(program)}"
        )
    figure = _figure(boxes, f"{program.name}{f' · {layer}' if layer else ''}")
    aside = path.with_name(f".{path.name}.partial")
    figure.savefig(aside, format=kind, dpi=110)
    os.replace(aside, path)
    return drawn


def _boxes(program: Program, layer: str | None) -> dict[str, _Box]:
    chosen = [n for n in program.operations() if layer is None or _under(provenance.module_path(n), layer)]
    if not chosen:
        paths = sorted({".".join(provenance.module_path(n).split(".")[:2]) for n in program.operations()} - {""})
        raise OptionError(f"no operation under {layer!r}; module paths start with: {', '.join(paths[:20])}")
    inside = set(chosen)
    boxes: dict[str, _Box] = {}
    for node in chosen:
        weights = [w for w in node.all_input_nodes if w.op == "get_attr"]
        lines = [_title(node), _type(program, node)]
        lines += [f"{_short(str(w.target), layer)} {_type(program, w)}" for w in weights]
        if len(set(_tensor_users(node))) > _MOST_LINES and node.name != lines[0]:
            lines[0] += f" → {node.name}"
        box = boxes[node.name] = _Box([line for line in lines if line], _colour(node))
        for source in _tensor_sources(node):
            spread = len(set(_tensor_users(source))) > _MOST_LINES
            name = f"{source.name} of {node.name}" if spread else source.name
            box.inputs.append(name)
            if name not in boxes and (spread or source not in inside):
                boxes[name] = _Box([source.name, _type(program, source)], "none")
    results = {n for out in program.outputs if isinstance(out, fx.Node) for n in [_producer(out)]}
    for node in chosen:
        outside = [u for u in _tensor_users(node) if u not in inside]
        if (node in results or outside) and layer is not None:
            boxes[f"out:{node.name}"] = _Box(
                ["→ " + (_title(outside[0]) if outside else "output")], "none", [node.name]
            )
        elif node in results:
            boxes[f"out:{node.name}"] = _Box(["output"], "none", [node.name])
    return boxes


def _tensor_sources(node: fx.Node) -> list[fx.Node]:
    """Producers of the tensors a node reads, weights and sizes left out."""
    found = [_producer(i) for i in node.all_input_nodes if i.op != "get_attr" and not is_size(i)]
    return list(dict.fromkeys(found))


def _tensor_users(node: fx.Node) -> list[fx.Node]:
    users: list[fx.Node] = []
    for user in node.users:
        if user.target is operator.getitem:
            users.extend(_tensor_users(user))
        elif user.op == "call_function" and not is_size(user):
            users.append(user)
    return users


def _producer(node: fx.Node) -> fx.Node:
    while node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _title(node: fx.Node) -> str:
    return str(getattr(node.target, "_schema", node).name).partition("::")[2] or node.name


def _type(program: Program, node: fx.Node) -> str:
    return program.type_text(node) if isinstance(node.meta.get(VAL), Tensor) else ""


def _short(name: str, layer: str | None, limit: int = 26) -> str:
    """The name within the layer, without its first parts where it is long."""
    short = name.removeprefix(f"{layer}.")
    while len(short) > limit and "." in short:
        short = short.partition(".")[2]
    return short if name.endswith(f"{layer}.{short}") or short == name else f"…{short}"


def _under(path: str, layer: str) -> bool:
    return path == layer or path.startswith(layer + ".")


def _colour(node: fx.Node) -> str:
    title = _title(node)
    for _, colour, words in _KINDS:
        if any(word in title for word in words):
            return colour
    return "#ffffff" if title in _MOVEMENT else _KINDS[-1][1]


def _some_layer(program: Program) -> str:
    for node in program.operations():
        parts = provenance.module_path(node).split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                return ".".join(parts[: i + 1])
    return "<module path>"


def _figure(boxes: dict[str, _Box], title: str) -> Figure:
    edges = [(source, name) for name, box in boxes.items() for source in box.inputs if source in boxes]
    layout = layered_layout(boxes, edges, {name: box.width for name, box in boxes.items()}, gap=_COLUMN_GAP)
    num_rows = max(layout.layer.values()) + 1
    heights = [
        max((b.height for n, b in boxes.items() if layout.layer[n] == row), default=0.2) for row in range(num_rows)
    ]
    centre, cursor = [], 0.0
    for height in heights:
        centre.append(-(cursor + height / 2))
        cursor += height + _ROW_GAP
    left = min(layout.x[n] - b.width / 2 for n, b in boxes.items())
    right = max(layout.x[n] + b.width / 2 for n, b in boxes.items())
    bends = [x for points in layout.bends.values() for x, _ in points]
    left, right = min([left, *bends]) - 0.3, max([right, *bends]) + 0.3
    legend = sum(_legend_width(label) for label, _ in _legend_entries(boxes))
    right = max(right, left + 0.5 + max(legend, len(title) * _TITLE_CHAR))
    top, bottom = 0.75, -cursor - 0.1
    figure = Figure(figsize=(right - left, top - bottom))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.axis("off")
    axes.text(left + 0.25, top - 0.2, title, fontsize=12, fontweight="bold", va="center", color="#222222")
    _legend(axes, left + 0.25, top - 0.48, boxes)
    for source, target in edges:
        first, last = layout.layer[source], layout.layer[target]
        passed = [(x, centre[row], heights[row] / 2) for x, row in layout.bends[source, target]]
        # Straight down beside boxes, sideways only between rows: so that no line crosses a box.
        _edge(axes, [
            (layout.x[source], centre[first] - boxes[source].height / 2, centre[first] - heights[first] / 2),
            *((x, middle + half, middle - half) for x, middle, half in passed),
            (layout.x[target], centre[last] + heights[last] / 2, centre[last] + boxes[target].height / 2),
        ])  # fmt: skip
    for name, box in boxes.items():
        _box(axes, box, layout.x[name], centre[layout.layer[name]])
    return figure


def _legend_entries(boxes: dict[str, _Box]) -> list[tuple[str, str]]:
    used = {box.colour for box in boxes.values()}
    return [(label, colour) for label, colour, _ in _KINDS if colour in used]


def _legend_width(label: str) -> float:
    return 0.42 + len(label) * 0.058


def _legend(axes: Axes, x: float, y: float, boxes: dict[str, _Box]) -> None:
    for label, colour in _legend_entries(boxes):
        axes.add_patch(
            FancyBboxPatch((x, y - 0.06), 0.14, 0.12, boxstyle="round,pad=0.01", fc=colour, ec="#888888", lw=0.6)
        )
        axes.text(x + 0.22, y, label, fontsize=7.5, va="center", color="#444444")
        x += _legend_width(label)


def _box(axes: Axes, box: _Box, x: float, y: float) -> None:
    if box.colour != "none":
        corner = (x - box.width / 2, y - box.height / 2)
        style = "round,pad=0,rounding_size=0.06"
        axes.add_patch(
            FancyBboxPatch(corner, box.width, box.height, boxstyle=style, fc=box.colour, ec="#55555f", lw=0.8)
        )
    for i, line in enumerate(box.lines):
        place = y + box.height / 2 - _BOX_PAD - (i + 0.5) * _LINE
        bold = i == 0 and box.colour != "none"
        colour = "#1b1b22" if bold else "#555560"
        axes.text(x, place, line, fontsize=8.5 if bold else 7, fontweight="bold" if bold else "normal",
                  family="monospace", ha="center", va="center", color=colour)  # fmt: skip


def _edge(axes: Axes, posts: list[tuple[float, float, float]]) -> None:
    """A line through vertical posts (x, upper end, lower end), curved between one and the next."""
    x, upper, lower = posts[0]
    vertices, codes = [(x, upper), (x, lower)], [Curve.MOVETO, Curve.LINETO]
    for x1, upper, following in posts[1:]:
        middle = (lower + upper) / 2
        vertices += [(x, middle), (x1, middle), (x1, upper), (x1, following)]
        codes += [Curve.CURVE4] * 3 + [Curve.LINETO]
        x, lower = x1, following
    axes.add_patch(PathPatch(Curve(vertices, codes), fc="none", ec="#8a8a94", lw=0.9, zorder=0))
    y = lower
    axes.add_patch(
        PathPatch(Curve([(x - 0.035, y + 0.08), (x, y), (x + 0.035, y + 0.08)]), fc="none", ec="#8a8a94", lw=0.9)
    )


__all__ = ["FORMATS", "draw"]
