"""Activation functions fused into the linear layer or convolution before them.

Runs after the folds and merges (`fold-conv-batch-norm`, `merge-qkv`, `merge-gate-up`), before lowering.
Gated activations are `irc.glu` by then and stay. Does not fuse: a layer whose result has other uses;
activations with parameters that the fused op does not have (a leaky ReLU of another slope).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from irc.core.contract import Finding, Pass, PassContext, PassResult, Skip, register_pass
from irc.core.program import VAL, Program
from irc.core.provenance import origin_of
from irc.passes.fuse._layers import CONVOLUTIONS, arguments, read_convolution

aten = torch.ops.aten

_SIMPLE = {
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.silu.default: "silu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.mish.default: "mish",
}
_WITH_PARAMETERS = frozenset(
    {
        aten.gelu.default, aten.hardtanh.default, aten.clamp.default, aten.leaky_relu.default,
        aten.elu.default, aten.softplus.default,
    }
)  # fmt: skip


@register_pass
@dataclass(frozen=True, kw_only=True)
class FuseActivation(Pass):
    """act(linear(x, W, b)) → irc.linear_activation(x, W, b, activation=act); convolutions alike.

    Preserves: exact, bit for bit with the references.
    """

    name: ClassVar[str] = "fuse-activation"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, skips = 0, []
        for node in list(program.graph.nodes):
            if node.target not in _SIMPLE and node.target not in _WITH_PARAMETERS:
                continue
            layer = node.args[0]
            if not isinstance(layer, fx.Node) or not _is_layer(layer):
                continue
            refusal = _refusal(node, layer)
            if refusal is not None:
                skips.append(Skip.at(node, refusal))
            elif ctx.allow(node):
                _fuse(program, node, layer)
                matches += 1
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0)

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """Each fused op stands for an activation of its own kind over a layer on the same weight."""
        originals = {node.name: node for node in before.graph.nodes}
        findings = []
        for node in result.program.graph.nodes:
            if node.name in originals or node.op != "call_function":
                continue
            old = originals.get(origin_of(node) or "")
            if old is None:
                findings.append(Finding(node.name, "stands for no activation of the program before"))
                continue
            wanted = (activation_name(old)[0], arguments(old.args[0])["weight"].name)
            found = (node.kwargs["activation"], arguments(node)["weight"].name)
            if wanted != found:
                findings.append(Finding(node.name, f"has activation and weight {found}, not {wanted}"))
        return findings


def activation_name(node: fx.Node) -> tuple[str | None, str]:
    """The name of an activation node in the fused ops, or None and the reason why it has none."""
    if node.target in _SIMPLE:
        return _SIMPLE[node.target], ""
    args = arguments(node)
    if node.target is aten.gelu.default:
        return ("gelu_tanh" if args["approximate"] == "tanh" else "gelu"), ""
    if node.target is aten.leaky_relu.default:
        slope = args["negative_slope"]
        return ("leaky_relu", "") if slope == 0.01 else (None, f"leaky_relu has slope {slope}, the fused op 0.01")
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        bounds = (args.get("min_val", args.get("min")), args.get("max_val", args.get("max")))
        named = {(0, 6): "relu6", (0, None): "relu"}.get(bounds)
        return (named, "") if named else (None, f"clamping to {bounds} is no activation of the fused op")
    return None, f"{node.target} is no activation of the fused op"


def _is_layer(node: fx.Node) -> bool:
    return node.target in CONVOLUTIONS or node.target is aten.linear.default


def _refusal(node: fx.Node, layer: fx.Node) -> str | None:
    name, reason = activation_name(node)
    if name is None:
        return reason
    if len(layer.users) > 1:
        others = sorted(user.name for user in layer.users if user is not node)
        return f"{layer.name} is also used by {', '.join(others) or 'another argument'}"
    if node.meta[VAL].dtype != layer.meta[VAL].dtype:
        return f"the activation changes the type to {node.meta[VAL].dtype}"
    if layer.target in CONVOLUTIONS:
        convolution = read_convolution(layer)
        return f"{layer.name}: {convolution}" if isinstance(convolution, str) else None
    return None


def _fuse(program: Program, node: fx.Node, layer: fx.Node) -> None:
    name, _ = activation_name(node)
    args: tuple[Any, ...]
    if layer.target is aten.linear.default:
        target = torch.ops.irc.linear_activation.default
        args = tuple(arguments(layer).values())
    else:
        c = read_convolution(layer)
        assert not isinstance(c, str)
        target = torch.ops.irc.conv_activation.default
        args = (
            c.x, c.weight, c.bias, list(c.stride), list(c.padding), list(c.dilation), c.transposed,
            list(c.output_padding), c.groups,
        )  # fmt: skip
    fused = program.insert(target, *args, before=node, activation=name)
    program.replace(node, fused)
    program.graph.erase_node(layer)
