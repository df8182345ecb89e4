"""Which rows of a linear layer become which channel of which head, whatever the layout operations between are.

The operations between a linear layer and an attention are run on the numbers of the rows instead of on
values: 0, 1, 2, … go in where the layer's output would be, and what arrives says which row each channel comes from.
So a merged, interleaved, sliced, repeated or permuted projection is read without knowing how it was spelled.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import TargetError
from irc.core.operands import apply_op, list_argument
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program, is_size
from irc.core.slices import evaluate_size
from irc.lowering.gguf.description import Linear

aten = torch.ops.aten

LAYOUT = {
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.chunk.default, aten.split.Tensor,
    aten.split_with_sizes.default, aten.unbind.int, aten.index.Tensor, aten.index_select.default, aten.expand.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default,
    aten.squeeze.dims, aten.contiguous.default, aten.clone.default, aten.cat.default, aten.alias.default,
    aten.repeat_interleave.self_int, aten.repeat.default, operator.getitem, aten.stack.default, aten.t.default,
    aten.movedim.int, aten.split.sizes,
}  # fmt: skip
_BATCH = 2  # with sizes of 1, an operation over a wrong dimension would go unnoticed


@dataclass(frozen=True)
class Event:
    """An operation on the way that is no layout: a norm or a rotation.

    Attributes:
        rows: i64, what its input's channels are, one row of it a norm or rotation.
    """

    node: fx.Node
    rows: Tensor


@dataclass(frozen=True)
class Trace:
    """Where a value comes from.

    Attributes:
        source: the operation that layout operations start from.
        rows: i64 [..., n] which channel of the source each element is, for one token.
        events: in graph order.
    """

    source: fx.Node
    rows: Tensor
    events: list[Event]


class NotLayout(TargetError):
    """A value is more than a layout of one source."""


def skip_layout(node: fx.Node) -> fx.Node:
    """The first node behind `node` that is no layout operation (of one input)."""
    while node.op == "call_function" and node.target in LAYOUT:
        node = _first_input(node)
    return node


def trace(program: Program, node: fx.Node, source: fx.Node | None = None) -> Trace:
    """Follow `node` back to the operation that gives its channels.

    `source`: stop there; None: at the first operation that is neither layout, norm, rotation nor a factor.

    Raises:
        NotLayout: it is computed from more than one source, or by something else than layout.
    """
    order: list[fx.Node] = []
    found = _collect(node, source, order)
    sizes = {name: max(_BATCH, dim.minimum) for name, dim in program.dims.items()}
    values: dict[fx.Node, Any] = {found: _numbered(program, found, sizes)}
    events: list[Event] = []
    for step in order:
        values[step] = _run(program, step, values, sizes, events)
    return Trace(found, _one_token(program, node, values[node], sizes), events)


def identity(rows: Tensor, count: int) -> bool:
    """Rows are all rows in order."""
    flat = rows.flatten()
    return flat.numel() == count and bool((flat == torch.arange(count)).all())


def linear_of(program: Program, node: fx.Node, rows: Tensor | None = None) -> Linear:
    """The linear layer that `node` is: weight, bias, and the rows of it that are used.

    Raises:
        NotLayout: it is none.
    """
    if node.target is aten.add.Tensor and not node.kwargs:
        for inner, bias in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            if is_stored(bias) and isinstance(inner, fx.Node) and _is_linear(inner):
                if len(inner.args) > 2 and inner.args[2] is not None:
                    raise NotLayout(f"{node.name} adds a second bias to {inner.name}")
                return _linear(inner, bias, rows)
    if not _is_linear(node):
        raise NotLayout(f"{node.name} = {node.target} is no linear layer")
    return _linear(node, node.args[2] if len(node.args) > 2 else None, rows)


def linear_input(node: fx.Node) -> fx.Node:
    """What a linear layer (with its separate bias) is applied to."""
    if node.target is aten.add.Tensor:
        inner = node.args[0] if isinstance(node.args[0], fx.Node) and _is_linear(node.args[0]) else node.args[1]
        assert isinstance(inner, fx.Node)
        return linear_input(inner)
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


def is_stored(node: Any) -> bool:
    """A weight, or a weight dequantized."""
    if not isinstance(node, fx.Node):
        return False
    return node.op == "get_attr" or is_irc_op(node.target, "dequantize")


def is_linear_like(node: Any) -> bool:
    """A linear layer, possibly with its bias added afterwards."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if _is_linear(node):
        return True
    if node.target is not aten.add.Tensor:
        return False
    pairs = ((node.args[0], node.args[1]), (node.args[1], node.args[0]))
    return any(is_stored(bias) and isinstance(inner, fx.Node) and _is_linear(inner) for inner, bias in pairs)


def constant(program: Program, value: Any) -> float | None:
    """A number: a literal, or a weight of one element."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, fx.Node) and value.op == "get_attr":
        tensor = program.weight(value)
        if tensor.numel() == 1 and tensor.ndim == 0 and tensor.is_floating_point():
            return float(tensor)
    return None


def factor(program: Program, node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, c) of a node that is x · c or x / c with a number c."""
    if node.target is aten.mul.Tensor or node.target is aten.mul.Scalar:
        for inner, value in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            number = constant(program, value)
            if number is not None and isinstance(inner, fx.Node):
                return inner, number
    if node.target is aten.div.Tensor or node.target is aten.div.Scalar:
        number = constant(program, node.args[1])
        if number and isinstance(node.args[0], fx.Node) and not node.kwargs:
            return node.args[0], 1.0 / number
    return None


def _is_linear(node: fx.Node) -> bool:
    return node.target is aten.linear.default and is_stored(node.args[1])


def _linear(node: fx.Node, bias: Any, rows: Tensor | None) -> Linear:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    if bias is not None and not is_stored(bias):
        raise NotLayout(f"the bias of {node.name} is computed")
    if rows is not None:
        rows = rows.flatten()
        if identity(rows, int(weight.meta[VAL].shape[0])):
            rows = None
    return Linear(weight, bias, rows)


def _collect(node: fx.Node, source: fx.Node | None, order: list[fx.Node]) -> fx.Node:
    """Nodes between `node` and its source, in the order they run; returns the source."""
    sources: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def visit(current: fx.Node) -> None:
        if current in seen:
            return
        seen.add(current)
        inputs = _data_inputs(current)
        if current is source or inputs is None or (source is None and is_linear_like(current)):
            sources.append(current)
            return
        for used in inputs:
            visit(used)
        order.append(current)

    visit(node)
    if len(sources) != 1:
        raise NotLayout(f"{node.name} is put together from {len(sources)} values: {[n.name for n in sources[:4]]}")
    if source is not None and sources[0] is not source:
        raise NotLayout(f"{node.name} is not made from {source.name}")
    return sources[0]


def _data_inputs(node: fx.Node) -> list[fx.Node] | None:
    """Inputs that carry channels, for an operation that the trace goes through; None for all others."""
    if node.op != "call_function":
        return None
    if node.target in (aten.cat.default, aten.stack.default):
        return list_argument(node, 0)
    if node.target in LAYOUT or is_event(node):
        return [_first_input(node)]
    return None


def is_event(node: fx.Node) -> bool:
    """A norm or a rotation."""
    if node.target is aten.layer_norm.default or is_irc_op(node.target, "rms_norm") or is_irc_op(node.target, "rope"):
        return True
    # A weight times a norm without one (Cohere's queries).
    return node.target is aten.mul.Tensor and _scaled_norm(node) is not None


def _scaled_norm(node: fx.Node) -> fx.Node | None:
    for inner, weight in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if is_stored(weight) and isinstance(inner, fx.Node) and inner.op == "call_function" and is_event(inner):
            return inner
    return None


def _first_input(node: fx.Node) -> fx.Node:
    if node.target is aten.mul.Tensor:
        inner = _scaled_norm(node)
        assert inner is not None
        return inner
    found = node.args[0]
    if isinstance(found, (list, tuple)):
        found = found[0]
    assert isinstance(found, fx.Node)
    return found


def _numbered(program: Program, node: fx.Node, sizes: dict[str, int]) -> Tensor:
    shape = [int(evaluate_size(program, size, sizes)) for size in node.meta[VAL].shape]
    if is_linear_like(node) or node.target is aten.bmm.default:
        return torch.arange(shape[-1]).expand(shape).clone()
    # Attention [B, H, S, D]: a channel is a head's channel.
    heads = torch.arange(shape[1] * shape[3]).view(1, shape[1], 1, shape[3])
    return heads.expand(shape).clone()


def _run(
    program: Program, node: fx.Node, values: dict[fx.Node, Any], sizes: dict[str, int], events: list[Event]
) -> Any:
    if is_event(node):
        value = values[_first_input(node)]
        shape = value.shape
        events.append(Event(node, value.reshape(-1, shape[-1])))
        return value

    def argument(used: fx.Node) -> Any:
        if used in values:
            return values[used]
        if is_size(used):
            return evaluate_size(program, used.meta[VAL], sizes)
        if used.op == "get_attr":
            return program.weight(used)
        raise NotLayout(f"{node.name} = {node.target} takes {used.name}, which is computed")

    args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
    if any(isinstance(a, (torch.SymInt,)) for a in args):
        args = tuple(evaluate_size(program, a, sizes) for a in args)
    return apply_op(node, *args, **kwargs)


def _one_token(program: Program, node: fx.Node, value: Tensor, sizes: dict[str, int]) -> Tensor:
    """The channels of one token, after a look at whether all tokens have the same."""
    shape = program.shape_expr(node)
    for axis in range(len(shape) - 1, -1, -1):
        if not shape[axis].is_Integer:
            first = value.narrow(axis, 0, 1)
            if not bool((value == first).all()):
                raise NotLayout(f"{node.name}: its tokens do not all come from the same channels")
            value = first.squeeze(axis)
    return value
