"""Weight-only quantization by rounding to the nearest integer.

Runs after canonicalization, folds and merges; before lowering. Layers are found in the graph: every
`aten.linear` and `irc.linear_activation` over a stored weight, on request also convolutions and
embedding tables. Does not quantize: weights of other operations (plain matmuls, stacked experts), weights
that one of several users keeps in full precision; each is reported as a skip with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.contract import Finding, Pass, PassContext, PassResult, Preserves, Skip, register_pass
from irc.core.errors import OptionError
from irc.core.formats import QuantFormat
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program, describe
from irc.core.provenance import module_path, origin_of
from irc.passes.quantize._round_to_nearest import round_to_nearest, worst_group
from irc.passes.quantize._rules import idle_rules, parse_rules, rule_for, rule_problems
from irc.passes.quantize._weight_layers import WeightLayer, find_weight_layers

aten = torch.ops.aten

_SCALE_DTYPES = {"f32": torch.float32, "f16": torch.float16}
_INDIVISIBLE = ("error", "row", "skip")
# Largest change of the outputs, relative to their largest value, and largest mean KL divergence in nats a
# token: what a working quantization of small and random models stays below, and a wrong scale does not.
_LIMITS = {8: (0.05, 0.01), 7: (0.1, 0.03), 6: (0.2, 0.1), 5: (0.35, 0.25), 4: (0.6, 0.6), 3: (1.2, 2.0), 2: (3.0, 8.0)}


@register_pass
@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """linear(x, W) → linear(x, irc.dequantize(Q, scale, zero_point)), Q = round(W / scale) + zero_point per group.

    Preserves: lossy; every weight stays within half a step of its own group's range.

    Attributes:
        bits: 2 to 8.
        group_size: neighbours along a row (input features) that share a scale; None: the whole row.
        symmetric: no zero point; else the integers span the group's range, widened to hold zero.
        include_embeddings: also embedding tables (and with them a head tied to one).
        include_convolutions: also convolutions, each output channel's taps as one row.
        indivisible: what to do with a row that the group size does not divide: `error` (before any work),
            `row` (one scale for that layer's whole rows) or `skip`.
        scale_dtype: type of the scales, `f32` or `f16`.
        rules: formats of single layers, `PATTERN=FORMAT` or `PATTERN=none`; the first that matches decides, and the
            options above are for the layers that none matches.
    """

    name: ClassVar[str] = "quantize-weights"
    bits: int = 4
    group_size: int | None = 32
    symmetric: bool = True
    include_embeddings: bool = False
    include_convolutions: bool = False
    indivisible: Literal["error", "row", "skip"] = "error"
    scale_dtype: Literal["f32", "f16"] = "f32"
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", (self.rules,) if isinstance(self.rules, str) else tuple(self.rules))
        problems = rule_problems(self.rules)
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

    @property
    def preserves(self) -> Preserves:  # type: ignore[override]
        """Lossy, by bits: one range for a row instead of a small group loses about one bit more."""
        chosen = [self._format, *(rule.format for rule in parse_rules(self.rules) if rule.format is not None)]
        levels = [max(2, c.bits - 1) if c.group_size is None or c.group_size > 128 else c.bits for c in chosen]
        rtol, max_kl = _LIMITS[min(levels)]
        return Preserves("lossy", rtol=rtol, max_kl=max_kl)

    def requires(self, program: Program) -> list[str]:
        """One problem for every layer whose rows the group size does not divide, and for every rule without a layer."""
        layers = [layer for layer in self._find(program) if isinstance(layer, WeightLayer)]
        problems = idle_rules(parse_rules(self.rules), layers)
        if self.indivisible != "error":
            return problems
        for layer in layers:
            wanted = self._wanted(layer)
            reason = None if wanted is None else _why_indivisible(wanted, layer.width)
            if reason is not None:
                where = module_path(layer.users[0])
                problems.append(
                    f"{layer.name}{f' ({where})' if where else ''}: {reason};"
                    " choose another group_size, or indivisible='row' or 'skip'"
                )
        return problems

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
        layers = [layer for layer in self._find(before) if isinstance(layer, WeightLayer)]
        bits = {layer.weight: wanted.bits for layer in layers if (wanted := self._wanted(layer)) is not None}
        findings = []
        for node in result.program.graph.nodes:
            if node.name not in originals and is_irc_op(node.target, "dequantize"):
                problem = _check(before, originals, result.program, node, bits)
                if problem is not None:
                    findings.append(Finding(node.name, problem))
        return findings

    @property
    def _format(self) -> QuantFormat:
        return QuantFormat(self.bits, self.group_size, symmetric=self.symmetric, signed=self.symmetric)

    def _find(self, program: Program) -> Iterator[WeightLayer | Skip]:
        return find_weight_layers(program, embeddings=self.include_embeddings, convolutions=self.include_convolutions)

    def _wanted(self, layer: WeightLayer) -> QuantFormat | None:
        """The format that the options ask for; None where a rule leaves the layer alone."""
        rule = rule_for(parse_rules(self.rules), layer)
        return self._format if rule is None else rule.format

    def _format_for(self, program: Program, layer: WeightLayer) -> QuantFormat | Skip:
        """The format of a layer's weight, or why it cannot have one."""
        wanted = self._wanted(layer)
        if wanted is None:
            rule = rule_for(parse_rules(self.rules), layer)
            return Skip.at(layer.users[0], f"weight {layer.name}: rule '{rule}' leaves it alone")
        candidates = [wanted]
        if self.indivisible == "row":
            candidates.append(replace(wanted, group_size=None))
        reasons = [_why_indivisible(candidate, layer.width) for candidate in candidates]
        fitting = [c for c, reason in zip(candidates, reasons, strict=True) if reason is None]
        problem = _why_unfit(program.weight(layer.weight)) if fitting else reasons[-1]
        if problem is not None:
            return Skip.at(layer.users[0], f"weight {layer.name}: {problem}")
        return fitting[0]


def _why_indivisible(chosen: QuantFormat, width: int) -> str | None:
    if chosen.group_size is not None and width % chosen.group_size:
        return f"group size {chosen.group_size} does not divide its rows of {width}"
    if chosen.packs_two and width % 2:
        return f"4-bit numbers are stored in pairs, and its rows have {width}"
    return None


def _why_unfit(weight: Tensor) -> str | None:
    if weight.numel() == 0:
        return "it is empty"
    if weight.device.type == "meta":
        return None
    low, high = torch.aminmax(weight.detach())
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        return "it holds numbers that are not finite"
    return None


def _quantize(program: Program, layer: WeightLayer, chosen: QuantFormat, scale_dtype: torch.dtype) -> int:
    """Put a dequantized weight in a weight's place; returns the bytes of its stored parts."""
    weight = program.weight(layer.weight)
    stored, scale, zero_point = round_to_nearest(
        weight.detach().reshape(layer.num_rows, layer.width), chosen, scale_dtype
    )
    # Where the weight is first used, not where it was read: its full-precision form should live shortly.
    before = layer.users[0]
    parts = [
        None if tensor is None else program.weight_node(f"{layer.name}_{role}", tensor, before=before)
        for role, tensor in (("stored", stored), ("scale", scale), ("zero_point", zero_point))
    ]
    options: dict[str, Any] = {} if weight.dtype == scale_dtype else {"dtype": weight.dtype}
    target = torch.ops.irc.dequantize.default
    restored = program.insert(target, *parts, before=before, format=str(chosen), **options)
    if weight.ndim > 2:
        restored = program.insert(aten.view.default, restored, list(weight.shape), before=before)
    program.replace(layer.weight, restored)
    return sum(t.numel() * t.element_size() for t in (stored, scale, zero_point) if t is not None)


def _check(
    before: Program, originals: dict[str, fx.Node], after: Program, node: fx.Node, bits: dict[fx.Node, int]
) -> str | None:
    """What is wrong with a new dequantized weight, judged by the weight it stands for; None if nothing is."""
    reshaped = [user for user in node.users if user.target is aten.view.default]
    old = originals.get(origin_of(node) or (origin_of(reshaped[0]) if reshaped else None) or "")
    if old is None or old.op != "get_attr":
        return "stands for no weight of the program before"
    chosen = formats.parse(str(node.kwargs["format"]))
    original = before.weight(old)
    rows = original.reshape(original.shape[0], -1)
    fake = node.meta[VAL]
    if tuple(fake.shape) != tuple(rows.shape) or fake.dtype != original.dtype:
        return f"is {describe(fake)}, but {old.target} has rows {describe(rows)}"
    if chosen.bits != bits.get(old):
        return f"has {chosen.bits} bits, not {bits.get(old)}"
    stored, scale, zero_point = (
        after.weight(part) if isinstance(part, fx.Node) else None
        for part in node.args  # type: ignore[arg-type]
    )
    assert stored is not None
    assert scale is not None
    if original.device.type == "meta":
        return None
    worst = worst_group(rows, stored, scale, zero_point, chosen, original.dtype)
    if worst is None:
        return None
    error, row, group = worst
    return f"is off by {error:.2f} steps (at most half is right) in row {row}, group {group} of {old.target}"
