"""The frame of passes that quantize weights layer by layer on calibration data.

Layers are done in the order of the graph, on inputs that the quantized layers before them compute (true
sequential). Convolutions, embeddings and weights that several operations share are skips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.calibration import calibration_of
from irc.core.contract import Finding, Pass, PassContext, PassResult, Preserves, Skip
from irc.core.errors import IrcError, OptionError, PassError
from irc.core.formats import Parts, QuantFormat, dequantize_tensor
from irc.core.lockstep import Lockstep, Values
from irc.core.paging import release
from irc.core.program import Program
from irc.core.provenance import module_path
from irc.passes.quantize._gptq import Grid
from irc.passes.quantize._gram import InputStatistics, input_statistics
from irc.passes.quantize._layer_store import LayerStore
from irc.passes.quantize._rules import idle_rules, parse_rules, rule_for, rule_problems, wanted_format, why_not_integers
from irc.passes.quantize._stored_weights import (
    check_stored_weights,
    lossy_promise,
    write_stored_weight,
)
from irc.passes.quantize._weight_layers import WeightLayer, find_weight_layers

RowQuantizer = Callable[[Tensor], tuple[Tensor, Grid]]
"""Rows f32[N, K] of a layer's weight → their integers f32[N, K], and the grid that these are on."""

# Rows of a layer that are quantized at a time: several f32 copies of them exist meanwhile.
_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class CalibratedWeights(Pass):
    """Base of such passes: they say how the integers and scales of one layer's rows are found.

    Attributes:
        rounds_to_nearest: whether `row_quantizer` gives the nearest integers on its grid, which is then checked.
        bits, group_size, symmetric: the format, as in `quantize-weights`.
        rules: integer formats of single layers, as in `quantize-weights`.
    """

    rounds_to_nearest: ClassVar[bool] = False
    bits: int = 4
    group_size: int | None = 32
    symmetric: bool = True
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", (self.rules,) if isinstance(self.rules, str) else tuple(self.rules))
        problems = self.option_problems()
        if problems:
            raise OptionError(f"{self.name}: " + "; ".join(problems))

    def option_problems(self) -> list[str]:
        """Everything that is wrong with the options."""
        problems = rule_problems(self.rules, why_not_integers)
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            problems.append(f"bits must be 2 to 8, not {self.bits!r}")
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            problems.append(f"group_size must be a positive number or None, not {self.group_size!r}")
        return problems

    def row_quantizer(self, inputs: InputStatistics, form: QuantFormat) -> RowQuantizer:
        """What quantizes rows of a layer with these inputs to a format; called once a layer.

        Raises:
            IrcError: it cannot be done, and why.
        """
        raise TypeError(f"{type(self).__name__} has no row_quantizer method")

    @property
    def preserves(self) -> Preserves:
        return lossy_promise(self.format, *(rule.format for rule in parse_rules(self.rules)))

    @property
    def format(self) -> QuantFormat:
        """The format of all layers that no rule is about."""
        return QuantFormat(self.bits, self.group_size, symmetric=self.symmetric, signed=self.symmetric)

    def requires(self, program: Program) -> list[str]:
        """One problem for every layer whose rows the group size does not divide, and for every rule without a layer."""
        layers = [layer for layer in _layers(program) if isinstance(layer, WeightLayer)]
        problems = idle_rules(parse_rules(self.rules), layers)
        for layer in layers:
            form = self._format_of(layer)
            reason = None if form is None else form.why_not_rows_of(layer.width)
            if reason is not None:
                problems.append(f"{layer.name} ({module_path(layer.users[0])}): {reason}; choose another group_size")
        return problems

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        data = calibration_of(ctx, self.name)
        batches = data.inputs_for(program)
        store = LayerStore.of(ctx, self, program, data)
        skips: list[Skip] = []
        layers: dict[fx.Node, WeightLayer] = {}
        formats: dict[fx.Node, QuantFormat] = {}
        for layer in list(_layers(program)):
            form = layer if isinstance(layer, Skip) else self._format_of(layer)
            if isinstance(layer, Skip):
                skips.append(layer)
            elif not isinstance(form, QuantFormat):
                rule = rule_for(parse_rules(self.rules), layer)
                skips.append(Skip.at(layer.users[0], f"weight {layer.name}: rule '{rule}' leaves it alone"))
            elif ctx.allow(layer.users[0]):
                layers[layer.users[0]], formats[layer.users[0]] = layer, form
        results: dict[fx.Node, Parts] = {}
        statistics: dict[fx.Node, InputStatistics] = {}
        run = Lockstep(program, batches)
        progress = ctx.track(self.name, list(layers))

        def visit(node: fx.Node, values: Values) -> None:
            next(progress)
            layer = layers[node]
            weight = program.weight(layer.weight).detach()
            known = store.get(layer.name)
            if known is None:
                source = node.args[0]
                assert isinstance(source, fx.Node)
                if source not in statistics:  # layers that share an input follow one another
                    statistics.clear()
                    statistics[source] = input_statistics(node, values(source), self.name)
                known = self._quantized(node, weight, statistics[source], formats[node])
                store.put(layer.name, known)
            parts = results[node] = Parts(**known)
            run.replace(layer.weight, dequantize_tensor(parts, formats[node], weight.dtype))
            release(weight)

        run.run(visit, layers)
        for _ in progress:  # tells the end
            pass
        totals = {"quantized_weights": 0, "bytes_before": 0, "bytes_after": 0}
        for node, parts in results.items():
            weight = program.weight(layers[node].weight)
            totals["quantized_weights"] += weight.numel()
            totals["bytes_before"] += weight.numel() * weight.element_size()
            totals["bytes_after"] += write_stored_weight(program, layers[node], formats[node], parts)
        program.erase_dead()
        return PassResult(program, matches=len(results), skips=skips, modified=bool(results), statistics=totals)

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """Weights are where they may be: on the nearest numbers, or not much further than rounding puts them."""
        expected = {layer.weight: self._format_of(layer) for layer in _layers(before) if isinstance(layer, WeightLayer)}
        return check_stored_weights(before, result.program, expected, nearest=self.rounds_to_nearest)

    def _format_of(self, layer: WeightLayer) -> QuantFormat | None:
        found = wanted_format(self.rules, self.format, layer)
        assert found is None or isinstance(found, QuantFormat)
        return found

    def _quantized(
        self, node: fx.Node, weight: Tensor, inputs: InputStatistics, form: QuantFormat
    ) -> dict[str, Tensor]:
        try:
            quantize = self.row_quantizer(inputs, form)
            done = [_stored(*quantize(rows.float()), form) for rows in weight.split(_ROWS)]
        except IrcError as error:
            raise PassError(
                f"{node.name} ({module_path(node)}) cannot be quantized: {error}", pass_name=self.name, node=node.name
            ) from error
        return {name: torch.cat([block[name] for block in done]) for name in done[0]}


def _stored(integers: Tensor, grid: Grid, form: QuantFormat) -> dict[str, Tensor]:
    found = {"stored": form.pack(integers.to(torch.int16)), "scale": grid.scale.float()}
    return found if grid.zero_point is None else found | {"zero_point": grid.zero_point.to(form.zero_point_dtype)}


def _layers(program: Program) -> Iterator[WeightLayer | Skip]:
    for layer in find_weight_layers(program, embeddings=False, convolutions=False):
        if isinstance(layer, WeightLayer) and len(layer.users) > 1:
            others = ", ".join(user.name for user in layer.users[1:])
            yield Skip.at(layer.users[0], f"weight {layer.name} is shared with {others}, whose inputs differ")
        else:
            yield layer
