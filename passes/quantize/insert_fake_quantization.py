"""Quantization-aware training, before: layers compute with rounded weights and activations, and gradients pass through.

    program → insert-fake-quantization → train program.module() → convert-fake-quantization → lower

Runs after folds (`fold-conv-batch-norm`) and merges: what is trained is what will run. Train with any PyTorch loop:

    program = irc.PassManager([InsertFakeQuantization(bits=4)], ctx=…).run(program).program
    module = program.module()
    …                                       # loss.backward(), optimizer.step()
    trained = program.with_weights(module)
    final = irc.PassManager([ConvertFakeQuantization()]).run(trained).program

Training writes into the program's own parameters, so the result has copies of them: earlier stages keep theirs.
Weights are rounded by rows or groups, symmetrically; activations by one calibrated scale a tensor. Does not handle:
weights and operands that `quantize-weights` and `quantize-activations` refuse, for the same reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx
from torch import Tensor, nn

from irc.core.contract import Finding, Pass, PassContext, PassResult, Preserves, Skip, register_pass
from irc.core.errors import OptionError
from irc.core.formats import QuantFormat
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.passes.quantize._activation_sites import ActivationSite, find_activation_sites
from irc.passes.quantize._calibrate import Uncalibrated, calibrate, uncalibrated_parts
from irc.passes.quantize._weight_layers import WeightLayer, find_weight_layers
from irc.passes.quantize.observers import OBSERVERS, make_observer

aten, ops = torch.ops.aten, torch.ops.irc

# Largest change of the outputs before training, relative to the largest, and mean KL in nats, by the coarser width.
_LIMITS = {8: (0.15, 0.03), 7: (0.3, 0.1), 6: (0.4, 0.2), 5: (0.6, 0.5), 4: (1.0, 1.5), 3: (2.0, 4.0), 2: (4.0, 10.0)}


@register_pass
@dataclass(frozen=True, kw_only=True)
class InsertFakeQuantization(Pass):
    """layer(x, W) → layer(irc.fake_quantize(x, s_x), irc.fake_quantize(W, s_W)).

    Preserves: lossy, by the smaller of the two widths.

    Attributes:
        bits: of weights, 2 to 8.
        activation_bits: 2 to 8; None: activations stay (and no calibration data are needed).
        group_size: weights of a row that share a scale; None: the whole row.
        learned: scales are trained too (LSQ), else they stay as calibrated.
        observer: of the first scales, of weights and activations.
        include_embeddings, include_convolutions: as in `quantize-weights`, but convolutions are in by default.
        keep_outer: leave the first and the last layer (in graph order) as they are, as low-bit networks mostly do.
    """

    name: ClassVar[str] = "insert-fake-quantization"
    bits: int = 4
    activation_bits: int | None = 8
    group_size: int | None = None
    learned: bool = True
    observer: Literal["min-max", "percentile", "mse", "entropy"] = "mse"
    include_embeddings: bool = False
    include_convolutions: bool = True
    keep_outer: bool = False

    def __post_init__(self) -> None:
        problems = []
        for name in ("bits", "activation_bits"):
            value = getattr(self, name)
            if (value is not None or name == "bits") and (
                isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8
            ):
                problems.append(f"{name} must be 2 to 8, not {value!r}")
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            problems.append(f"group_size must be a positive number or None, not {self.group_size!r}")
        if self.observer not in OBSERVERS:
            problems.append(f"observer must be one of {', '.join(OBSERVERS)}, not {self.observer!r}")
        if problems:
            raise OptionError(f"{self.name}: " + "; ".join(problems))

    @property
    def preserves(self) -> Preserves:
        rtol, max_kl = _LIMITS[min(self.bits, self.activation_bits or 8)]
        return Preserves("lossy", rtol=rtol, max_kl=max_kl)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        skips: list[Skip] = []
        num_weights = self._weights(program, ctx, skips)
        num_values = self._activations(program, ctx, skips) if self.activation_bits is not None else 0
        matches = num_weights + num_values
        if matches:
            program = program.copy(replace_weights=_copies(program))
        statistics = {"weights": num_weights, "values": num_values}
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0, statistics=statistics)

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """Scales are steps, and parameters with a gradient exactly if they are to be learned."""
        known = {node.name for node in before.graph.nodes}
        findings = []
        for node in result.program.graph.nodes:
            if node.name in known or not is_irc_op(node.target, "fake_quantize"):
                continue
            scale = result.program.weight(node.args[1])
            if not bool((scale.isfinite() & (scale > 0)).all()) or "uncalibrated" in str(node.args[1].target):
                findings.append(Finding(node.name, "has a scale that is no step"))
            if scale.requires_grad != self.learned or node.kwargs.get("learned", False) != self.learned:
                findings.append(Finding(node.name, f"has a scale with requires_grad={scale.requires_grad}"))
        return findings

    def _weights(self, program: Program, ctx: PassContext, skips: list[Skip]) -> int:
        count = 0
        found = list(
            find_weight_layers(program, embeddings=self.include_embeddings, convolutions=self.include_convolutions)
        )
        layers = [layer for layer in found if isinstance(layer, WeightLayer)]
        outer = {layer.name for layer in (layers[:1] + layers[-1:] if self.keep_outer else [])}
        skips.extend(layer for layer in found if isinstance(layer, Skip))
        for layer in layers:
            form = QuantFormat(self.bits, self.group_size)
            problem = "is the first or the last layer" if layer.name in outer else _why_unfit(program, layer, form)
            if problem is not None:
                skips.append(Skip.at(layer.users[0], f"weight {layer.name}: {problem}"))
            elif ctx.allow(layer.users[0]):
                self._weight(program, layer, form)
                count += 1
        return count

    def _weight(self, program: Program, layer: WeightLayer, form: QuantFormat) -> None:
        weight, before = program.weight(layer.weight), layer.users[0]
        rows = weight.detach().reshape(layer.num_rows, layer.width)
        shape = form.scale_shape(tuple(rows.shape))
        observer = make_observer(self.observer, form, axis=0)
        observer.update(rows.reshape(shape[0] * shape[1], -1))
        scale, _ = observer.grid()
        tensor = scale.view(shape).to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        source = layer.weight
        if weight.ndim > 2:
            source = program.insert(aten.view.default, source, [layer.num_rows, layer.width], before=before)
        part = program.weight_node(f"{layer.name}_scale", _trained(tensor, self.learned), before=before)
        new = self._fake(program, source, [part, None], form, before)
        if weight.ndim > 2:
            new = program.insert(aten.view.default, new, list(weight.shape), before=before)
        for user in layer.users:
            user.replace_input_with(layer.weight, new)

    def _activations(self, program: Program, ctx: PassContext, skips: list[Skip]) -> int:
        assert self.activation_bits is not None
        form = QuantFormat(self.activation_bits, symmetric=False, signed=False, per_tensor=True)
        waiting = []
        # Only what multiplies trained integers: attention keeps its operands.
        for site in list(find_activation_sites(program, attention=False, float_weights=False)):
            if isinstance(site, Skip):
                skips.append(site)
                continue
            user, width = site.readers[0].node, site.value.meta[VAL].shape[-1]
            if form.packs_two and (not isinstance(width, int) or width % 2):
                skips.append(Skip.at(user, f"4-bit numbers are stored in pairs, and {site.value.name} ends in {width}"))
            elif ctx.allow(user):
                waiting.append(self._activation(program, site, form))
        calibrate(program, waiting, partial(make_observer, self.observer), ctx, self.name, trained=self.learned)
        return len(waiting)

    def _activation(self, program: Program, site: ActivationSite, form: QuantFormat) -> Uncalibrated:
        before = site.readers[0].node
        parts = uncalibrated_parts(program, site.value, form, before)
        new = self._fake(program, site.value, parts, form, before)
        for reader in site.readers:
            reader.node.replace_input_with(site.value, new)
        return Uncalibrated(new, site.where)

    def _fake(
        self, program: Program, source: fx.Node, parts: list[fx.Node | None], form: QuantFormat, before: fx.Node
    ) -> fx.Node:
        options: dict[str, Any] = {"learned": True} if self.learned else {}
        return program.insert(ops.fake_quantize.default, source, *parts, before=before, format=str(form), **options)


def _trained(tensor: Tensor, learned: bool) -> Tensor:
    return nn.Parameter(tensor) if learned else tensor


def _copies(program: Program) -> dict[str, Tensor]:
    return {
        name: nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        for name, weight in program.weights.items()
        if isinstance(weight, nn.Parameter)
    }


def _why_unfit(program: Program, layer: WeightLayer, form: QuantFormat) -> str | None:
    problem = form.why_not_rows_of(layer.width)
    if problem is not None:
        return problem
    weight = program.weight(layer.weight).detach()
    if not bool(weight.isfinite().all()):
        return "it holds numbers that are not finite"
    if not bool(weight.any()):
        return "it is zero"
    return None
