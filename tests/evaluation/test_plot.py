"""The picture of size against quality."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from irc.core.errors import OptionError
from irc.evaluation import Comparison, Evaluation
from irc.evaluation.plot import _label_line, _points, plot

RESULTS = Comparison(
    [
        Evaluation("f32", {"perplexity": 6.55, "kl": 0.0}, "text", size_bytes=15_200_000),
        Evaluation("int4 <row>", {"perplexity": 6.81, "kl": 0.04}, "text", size_bytes=3_770_000),
        Evaluation("a function", {"perplexity": 6.6, "kl": 0.01}, "text"),
    ]
)


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_files(tmp_path: Path, kind: str) -> None:
    path = plot(RESULTS, tmp_path / f"out.{kind}", reference="f32")
    assert path.stat().st_size > 3000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_every_variant_with_a_size_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")  # text stays text
    text = plot(RESULTS, tmp_path / "out.svg", metric="kl").read_text()
    for word in ("f32", "int4 &lt;row&gt;", "KL divergence", "weights, MB"):
        assert word in text
    assert "a function" not in text


def test_the_reference_is_named_where_no_point_lies(tmp_path: Path) -> None:
    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    figure.draw_without_rendering()
    right, left = (_label_line(axes, "f32: 15.2 MB", 0.5, [_points(axes, x, 0.5)]) for x in (0.1, 0.9))
    assert left[2] < right[0]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"\.svg, \.png, \.pdf, not \.bmp"):
        plot(RESULTS, tmp_path / "out.bmp")
    with pytest.raises(OptionError, match="nowhere is no folder"):
        plot(RESULTS, tmp_path / "nowhere" / "out.svg")
    with pytest.raises(OptionError, match="nothing to draw"):
        plot(RESULTS, tmp_path / "out.svg", metric="accuracy")
    assert list(tmp_path.iterdir()) == []
