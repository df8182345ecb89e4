"""Batch normalization folded into the layer before it.

Runs after canonicalization, before activation fusion and quantization. Handles convolutions (1d to 3d,
grouped, transposed) and linear layers. Does not fold: batch norm in training mode or without running
statistics; a layer whose result or weight has other uses; a weight that is computed (quantized, say).
Source: Jacob et al. 2018, section 3.2, https://arxiv.org/abs/1712.05877.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.contract import Finding, Pass, PassContext, PassResult, Skip, register_pass
from irc.core.operands import apply_op, input_node
from irc.core.program import VAL, Program
from irc.core.provenance import origin_of
from irc.passes._weights import tie_of, trainable_like, weight_uses
from irc.passes.fuse._layers import CONVOLUTIONS, arguments, is_batched, is_transposed

aten = torch.ops.aten

_BATCH_NORMS = frozenset(
    {
        aten.batch_norm.default,
        aten._native_batch_norm_legit_no_training.default,
        aten._native_batch_norm_legit.default,
        aten.native_batch_norm.default,
    }
)
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class _Fold:
    """A layer, the batch norm after it, and the node that carries the result."""

    layer: fx.Node
    norm: fx.Node
    result: fx.Node
    bias: fx.Node | None
    channel_dim: int  # of the layer's weight
    groups: int  # in which the output channels are laid out along channel_dim (transposed convolution)


@register_pass
@dataclass(frozen=True, kw_only=True)
class FoldConvBatchNorm(Pass):
    """batch_norm(conv(x, W, b)) → conv(x, W·s, (b - mean)·s + beta), s = gamma / sqrt(var + eps).

    Preserves: exact; s is computed in f64 and the product rounded once to the weight's type.
    """

    name: ClassVar[str] = "fold-conv-batch-norm"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, skips = 0, []
        uses = weight_uses(program)
        for norm in list(program.graph.nodes):
            if norm.target not in _BATCH_NORMS:
                continue
            found = _find(program, norm, uses)
            if isinstance(found, str):
                skips.append(Skip.at(norm, found))
            elif ctx.allow(norm):
                _fold(program, found)
                matches += 1
        if matches:
            program.erase_dead()
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0)

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """Each folded layer, run alone on random numbers, agrees with the layer and batch norm it replaced."""
        originals = {node.name: node for node in before.graph.nodes}
        findings = []
        for node in result.program.graph.nodes:
            if node.name in originals or node.op != "call_function":
                continue
            norm = originals.get(origin_of(node) or "")
            if norm is None:
                findings.append(Finding(node.name, "stands for no batch norm of the program before"))
                continue
            problem = _compare_alone(before, norm, result.program, node)
            if problem is not None:
                findings.append(Finding(node.name, problem))
        return findings


def _compare_alone(before: Program, norm: fx.Node, after: Program, folded: fx.Node) -> str | None:
    """How a folded layer differs from the pair it replaced, on random input of the smallest size; None if not."""
    if norm.target is operator.getitem:
        norm = input_node(norm)
    layer = arguments(norm)["input"]
    weight = before.weight(arguments(layer)["weight"])
    if weight.device.type == "meta":
        return None
    x = _probe(layer, weight)
    expected = _run_alone(before, norm, _run_alone(before, layer, x))
    actual = _run_alone(after, folded, x)
    error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    # The probe has few terms a sum: rounding of the weight's type is all that may differ.
    bound = 64 * torch.finfo(weight.dtype).eps
    return None if error <= bound else f"differs from {layer.name} and {norm.name} by {error:.2g} (bound {bound:.2g})"


def _probe(layer: fx.Node, weight: Tensor) -> Tensor:
    """Random input that a layer gives at least one output position for."""
    args = arguments(layer)
    if layer.target is aten.linear.default:
        shape = [2, weight.shape[1]]
    else:
        channels = weight.shape[0] if is_transposed(layer) else weight.shape[1] * args["groups"]
        reach = max(args["dilation"]) * (max(weight.shape[2:]) - 1) + 1
        shape = [2, channels, *([reach + 1] * (weight.ndim - 2))]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(device=weight.device, dtype=weight.dtype)


def _run_alone(program: Program, node: fx.Node, x: Tensor) -> Tensor:
    """A node's value with its weights and `x` for its input."""
    args = arguments(node)
    values = {k: program.weight(v) if isinstance(v, fx.Node) and k != "input" else v for k, v in args.items()}
    with torch.no_grad():
        out = apply_op(node, *(values | {"input": x}).values())
    return out[0] if isinstance(out, tuple) else out


def _find(program: Program, norm: fx.Node, uses: Counter[str]) -> _Fold | str:
    """The fold that ends at a batch norm, or why there is none."""
    args = arguments(norm)
    layer = args["input"]
    if args.get("training"):
        return "batch norm is in training mode: its statistics depend on the batch"
    if args["running_mean"] is None or args["running_var"] is None:
        return "batch norm has no running statistics"
    computed = [name for name in _STATISTICS if args[name] is not None and args[name].op != "get_attr"]
    if computed:
        return f"{computed[0]} of the batch norm is computed, not a weight"
    result = norm
    if norm.target is not aten.batch_norm.default:
        firsts = [u for u in norm.users if u.target is operator.getitem and u.args[1] == 0]
        if len(firsts) != 1 or len(norm.users) != 1:
            return "the saved statistics of the batch norm are used"
        result = firsts[0]
    if layer.target not in CONVOLUTIONS and layer.target is not aten.linear.default:
        return f"its input {layer.name} is {layer.target}, neither a convolution nor a linear layer"
    if len(layer.users) > 1:
        others = sorted(user.name for user in layer.users if user is not norm)
        return f"{layer.name} is also used by {', '.join(others)}"
    return _check_layer(program, _Fold(layer, norm, result, arguments(layer)["bias"], 0, 1), uses)


def _check_layer(program: Program, fold: _Fold, uses: Counter[str]) -> _Fold | str:
    weight = arguments(fold.layer)["weight"]
    for role, node in (("weight", weight), ("bias", fold.bias)):
        if node is None:
            continue
        if node.op != "get_attr":
            return f"the {role} of {fold.layer.name} is computed by {node.name} ({node.target})"
        tie = tie_of(program, node, uses)
        if tie is not None:
            return f"{tie}: folding would separate them"
    if fold.layer.target is aten.linear.default:
        if fold.layer.meta[VAL].ndim != 2:
            return f"{fold.layer.name} has {fold.layer.meta[VAL].ndim} dimensions: the channel is not its last"
        return fold
    if not is_batched(fold.layer):
        return f"{fold.layer.name}: its input has no batch dimension"
    if is_transposed(fold.layer):
        return replace(fold, channel_dim=1, groups=arguments(fold.layer)["groups"])
    return fold


def _fold(program: Program, fold: _Fold) -> None:
    args = arguments(fold.layer)
    weight_node = args["weight"]
    weight = program.weight(weight_node)
    statistics = {k: arguments(fold.norm)[k] for k in _STATISTICS}
    gamma, beta, mean, variance = (
        None if node is None else program.weight(node).detach().double() for node in statistics.values()
    )
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + arguments(fold.norm)["eps"])
    scale = scale if gamma is None else scale * gamma
    old_bias = torch.zeros_like(mean) if fold.bias is None else program.weight(fold.bias).detach().double()
    new_bias = (old_bias - mean) * scale + (0 if beta is None else beta)
    new_weight = _scale_channels(weight.detach(), scale, fold.channel_dim, fold.groups)

    path, _, leaf = str(weight_node.target).rpartition(".")
    prefix = f"{path}.folded" if path else f"{leaf}_folded"
    new_weight_node = program.weight_node(f"{prefix}.weight", trainable_like(new_weight, weight), before=fold.layer)
    new_bias_node = program.weight_node(
        f"{prefix}.bias", trainable_like(new_bias.to(weight.dtype), weight), before=fold.layer
    )
    call = {**args, "weight": new_weight_node, "bias": new_bias_node}
    folded = program.insert(fold.layer.target, *call.values(), before=fold.norm)
    program.replace(fold.result, folded)


def _scale_channels(weight: Tensor, scale: Tensor, dim: int, groups: int) -> Tensor:
    """weight · scale along the output channels; a grouped transposed weight [C, O/g, ...] has them per group."""
    shape = [1] * weight.ndim
    if groups == 1:
        shape[dim] = -1
        return (weight.double() * scale.view(shape)).to(weight.dtype)
    grouped = weight.double().unflatten(0, (groups, -1))
    per_group = scale.view(groups, 1, -1, *([1] * (weight.ndim - 2)))
    return (grouped * per_group).flatten(0, 1).to(weight.dtype)
