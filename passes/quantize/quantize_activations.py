"""Activation quantization after training: the other half of W8A8, as quantize → dequantize in front of each layer.

Runs behind a weight quantizer (`quantize-weights{bits=8,group-size=none,include-convolutions=true}`, or any other) and
before `insert-kv-cache`. One pair serves all layers that read a value. Embedding tables have no activations: their
integers are chosen by `quantize-weights{include-embeddings=true}`.

    static    one scale a tensor, found by an observer over calibration data; layers are calibrated one after the other,
              each on what the quantized layers before it give
    dynamic   one symmetric scale a token (for attention: a token and head), computed in the graph
    auto      static, but dynamic where one scale for all tokens would lose too much over the calibration data: values
              with heavy tails, such as the gated products in front of a language model's down projections

Does not quantize: the probabilities inside attention (between its two products; a target that multiplies integers
there must say so), results, plain matmuls, layers with a weight in full precision (unless `float_weights`), in dynamic
mode inputs of convolutions. Each is a skip with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.contract import Finding, Pass, PassContext, PassResult, Preserves, Skip, register_pass
from irc.core.errors import OptionError
from irc.core.evaluate import evaluate
from irc.core.formats import QuantFormat
from irc.core.operands import input_node
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program, describe
from irc.passes.fuse._layers import arguments
from irc.passes.quantize._activation_sites import ActivationSite, find_activation_sites
from irc.passes.quantize._calibrate import Uncalibrated, calibrate, uncalibrated_parts
from irc.passes.quantize.observers import OBSERVERS, make_observer

_MODES = ("static", "dynamic", "auto")
# Largest change of the outputs, relative to their largest value, and largest mean KL divergence in nats a token:
# about twice what the demo model's largest outlier shows (half a million logits), and six times its KL.
_LIMITS = {8: (0.12, 0.02), 7: (0.2, 0.05), 6: (0.3, 0.1), 5: (0.45, 0.3), 4: (0.8, 0.8), 3: (1.4, 2.0), 2: (3.0, 8.0)}
# One scale for all tokens clips or coarsens values with heavy tails (the demo model's gated products lose 6 to 10 %).
_STATIC_RTOL = {8: 0.2, 7: 0.25}
# In `auto`, with 8 bits; twice as much for each bit less. What has no heavy tail loses 1 to 2.5 %.
_MOST_LOST_STATIC = 0.04

# Largest root mean square error of one quantized value relative to its own: coarse steps and clipping together.
_MOST_LOST = {8: 0.3, 7: 0.3, 6: 0.3, 5: 0.35, 4: 0.5, 3: 0.8, 2: 1.5}


@register_pass
@dataclass(frozen=True, kw_only=True)
class QuantizeActivations(Pass):
    """layer(x, W) → layer(irc.dequantize(irc.quantize(x, s, z)), W), s and z calibrated, or s = max|x| / high a token.

    Preserves: lossy, by bits; with 8, outputs stay within 12 % of the largest (static: 20 %) and 0.02 nats a token,
        where observers clip blindly (percentile, entropy) 30 % and 0.1.

    Attributes:
        mode: `static` or `auto` (need calibration data), or `dynamic`.
        bits: 2 to 8.
        symmetric: no zero point; None: static without, dynamic with symmetry.
        observer: of static ranges: `min-max`, `percentile`, `mse` or `entropy`.
        percentile: what the percentile observer keeps, in percent.
        include_attention: also query, key and value of attention.
        float_weights: also layers whose weight is not quantized.
        include_residuals: also what is added to the result of a convolution, as targets that keep images in 8 bits do:
            the operand that is there first, so that the other one's convolution adds it to its own sums. Static only.
    """

    name: ClassVar[str] = "quantize-activations"
    mode: Literal["static", "dynamic", "auto"] = "static"
    bits: int = 8
    symmetric: bool | None = None
    observer: Literal["min-max", "percentile", "mse", "entropy"] = "mse"
    percentile: float = 99.99
    include_attention: bool = True
    float_weights: bool = False
    include_residuals: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.mode not in _MODES:
            problems.append(f"mode must be one of {', '.join(_MODES)}, not {self.mode!r}")
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            problems.append(f"bits must be 2 to 8, not {self.bits!r}")
        if self.observer not in OBSERVERS:
            problems.append(f"observer must be one of {', '.join(OBSERVERS)}, not {self.observer!r}")
        if not 50 < self.percentile <= 100:
            problems.append(f"percentile must be above 50 and at most 100, not {self.percentile!r}")
        if self.mode == "dynamic" and self.symmetric is False:
            problems.append("dynamic scales are symmetric: symmetric=False needs mode='static'")
        if self.mode == "dynamic" and self.include_residuals:
            problems.append(
                "residual sums of images have no tokens to scale one by one: include_residuals needs static scales"
            )
        if problems:
            raise OptionError(f"{self.name}: " + "; ".join(problems))

    @property
    def preserves(self) -> Preserves:
        clips = self.mode != "dynamic" and self.observer in ("percentile", "entropy")
        rtol, max_kl = _LIMITS[max(2, self.bits - 2) if clips else self.bits]
        if self.mode == "static":
            rtol = max(rtol, _STATIC_RTOL.get(self.bits, 0.0))
        return Preserves("lossy", rtol=rtol, max_kl=max_kl)

    @property
    def forms(self) -> tuple[QuantFormat, ...]:
        """The formats that activations may get: the first is tried first."""
        symmetric = bool(self.symmetric)
        static = QuantFormat(self.bits, symmetric=symmetric, signed=symmetric, per_tensor=True)
        dynamic = QuantFormat(self.bits)
        return {"static": (static,), "dynamic": (dynamic,), "auto": (static, dynamic)}[self.mode]

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        skips: list[Skip] = []
        waiting: list[Uncalibrated] = []
        sites: dict[fx.Node, ActivationSite] = {}
        counts: Counter[str] = Counter()
        for site in list(
            find_activation_sites(
                program, attention=self.include_attention, float_weights=self.float_weights,
                residuals=self.include_residuals,
            )
        ):  # fmt: skip
            problem = site if isinstance(site, Skip) else self._why_not(site)
            if problem is not None:
                skips.append(problem)
            elif isinstance(site, ActivationSite) and ctx.allow(site.readers[0].node):
                quantized = self._quantize(program, site, self.forms[0])
                if self.mode != "dynamic":
                    waiting.append(Uncalibrated(quantized, site.where))
                    sites[quantized] = site
                counts.update(f"{reader.kind}_operands" for reader in site.readers)
                counts["values"] += 1
        make = partial(make_observer, self.observer, percentile=self.percentile)
        lost = calibrate(program, waiting, make, ctx, self.name, measure=self.mode == "auto")
        for quantized, share in lost.items():
            site = sites[quantized]
            if share > _MOST_LOST_STATIC * 2 ** (8 - self.bits) and not site.kinds & {"convolution", "residual"}:
                self._make_dynamic(program, quantized, site)
                counts["dynamic_values"] += 1
        counts.update("pooled_values" for quantized in sites if _quantize_before_pooling(program, quantized))
        program.erase_dead()
        matches = counts["values"]
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0, statistics=dict(counts))

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """New quantizes have usable scales, are read by their own dequantizes, and keep the example's values."""
        known = {node.name for node in before.graph.nodes}
        findings = []
        for node in result.program.graph.nodes:
            if node.name not in known and is_irc_op(node.target, "quantize"):
                problem = _problem(result.program, node, [str(form) for form in self.forms])
                if problem is not None:
                    findings.append(Finding(node.name, problem))
        return findings or list(_lost(result.program, known, self.bits))

    def _why_not(self, site: ActivationSite) -> Skip | None:
        user = site.readers[0].node
        if self.mode == "dynamic" and "convolution" in site.kinds:
            return Skip.at(user, "the input of a convolution has no tokens to scale one by one: use mode='static'")
        width = site.value.meta[VAL].shape[-1] if site.value.meta[VAL].ndim else 1
        if self.forms[0].packs_two and (not isinstance(width, int) or width % 2):
            return Skip.at(
                user, f"4-bit numbers are stored in pairs, and the last size of {site.value.name} is {width}"
            )
        return None

    def _make_dynamic(self, program: Program, static: fx.Node, site: ActivationSite) -> None:
        """Scales by token in place of one for all."""
        (restored,) = static.users
        for reader in site.readers:
            reader.node.replace_input_with(restored, site.value)
        for node in (restored, static):
            program.graph.erase_node(node)
        self._quantize(program, site, self.forms[-1])

    def _quantize(self, program: Program, site: ActivationSite, form: QuantFormat) -> fx.Node:
        value, first, ops, text = site.value, site.readers[0].node, torch.ops.irc, str(form)
        if "residual" in site.kinds and value.op == "call_function":
            first = value.next  # there when a convolution between it and the sum makes the sum
        parts: list[fx.Node | None]
        if form.per_tensor:
            parts = uncalibrated_parts(program, value, form, first)
        else:
            parts = [program.insert(ops.dynamic_scale.default, value, before=first, format=text), None]
        quantized = program.insert(ops.quantize.default, value, *parts, before=first, format=text)
        dtype = value.meta[VAL].dtype
        assert parts[0] is not None
        options: dict[str, Any] = {} if dtype == parts[0].meta[VAL].dtype else {"dtype": dtype}
        restored = program.insert(ops.dequantize.default, quantized, *parts, before=first, format=text, **options)
        for reader in site.readers:
            reader.node.replace_input_with(value, restored)
        return quantized


def _quantize_before_pooling(program: Program, quantized: fx.Node) -> bool:
    """quantize(max_pool2d(relu(x))) → quantize(max_pool2d(dequantize(quantize(relu(x))))), with the same scale; whether
    it was done.

    Exact: rounding and clamping keep order, so the largest of the rounded is the largest one rounded. What makes x can
    store it in 8 bits. Only where nothing else reads it or the pool.
    """
    ops, (pool, *parts) = torch.ops.irc, quantized.args[:3]
    if not isinstance(pool, fx.Node) or pool.target is not torch.ops.aten.max_pool2d.default or len(pool.users) != 1:
        return False
    x = pool.args[0]
    if not isinstance(x, fx.Node) or not _is_relu(x) or len(x.users) != 1 or x.meta[VAL].ndim != 4:
        return False
    (restored,) = quantized.users
    for part in parts:
        if isinstance(part, fx.Node):
            pool.prepend(part)  # a weight: it may stand anywhere
    stored = program.insert(ops.quantize.default, x, *parts, before=pool, format=quantized.kwargs["format"])
    options: dict[str, Any] = dict(restored.kwargs)
    again = program.insert(ops.dequantize.default, stored, *parts, before=pool, **options)
    pool.replace_input_with(x, again)
    return True


def _is_relu(node: fx.Node) -> bool:
    fused = is_irc_op(node.target, "conv_activation") and arguments(node)["activation"] == "relu"
    return fused or node.target is torch.ops.aten.relu.default


def _lost(program: Program, known: set[str], bits: int) -> Iterator[Finding]:
    """New dequantizes that give back something else than their quantize was given, on the example inputs."""
    if program.example_inputs is None or any(w.device.type == "meta" for w in program.weights.values()):
        return
    sources: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.name not in known and is_irc_op(node.target, "dequantize"):
            sources.setdefault(node.args[0].args[0], []).append(node)
    given: dict[fx.Node, Tensor] = {}
    lost: dict[fx.Node, float] = {}

    def compare(node: fx.Node, value: Any) -> None:
        if node in sources:
            given[node] = value
        elif node.name not in known and is_irc_op(node.target, "dequantize"):
            before = given[input_node(input_node(node))].float()
            lost[node] = float((value.float() - before).norm() / before.norm().clamp_min(1e-30))

    with torch.no_grad():
        evaluate(program.graph, program.weight, program.example_inputs, compare)
    for node, share in lost.items():
        if not share <= _MOST_LOST[bits]:
            yield Finding(
                node.name,
                f"loses {share:.0%} of its input on the example inputs (root mean square; at most"
                f" {_MOST_LOST[bits]:.0%} is allowed): the calibration data are not like them, or the scale is wrong",
            )


def _problem(program: Program, node: fx.Node, forms: list[str]) -> str | None:
    form = str(node.kwargs["format"])
    if form not in forms:
        return f"has format {form}, not {' or '.join(forms)}"
    source, scale, zero_point = node.args[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(scale, fx.Node)
    if scale.op == "get_attr":
        tensor = program.weight(scale)
        if "uncalibrated" in str(scale.target) or not bool((tensor.isfinite() & (tensor > 0)).all()):
            return (
                f"has scale {scale.target} = {tensor.flatten()[:4].tolist()}, which was never calibrated or is no step"
            )
    elif not is_irc_op(scale.target, "dynamic_scale") or scale.args[0] is not source:
        return f"has a scale that is not computed from its own input {source.name}"
    for user in node.users:
        if not is_irc_op(user.target, "dequantize") or user.args[1:3] != (scale, zero_point):
            return f"is read by {user.name}, which is no dequantize with its own scale and zero point"
        if user.kwargs["format"] != form:
            return f"is dequantized as {user.kwargs['format']} by {user.name}"
        if describe(user.meta[VAL]) != describe(source.meta[VAL]):
            return f"comes back as {describe(user.meta[VAL])}, was {describe(source.meta[VAL])}"
    return None
