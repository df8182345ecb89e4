"""Which format each layer should get, so that a size budget does the least damage.

min Σ damage(layer, format) subject to Σ size(layer, format) ≤ budget: a multiple-choice knapsack, solved exactly by
dynamic programming over the size. Sizes are counted in their greatest common divisor; where that would make the table
too long they are rounded up to a coarser unit, so that the budget is kept and the optimum missed by a hair.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from irc.core.errors import OptionError
from irc.core.formats import QuantFormat, parse
from irc.core.pipeline import print_pass
from irc.evaluation.sensitivity_result import LayerSensitivity, Sensitivity
from irc.passes.quantize.quantize_weights import QuantizeWeights

_MAX_UNITS = 100_000
_WIDTH = 140


@dataclass(frozen=True)
class Assignment:
    """A format for every layer.

    Attributes:
        formats: by name of the layer's weight.
        average_bits: bits a number of these layers, scales included.
        damage: sum over the layers, in the sensitivity's measure.
        sensitivity: what it was chosen by.
    """

    formats: dict[str, str]
    average_bits: float
    damage: float
    sensitivity: Sensitivity

    @property
    def rules(self) -> tuple[str, ...]:
        """Rules for quantizing passes: a rule a layer, but the commonest format is one last rule for the rest."""
        commonest = Counter(self.formats.values()).most_common(1)[0][0]
        single = [f"{_pattern(name)}={text}" for name, text in self.formats.items() if text != commonest]
        return (*single, f"*={commonest}")

    @property
    def rules_text(self) -> str:
        """The option to paste into a quantizing pass: `rules=[…]`."""
        return f"rules=[{', '.join(self.rules)}]"

    @property
    def pipeline(self) -> str:
        """The whole pass as text."""
        return print_pass(self.as_pass())

    def as_pass(self) -> QuantizeWeights:
        """`quantize-weights` with these rules."""
        one = self.sensitivity
        return QuantizeWeights(
            rules=self.rules, scale_dtype="f16" if one.scale_dtype == "f16" else "f32",
            include_embeddings=one.include_embeddings, include_convolutions=one.include_convolutions,
        )  # fmt: skip

    def table(self) -> Table:
        """Layers by format, against giving all layers the same format."""
        table = Table(
            title=f"{self.average_bits:.3f} bits a weight, damage {self.damage:.3e} ({self.sensitivity.metric})",
            title_justify="left",
        )
        for title in ("format", "layers", "weights", "bits/weight", "damage if all layers had it"):
            table.add_column(title, justify="left" if title == "format" else "right", no_wrap=True)
        sizes = {layer.name: layer.num_weights for layer in self.sensitivity.layers}
        for text in self.sensitivity.formats:
            names = [name for name, chosen in self.formats.items() if chosen == text]
            whole = uniform(self.sensitivity, text)
            table.add_row(
                text,
                str(len(names)),
                f"{sum(sizes[name] for name in names):,}",
                "" if whole is None else f"{whole.average_bits:.3f}",
                "" if whole is None else f"{whole.damage:.3e}",
            )
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
        console.print(self.table())
        assert isinstance(console.file, io.StringIO)
        return f"{console.file.getvalue().rstrip()}\n{self.pipeline}"


def assign_bits(sensitivity: Sensitivity, *, average_bits: float) -> Assignment:
    """The formats that do the least damage at no more than `average_bits` bits a weight, scales included.

    Raises:
        OptionError: even the smallest formats are larger.
    """
    layers = sensitivity.layers
    total = sum(layer.num_weights for layer in layers)
    smallest = sum(min(layer.bits.values()) * layer.num_weights for layer in layers) / total
    if not (average_bits >= smallest - 1e-9 and math.isfinite(average_bits)):
        raise OptionError(
            f"an average of {average_bits:g} bits a weight cannot be met: the smallest formats tried take"
            f" {smallest:.3f}, scales included"
        )
    options = [_options(layer) for layer in layers]
    # Beyond each layer's smallest: so that rounding up to a coarser unit cannot make the budget too small.
    extra = [[size - one[0][1] for _, size, _ in one] for one in options]
    budget = max(0, math.floor(average_bits * total + 1e-6) - sum(one[0][1] for one in options))
    unit = math.gcd(*(size for one in extra for size in one)) or 1
    length = min(budget, sum(max(one) for one in extra))
    if length // unit > _MAX_UNITS:
        unit = -(-length // _MAX_UNITS)
    units = [[-(-size // unit) for size in one] for one in extra]
    picks = _solve(
        units,
        [[damage for _, _, damage in one] for one in options],
        min(budget // unit, sum(max(one) for one in units)),
    )
    return _assignment(sensitivity, [one[pick][0] for one, pick in zip(options, picks, strict=True)])


def uniform(sensitivity: Sensitivity, text: str) -> Assignment | None:
    """All layers in one format (or, where the group does not divide, its width by row); None if a layer lacks it."""
    chosen = parse(text)
    row = str(replace(chosen, group_size=None)) if isinstance(chosen, QuantFormat) else text
    found = []
    for layer in sensitivity.layers:
        name = text if text in layer.bits else row
        if name not in layer.bits:
            return None
        found.append(name)
    return _assignment(sensitivity, found)


def _assignment(sensitivity: Sensitivity, texts: Sequence[str]) -> Assignment:
    layers = sensitivity.layers
    total = sum(layer.num_weights for layer in layers)
    size = sum(layer.bits[text] * layer.num_weights for layer, text in zip(layers, texts, strict=True))
    return Assignment(
        {layer.name: text for layer, text in zip(layers, texts, strict=True)}, size / total,
        math.fsum(layer.damage[text] for layer, text in zip(layers, texts, strict=True)), sensitivity,
    )  # fmt: skip


def _options(layer: LayerSensitivity) -> list[tuple[str, int, float]]:
    """(format, bits in all, damage), without formats that another beats in both."""
    found = sorted(((round(layer.bits[t] * layer.num_weights), d, t) for t, d in layer.damage.items()))
    kept: list[tuple[str, int, float]] = []
    for size, damage, text in found:
        if not kept or damage < kept[-1][2]:
            kept.append((text, size, damage))
    return kept


def _solve(sizes: Sequence[Sequence[int]], damages: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Index of the chosen option of each layer; `best[s]` is the least damage of the layers so far in size ≤ s."""
    best = np.zeros(budget + 1)
    picks = []
    for size_of, damage_of in zip(sizes, damages, strict=True):
        table = np.full((len(size_of), budget + 1), np.inf)
        for row, (size, damage) in enumerate(zip(size_of, damage_of, strict=True)):
            if size <= budget:
                table[row, size:] = best[: budget + 1 - size] + damage
        pick = table.argmin(0)
        best = np.take_along_axis(table, pick[None], 0)[0]
        picks.append(pick.astype(np.int8))
    found: list[int] = []
    left = budget
    for size_of, pick in zip(reversed(sizes), reversed(picks), strict=True):
        found.append(int(pick[left]))
        left -= size_of[found[-1]]
    return found[::-1]


def _pattern(name: str) -> str:
    """A glob that fits this name alone."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
