"""What a sensitivity run found: damage and size by layer and format, as a table and as JSON."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from irc.core import formats
from irc.core.errors import IrcError, StorageError
from irc.evaluation._damage_store import read_json, write_json

_WIDTH = 140
_UNITS = {
    "sqnr": "signal to noise of the layer's outputs, dB",
    "kl": "KL divergence with only this layer rounded, nats a prediction",
    "second-order": "estimated KL divergence with only this layer rounded, nats a prediction",
}


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer.

    Attributes:
        name: of its weight.
        num_weights: numbers in it.
        damage: by format; lower is better, and damages of layers add up.
        bits: by format, bits a number with scales and zero points.
    """

    name: str
    num_weights: int
    damage: Mapping[str, float]
    bits: Mapping[str, float]


@dataclass(frozen=True)
class Sensitivity:
    """All layers of a program.

    Attributes:
        metric: `sqnr` (damage is noise over signal), `kl` or `second-order` (nats a prediction).
        data, num_samples: what it was measured on.
        scale_dtype, include_embeddings, include_convolutions: as asked for.
        skips: weights that were not measured, and why.
    """

    program: str
    metric: str
    data: str
    num_samples: int
    scale_dtype: str
    layers: tuple[LayerSensitivity, ...]
    skips: tuple[str, ...] = ()
    include_embeddings: bool = False
    include_convolutions: bool = False

    @property
    def formats(self) -> list[str]:
        """All formats that were tried, fewest bits first."""
        found = {text for layer in self.layers for text in layer.damage}
        return sorted(found, key=lambda text: (formats.parse(text).bits, text))

    def __getitem__(self, name: str) -> LayerSensitivity:
        return next(layer for layer in self.layers if layer.name == name)

    def table(self) -> Table:
        """A row a layer, the most sensitive first (at 4 bits, or the nearest that was tried)."""
        pivot = min(self.formats, key=lambda text: abs(formats.parse(text).bits - 4))
        table = Table(
            title=f"sensitivity of {self.program} on {self.data}: {_UNITS[self.metric]}", title_justify="left",
            caption=f"sorted by {pivot}", caption_justify="left",
        )  # fmt: skip
        table.add_column("layer", no_wrap=True)
        table.add_column("weights", justify="right", no_wrap=True)
        for text in self.formats:
            table.add_column(text, justify="right", no_wrap=True)
        worst = sorted(self.layers, key=lambda layer: -layer.damage.get(pivot, math.inf))
        for layer in worst:
            table.add_row(
                layer.name, f"{layer.num_weights:,}", *(self._shown(layer.damage.get(text)) for text in self.formats)
            )
        return table

    def _shown(self, damage: float | None) -> str:
        if damage is None:
            return ""
        if self.metric != "sqnr":
            return f"{damage:.2e}"
        return "∞" if damage == 0 else f"{-10 * math.log10(damage):.1f}"

    def to_json(self) -> dict[str, Any]:
        """Values for JSON; `from_json` reads them."""
        return asdict(self)

    @staticmethod
    def from_json(content: Any) -> Sensitivity:
        """Read what `to_json` gave.

        Raises:
            StorageError: something is missing or of the wrong type.
        """
        try:
            layers = tuple(LayerSensitivity(**layer) for layer in content["layers"])
            found = Sensitivity(**{**content, "layers": layers, "skips": tuple(content["skips"])})
            numbers = [v for one in layers for v in (one.num_weights, *one.damage.values(), *one.bits.values())]
            if not layers or found.metric not in _UNITS or not found.formats:
                raise ValueError("no layers, formats or metric")
            if not all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for v in numbers):
                raise ValueError("values that are no sizes or damages")
            if any(set(layer.damage) != set(layer.bits) for layer in layers):
                raise ValueError("damages without sizes")
        except (AttributeError, KeyError, TypeError, ValueError, IrcError) as error:
            raise StorageError(f"this is no complete sensitivity result: {error}") from None
        return found

    def save(self, path: str | Path) -> None:
        """Write the result as JSON."""
        write_json({"result": self.to_json()}, Path(path))

    @staticmethod
    def load(path: str | Path) -> Sensitivity:
        """Read what `save` or a resumable run wrote.

        Raises:
            StorageError: it cannot be read, or the run has not come to its end.
        """
        result = read_json(Path(path)).get("result")
        if result is None:
            raise StorageError(f"{path}: the run has not come to its end; go on with resume={str(path)!r}")
        return Sensitivity.from_json(result)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
        console.print(self.table())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip("\n")
