"""Weight-only quantization by rounding to the nearest number of a format.

Runs after canonicalization, folds and merges; before lowering. Layers are found in the graph: every
`aten.linear` and `irc.linear_activation` over a stored weight, on request also convolutions and
embedding tables. Does not quantize: weights of other operations (plain matmuls, stacked experts), weights
that one of several users keeps in full precision; each is reported as a skip with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats, memory
from irc.core.contract import Finding, Pass, PassContext, PassResult, Preserves, Skip, register_pass
from irc.core.errors import OptionError, ParseError
from irc.core.formats import (
    Float4Format,
    Float8Format,
    Format,
    MxFloat4Format,
    NvFloat4Format,
    Parts,
    QuantFormat,
)
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program, describe
from irc.core.provenance import module_path, origin_of
from irc.passes.quantize._compiled_rounding import start_building
from irc.passes.quantize._round_to_nearest import round_to_nearest, worst_block, worst_group
from irc.passes.quantize._rules import idle_rules, parse_rules, rule_for, rule_problems, wanted_format, why_not_weights
from irc.passes.quantize._stored_weights import lossy_promise, write_stored_weight
from irc.passes.quantize._weight_layers import WeightLayer, find_weight_layers

aten = torch.ops.aten

_SCALE_DTYPES = {"f32": torch.float32, "f16": torch.float16}
_INTEGER_OPTIONS = ("bits", "group_size", "symmetric")
# What may stand between a dequantized weight and its user: the cut of padding, the shape of a convolution's taps.
_AFTER = (aten.slice.Tensor, aten.view.default, aten.reshape.default)
_INDIVISIBLE = ("error", "row", "pad", "skip")


@register_pass
@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """linear(x, W) → linear(x, irc.dequantize(Q, scale, zero_point)), Q = round(W / scale) + zero_point per group.

    Preserves: lossy; every weight stays within half a step of its own group's range (GGUF's super-blocks, whose
    scales are found by search: within a share of the block's largest number).

    Attributes:
        format: any format by its text (`nvfp4`, `q4_k`, `f8e4m3.row`, …: docs/formats.md); then bits, group_size and
            symmetric keep their defaults. None: integers as these three say.
        bits: 2 to 8.
        group_size: neighbours along a row (input features) that share a scale; None: the whole row.
        symmetric: no zero point; else the integers span the group's range, widened to hold zero.
        include_embeddings: also embedding tables (and with them a head tied to one).
        include_convolutions: also convolutions, each output channel's taps as one row.
        indivisible: what to do with a row that the group size does not divide: `error` (before any work),
            `row` (one scale for that layer's whole rows), `pad` (with zeros, cut off after dequantizing) or
            `skip`.
        scale_dtype: type of the scales, `f32` or `f16`.
        rules: formats of single layers, `PATTERN=FORMAT` or `PATTERN=none`; the first that matches decides, and the
            options above are for the layers that none matches.
    """

    name: ClassVar[str] = "quantize-weights"
    format: str | None = None
    bits: int = 4
    group_size: int | None = 32
    symmetric: bool = True
    include_embeddings: bool = False
    include_convolutions: bool = False
    indivisible: Literal["error", "row", "pad", "skip"] = "error"
    scale_dtype: Literal["f32", "f16"] = "f32"
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", (self.rules,) if isinstance(self.rules, str) else tuple(self.rules))
        problems = rule_problems(self.rules, why_not_weights)
        if self.format is not None:
            problems.extend(self._problems_of_format(self.format))
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            problems.append(f"bits must be 2 to 8, not {self.bits!r}")
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            problems.append(f"group_size must be a positive number or None, not {self.group_size!r}")
        elif self.bits == 4 and self.group_size is not None and self.group_size % 2:
            problems.append(f"group_size must be even for 4 bits, which are stored in pairs, not {self.group_size}")
        if self.indivisible not in _INDIVISIBLE:
            problems.append(f"indivisible must be one of {', '.join(_INDIVISIBLE)}, not {self.indivisible!r}")
        if self.scale_dtype not in _SCALE_DTYPES:
            problems.append(f"scale_dtype must be one of {', '.join(_SCALE_DTYPES)}, not {self.scale_dtype!r}")
        if problems:
            raise OptionError(f"{self.name}: " + "; ".join(problems))

    def _problems_of_format(self, text: str) -> list[str]:
        others = [f.name for f in fields(self) if f.name in _INTEGER_OPTIONS and getattr(self, f.name) != f.default]
        problems = [f"format {text!r} leaves no choice of {', '.join(others)}"] if others else []
        try:
            chosen = formats.parse(text)
        except (ParseError, OptionError) as error:
            return [*problems, str(error)]
        reason = why_not_weights(chosen)
        if reason is not None:
            problems.append(reason)
        if self.indivisible == "row" and _in_rows(chosen) is None:
            problems.append(f"format {text} has no variant with one scale a row: indivisible cannot be 'row'")
        if self.scale_dtype != "f32" and not chosen.takes_scale_dtype:
            problems.append(f"the scales of {text} have their own type: leave out scale_dtype")
        return problems

    @property
    def preserves(self) -> Preserves:
        """Lossy, by bits: one range for a row instead of a small group loses about one bit more."""
        return lossy_promise(self._format, *(rule.format for rule in parse_rules(self.rules)))

    def requires(self, program: Program) -> list[str]:
        """One problem for every layer whose rows the group size does not divide, and for every rule without a layer."""
        layers = [layer for layer in self._find(program) if isinstance(layer, WeightLayer)]
        problems = idle_rules(parse_rules(self.rules), layers)
        if self.indivisible != "error":
            return problems
        for layer in layers:
            wanted = wanted_format(self.rules, self._format, layer)
            reason = None if wanted is None else wanted.why_not_rows_of(layer.width)
            if wanted is not None and reason is not None:
                where = module_path(layer.users[0])
                problems.append(
                    f"{layer.name}{f' ({where})' if where else ''}: {reason};"
                    f" choose another {'group_size' if self.format is None else 'format'}, or indivisible="
                    f"{repr('row') + ', ' if _in_rows(wanted) is not None else ''}'pad' or 'skip'"
                )
        return problems

    def get_ready(self, num_weights: int, num_bytes: int) -> int:
        start_building()
        made = int(num_weights * self._format.bits_per_weight(None, _SCALE_DTYPES[self.scale_dtype]) / 8)
        memory.expect(made)
        return made

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        skips: list[Skip] = []
        totals = {"quantized_weights": 0, "bytes_before": 0, "bytes_after": 0}
        matches = 0
        for layer in list(self._find(program)):
            chosen = layer if isinstance(layer, Skip) else self._format_for(program, layer)
            if isinstance(chosen, Skip):
                skips.append(chosen)
            elif isinstance(layer, WeightLayer) and ctx.allow(layer.users[0]):
                weight = program.weight(layer.weight)
                totals["quantized_weights"] += weight.numel()
                totals["bytes_before"] += weight.numel() * weight.element_size()
                totals["bytes_after"] += _quantize(program, layer, chosen, _SCALE_DTYPES[self.scale_dtype])
                matches += 1
        if matches:
            program.erase_dead()
            in_use = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
            program.tied = {alias: name for alias, name in program.tied.items() if name in in_use}
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0, statistics=totals)

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """No weight moved by more than half a step, the step being that of the original's own group."""
        originals = {node.name: node for node in before.graph.nodes}
        expected = {
            layer.weight: [str(candidate) for candidate in self._candidates(wanted)]
            for layer in self._find(before)
            if isinstance(layer, WeightLayer) and (wanted := wanted_format(self.rules, self._format, layer))
        }
        findings = []
        for node in result.program.graph.nodes:
            if node.name not in originals and is_irc_op(node.target, "dequantize"):
                problem = _check(before, originals, result.program, node, expected)
                if problem is not None:
                    findings.append(Finding(node.name, problem))
        return findings

    @property
    def _format(self) -> Format:
        if self.format is not None:
            return formats.parse(self.format)
        return QuantFormat(self.bits, self.group_size, symmetric=self.symmetric, signed=self.symmetric)

    def _find(self, program: Program) -> Iterator[WeightLayer | Skip]:
        return find_weight_layers(program, embeddings=self.include_embeddings, convolutions=self.include_convolutions)

    def _candidates(self, wanted: Format) -> list[Format]:
        """The format that is asked for, and what may stand in where it does not divide a row."""
        by_row = _in_rows(wanted) if self.indivisible == "row" else None
        return [wanted] if by_row is None else [wanted, by_row]

    def _format_for(self, program: Program, layer: WeightLayer) -> Format | Skip:
        """The format of a layer's weight, or why it cannot have one."""
        wanted = wanted_format(self.rules, self._format, layer)
        if wanted is None:
            rule = rule_for(parse_rules(self.rules), layer)
            return Skip.at(layer.users[0], f"weight {layer.name}: rule '{rule}' leaves it alone")
        candidates = self._candidates(wanted)
        reasons = [candidate.why_not_rows_of(layer.width) for candidate in candidates]
        fitting = [c for c, reason in zip(candidates, reasons, strict=True) if reason is None]
        if self.indivisible == "pad":
            fitting = candidates
        problem = _why_unfit(program.weight(layer.weight)) if fitting else reasons[-1]
        if problem is not None:
            return Skip.at(layer.users[0], f"weight {layer.name}: {problem}")
        return fitting[0]


def _in_rows(chosen: Format) -> Format | None:
    """The same numbers with one scale a row, if there is such a format."""
    blocks = isinstance(chosen, (MxFloat4Format, NvFloat4Format))
    if blocks or not isinstance(chosen, (QuantFormat, Float8Format, Float4Format)) or chosen.per_tensor:
        return None
    return replace(chosen, group_size=None)


def _why_unfit(weight: Tensor) -> str | None:
    if weight.numel() == 0:
        return "it is empty"
    if weight.device.type == "meta":
        return None
    low, high = torch.aminmax(weight.detach())
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        return "it holds numbers that are not finite"
    return None


def _quantize(program: Program, layer: WeightLayer, chosen: Format, scale_dtype: torch.dtype) -> int:
    """Put a dequantized weight in a weight's place; returns the bytes of its stored parts."""
    weight = program.weight(layer.weight)
    rows = weight.detach().reshape(layer.num_rows, layer.width)
    missing = -layer.width % chosen.row_multiple
    parts = _round(torch.nn.functional.pad(rows, (0, missing)) if missing else rows, chosen, scale_dtype)
    return write_stored_weight(program, layer, chosen, parts)


def _round(rows: Tensor, chosen: Format, scale_dtype: torch.dtype) -> Parts:
    if isinstance(chosen, QuantFormat) and not chosen.per_tensor:
        return Parts(*round_to_nearest(rows, chosen, scale_dtype))
    return formats.quantize_tensor(rows, chosen, scale_dtype)


def _check(
    before: Program, originals: dict[str, fx.Node], after: Program, node: fx.Node, expected: dict[fx.Node, list[str]]
) -> str | None:
    """What is wrong with a new dequantized weight, judged by the weight it stands for; None if nothing is."""
    cut = [user for user in node.users if user.target in _AFTER]
    again = [user for one in cut for user in one.users if user.target in _AFTER]
    origins = (origin_of(one) for one in (node, *cut, *again))
    old = originals.get(next((origin for origin in origins if origin), ""))
    if old is None or old.op != "get_attr":
        return "stands for no weight of the program before"
    chosen = formats.parse(str(node.kwargs["format"]))
    original = before.weight(old)
    rows = original.reshape(original.shape[0], -1)
    fake = node.meta[VAL]
    padded = (rows.shape[0], rows.shape[1] + -rows.shape[1] % chosen.row_multiple)
    if tuple(fake.shape) != padded or fake.dtype != original.dtype:
        return f"is {describe(fake)}, but {old.target} has rows {describe(rows)}"
    if str(chosen) not in expected.get(old, ()):
        return f"has format {chosen}, not {' or '.join(expected.get(old, ('none',)))}"
    stored, scale, zero_point, tensor_scale = (
        after.weight(part) if isinstance(part, fx.Node) else None for part in (*node.args, None)[:4]
    )
    assert stored is not None
    if original.device.type == "meta":
        return None
    rows = rows.detach()
    if padded[1] != rows.shape[1]:
        rows = torch.nn.functional.pad(rows, (0, padded[1] - rows.shape[1]))
    if isinstance(chosen, QuantFormat) and not chosen.per_tensor:
        assert scale is not None
        worst, unit = worst_group(rows, stored, scale, zero_point, chosen, original.dtype), "steps (at most half is"
    else:
        parts = Parts(stored, scale, zero_point, tensor_scale)
        worst, unit = worst_block(rows, parts, chosen, original.dtype), f"times what {chosen} may be (at most 1 is"
    if worst is None:
        return None
    error, row, group = worst
    return f"is off by {error:.2f} {unit} right) in row {row}, group {group} of {old.target}"
