"""The activations of a graph that an integer kernel would read, found by the operations that read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.contract import Skip
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.core.provenance import module_path
from irc.passes.fuse._layers import CONVOLUTIONS, arguments

aten = torch.ops.aten

_PRODUCTS = frozenset(
    {
        aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default,
        aten.einsum.default, aten.mv.default, aten._grouped_mm.default,
    }
)  # fmt: skip
_VIEWS = frozenset({aten.view.default, aten.reshape.default})
_SUMS = frozenset({aten.add.Tensor, aten.add_.Tensor})


@dataclass(frozen=True)
class Reader:
    """One operand of a `linear` layer, `convolution`, `attention` or `residual` sum, and which of its arguments."""

    node: fx.Node
    argument: str
    kind: str

    @property
    def where(self) -> str:
        """For people: `query of layers.0.attn (attention)`."""
        path = module_path(self.node)
        return f"{self.argument} of {f'{path} ({self.node.name})' if path else self.node.name}"


@dataclass(frozen=True)
class ActivationSite:
    """A value that layers read, and which of its uses are theirs."""

    value: fx.Node
    readers: tuple[Reader, ...]

    @property
    def kinds(self) -> set[str]:
        return {reader.kind for reader in self.readers}

    @property
    def where(self) -> str:
        return self.readers[0].where


def find_activation_sites(
    program: Program, *, attention: bool, float_weights: bool, residuals: bool = False
) -> Iterator[ActivationSite | Skip]:
    """Each value that layers multiply, with all layers that do, in graph order; or why an operation is left alone.

    What is dequantized already is no site.

    Args:
        float_weights: also layers whose weight is not quantized.
        residuals: also what is added to the result of a convolution.
    """
    readers: dict[fx.Node, list[Reader]] = {}
    for node in program.graph.nodes:
        if residuals and node.target in _SUMS:
            added = _residual(node, float_weights)
            if isinstance(added, Skip):
                yield added
            elif added is not None:
                readers.setdefault(arguments(node)[added.argument], []).append(added)
            continue
        reason = _why_not(node, attention=attention, float_weights=float_weights)
        if reason is not None:
            yield Skip.at(node, reason)
            continue
        for reader in _operands(node):
            value = arguments(node)[reader.argument]
            if isinstance(value, fx.Node) and _is_activation(value):
                readers.setdefault(value, []).append(reader)
    for value, found in readers.items():
        yield ActivationSite(value, tuple(found))


def is_quantized_weight(node: object) -> bool:
    """Whether a layer's weight comes from stored integers, or is trained as if it did."""
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        node = node.args[0]
    return isinstance(node, fx.Node) and (
        is_irc_op(node.target, "dequantize") or is_irc_op(node.target, "fake_quantize")
    )


def _residual(node: fx.Node, float_weights: bool) -> Reader | Skip | None:
    """The operand of a sum with a convolution's result that has to be in memory when the sum is made.

    That is the earlier one: the other one's convolution can add it to its own sums before they leave the processor.
    None: no sum of images.
    """
    args = arguments(node)
    operands = [args["self"], args["other"]]
    if not all(isinstance(value, fx.Node) and _is_image(value) for value in operands):
        return None
    convolutions = [
        name
        for name, value in zip(("self", "other"), operands, strict=True)
        if _is_convolution(value) and list(value.users) == [node]
        and (float_weights or is_quantized_weight(arguments(value)["weight"]))
    ]  # fmt: skip
    if not convolutions or operands[0] is operands[1]:
        return Skip.at(node, "neither operand is a quantized convolution's result that nobody else reads")
    if args.get("alpha", 1) != 1 or operands[0].meta[VAL].shape != operands[1].meta[VAL].shape:
        return Skip.at(node, "is no plain sum of two alike")
    order = {value: i for i, value in enumerate(node.graph.nodes) if value in operands}
    last = max(convolutions, key=lambda name: order[args[name]])
    first = "other" if last == "self" else "self"
    return Reader(node, first, "residual") if _is_activation(args[first]) else None


def _is_image(value: fx.Node) -> bool:
    fake = value.meta.get(VAL)
    return isinstance(fake, Tensor) and fake.is_floating_point() and fake.ndim == 4 and value.op != "get_attr"


def _operands(node: fx.Node) -> list[Reader]:
    if _is_linear(node) or _is_convolution(node):
        first = "x" if is_irc_op(node.target) else "input"
        return [Reader(node, first, "linear" if _is_linear(node) else "convolution")]
    if _is_attention(node):
        return [Reader(node, name, "attention") for name in ("query", "key", "value")]
    return []


def _why_not(node: fx.Node, *, attention: bool, float_weights: bool) -> str | None:
    if node.target in _PRODUCTS:
        return f"{node.target} is no linear layer, convolution or attention: its operands stay as they are"
    if _is_attention(node):
        return None if attention else "is attention (include_attention=True takes its query, key and value)"
    is_layer = _is_linear(node) or _is_convolution(node)
    if is_layer and not float_weights and not is_quantized_weight(arguments(node)["weight"]):
        return "its weight is not quantized: quantize weights first, or set float_weights=True"
    return None


def _is_activation(value: fx.Node) -> bool:
    fake = value.meta.get(VAL)
    quantized = is_irc_op(value.target, "dequantize") or is_irc_op(value.target, "fake_quantize")
    return isinstance(fake, Tensor) and fake.is_floating_point() and value.op != "get_attr" and not quantized


def _is_linear(node: fx.Node) -> bool:
    return node.target is aten.linear.default or is_irc_op(node.target, "linear_activation")


def _is_convolution(node: fx.Node) -> bool:
    return node.target in CONVOLUTIONS or is_irc_op(node.target, "conv_activation")


def _is_attention(node: fx.Node) -> bool:
    return is_irc_op(node.target, "attention") or is_irc_op(node.target, "flash_attention")
