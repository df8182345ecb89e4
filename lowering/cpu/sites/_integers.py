"""Tensors of 8-bit integers in a graph, as a dequantize shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.formats import QuantFormat
from irc.core.ops.registry import is_irc_op
from irc.core.program import Program
from irc.core.target import op_name
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.layers import dequantized_parts

_VIEWS = ("aten.view", "aten.reshape")
BYTES = {"u8": "uint8_t", "i8": "int8_t"}
"""Types of stored integers → in C++."""


@dataclass(frozen=True)
class StaticInt8:
    """A tensor of 8-bit integers with one scale.

    Attributes:
        stored: the integers.
        scale, zero_point: weights of one element; no zero point is 0.
    """

    stored: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None

    @staticmethod
    def of(definer: Definer, node: fx.Node) -> StaticInt8 | None:
        """What a dequantize reads, if it is such a tensor and comes back as f32."""
        if not is_irc_op(node.target, "dequantize") or definer.dtype(node) != "f32":
            return None
        names = ("stored", "scale", "zero_point", "tensor_scale")
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        stored, scale = given["stored"], given["scale"]
        zero_point = given.get("zero_point")
        chosen = formats.parse(str(node.kwargs["format"]))
        if not isinstance(chosen, QuantFormat) or not chosen.per_tensor or chosen.packs_two:
            return None
        parts = [scale, *([] if zero_point is None else [zero_point])]
        if given.get("tensor_scale") is not None or not all(
            isinstance(p, fx.Node) and p.op == "get_attr" for p in parts
        ):
            return None
        if definer.dtype(stored) not in BYTES or definer.dtype(scale) != "f32":
            return None
        return StaticInt8(stored, scale, zero_point)


@dataclass(frozen=True)
class Int8Weight:
    """Signed 8-bit weights with a scale a row, or one for all.

    Attributes:
        nodes: what stands between the stored integers and the layer.
    """

    stored: fx.Node
    scale: fx.Node
    nodes: tuple[fx.Node, ...]

    @staticmethod
    def of(node: fx.Node) -> Int8Weight | None:
        nodes = [node]
        while op_name(nodes[-1]) in _VIEWS and isinstance(nodes[-1].args[0], fx.Node):
            nodes.append(nodes[-1].args[0])
        if not is_irc_op(nodes[-1].target, "dequantize"):
            return None
        parts = dequantized_parts(nodes[-1])
        if parts is None or parts[1] is None or parts[2] is not None or parts[3] is not None:
            return None
        chosen = formats.parse(str(nodes[-1].kwargs["format"]))
        if (
            not isinstance(chosen, QuantFormat)
            or chosen.group_size is not None
            or chosen.packs_two
            or not chosen.signed
        ):
            return None
        return Int8Weight(parts[0], parts[1], tuple(nodes))


@dataclass(frozen=True)
class IntegerOperands:
    """What a layer over integers on both sides is packed from.

    Attributes:
        name: of the packed operand, in words.
        integers: the stored weights.
        scale: [channels], what a sum of each channel is multiplied with.
        zero: zero point of the activations.
    """

    name: str
    integers: Tensor
    scale: Tensor
    zero: int

    @staticmethod
    def of(program: Program, x: StaticInt8, weight: Int8Weight, channels: int) -> IntegerOperands:
        step = program.weight(x.scale).detach().reshape(())
        return IntegerOperands(
            f"{weight.stored.target} × {x.scale.target}", program.weight(weight.stored).detach(),
            program.weight(weight.scale).detach().float().reshape(-1).expand(channels) * step,
            0 if x.zero_point is None else int(program.weight(x.zero_point).item()),
        )  # fmt: skip
