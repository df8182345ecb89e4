"""Linear layers, quantized operands and caches, as graphs have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx

from irc.core import formats
from irc.core.formats import QuantFormat
from irc.core.operands import input_node
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL
from irc.core.target import op_name
from irc.lowering.kernels.definitions import At, Definer, convert, settle
from irc.lowering.kernels.ops.pointwise import activation
from irc.lowering.kernels.sites import Finish
from irc.lowering.kernels.values import Apply, Value

_ROWS_IN_BITS = {"int8.row": torch.int8, "int4.row": torch.uint8}
_LINEAR = ("aten.linear", "irc.linear_activation")


@dataclass(frozen=True)
class Linear:
    """A linear layer in a graph."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    activation: str | None

    @staticmethod
    def of(node: fx.Node) -> Linear | None:
        """The layer that a node is, or None."""
        if op_name(node) not in _LINEAR:
            return None
        names = ("input" if op_name(node) == _LINEAR[0] else "x", "weight", "bias")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        x, weight, bias = (given.get(name) for name in names)
        if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
            return None
        chosen = given.get("activation")
        return Linear(node, x, weight, bias if isinstance(bias, fx.Node) else None,
                      str(chosen) if chosen is not None else None)  # fmt: skip

    def finish(self) -> Finish:
        """acc + bias, rounded as the program rounds it, and the activation."""

        def finished(definer: Definer, acc: Value, index: At) -> Value:
            value, dtype = acc, definer.dtype(self.node)
            if self.bias is not None:
                value = Apply("add", (value, convert(definer.value(self.bias, index[-1:]), value.dtype)), value.dtype)
            value = settle(value, dtype)
            return value if self.activation is None else settle(activation(self.activation, value), dtype)

        return finished


def rows_of(shape: At) -> sympy.Expr:
    """Rows of [..., K] seen as a matrix."""
    return sympy.prod(shape[:-1])


def constant(node: fx.Node) -> bool:
    """Computed from weights alone: a weight once constants are folded."""
    inputs = node.all_input_nodes
    return node.op == "get_attr" or (
        node.op == "call_function" and bool(inputs) and all(constant(used) for used in inputs)
    )


def dequantized_parts(node: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node | None, fx.Node | None] | None:
    """(stored, scale, zero point, tensor scale) of a dequantized weight; None unless all are weights."""
    parts: list[Any] = [*node.args, *[None] * (4 - len(node.args))]
    parts[3] = parts[3] or node.kwargs.get("tensor_scale")
    if any(part is not None and (not isinstance(part, fx.Node) or part.op != "get_attr") for part in parts):
        return None
    stored, scale, zero_point, tensor_scale = parts
    return stored, scale, zero_point, tensor_scale


def quantized_by_token(node: fx.Node) -> fx.Node | None:
    """x of dequantize(quantize(x, dynamic_scale(x))) in int8 with a scale a row; None for anything else."""
    if not is_irc_op(node.target, "dequantize") or _given(node, 2) is not None:
        return None
    stored, scale = node.args[:2]
    if not isinstance(stored, fx.Node) or not is_irc_op(stored.target, "quantize") or _given(stored, 2) is not None:
        return None
    if not isinstance(scale, fx.Node) or not is_irc_op(scale.target, "dynamic_scale") or stored.args[1] is not scale:
        return None
    chosen = formats.parse(str(node.kwargs["format"]))
    by_token = isinstance(chosen, QuantFormat) and (chosen.bits, chosen.group_size, chosen.symmetric, chosen.signed,
                                                    chosen.per_tensor) == (8, None, True, True, False)  # fmt: skip
    same = all(one.kwargs["format"] == node.kwargs["format"] for one in (stored, scale))
    x = stored.args[0]
    return x if by_token and same and isinstance(x, fx.Node) and scale.args[0] is x else None


def _given(node: fx.Node, position: int) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get("zero_point")


def as_stored(operand: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """A cache, and the scales of its rows, that the graph widens in front of attention, which the kernel does itself.

    It reads 16-bit floats, and integers of 8 and 4 bits with a scale for each token and head.
    """
    name, value = op_name(operand), operand.meta.get(VAL)
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return operand, None
    if name == "aten._to_copy":
        source = input_node(operand)
        return (source, None) if _dtype(source) in (torch.bfloat16, torch.float16) else (operand, None)
    bits = _ROWS_IN_BITS.get(str(operand.kwargs.get("format"))) if name == "irc.dequantize" else None
    if bits is not None:
        source, scale, further = input_node(operand), input_node(operand, 1), list(operand.args[2:])
        shapes = [x.meta[VAL].shape for x in (source, scale)]
        a_row = tuple(shapes[1]) == (*shapes[0][:-1], 1)
        if a_row and further in ([], [None]) and (_dtype(source), _dtype(scale)) == (bits, torch.float32):
            return source, scale
    return operand, None


def _dtype(node: object) -> torch.dtype | None:
    value = node.meta.get(VAL) if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None
