"""Places where channels can be scaled without changing what the program computes, found by dataflow.

A value x whose users are all linear layers may become x / s in each channel if the layers' weights take the factor s
in the matching columns and whatever makes x gives x / s instead:

- a norm's weight (and bias) divided by s;
- a gated product act(gate) · up: the rows (and bias) of the linear layer behind `up`;
- a ReLU or nothing over a linear layer: that layer's rows (and bias);
- attention over values: the rows of the value projection, where heads of one group share a channel's factor.

That is the ground that SmoothQuant and AWQ stand on; what they differ in is how they choose s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.contract import Move, Skip
from irc.core.operands import input_node
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.passes._weights import trainable_like
from irc.passes.fuse._layers import arguments

aten = torch.ops.aten

_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
_COPIES = frozenset({aten.clone.default, aten.contiguous.default})


@dataclass(frozen=True)
class ScaleGroup:
    """Channels of one value, and the weights that take factors for them.

    Attributes:
        value: node [..., K] that the consumers read.
        consumers: linear layers over it, whose weights [N, K] are multiplied by s in their columns.
        producers: operations whose vectors or rows are divided by s: (operation, argument name).
        between: nodes from the producers to the value, whose channels carry the factors in some layout.
        fold: factors for K channels → factors for the producers' rows (fewer where heads share them).
        spread: the way back.
    """

    value: fx.Node
    consumers: tuple[fx.Node, ...]
    producers: tuple[tuple[fx.Node, str], ...]
    between: tuple[fx.Node, ...]
    fold: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]

    @property
    def num_channels(self) -> int:
        return int(self.value.meta[VAL].shape[-1])

    def moves(self, factors: Tensor) -> dict[str, Move | None]:
        """What the values on the way became, by node name (see `PassResult.moved`)."""
        found: dict[str, Move | None] = {node.name: None for node in self.between}
        found[self.value.name] = lambda old: old / factors.to(old.dtype)
        source = self.producers[0][0]
        if source is not self.value:
            rows = self.fold(factors)
            found[source.name] = lambda old: old / rows.to(old.dtype)
        return found

    def apply(self, program: Program, factors: Tensor) -> None:
        """Divide the producers and multiply the consumers by `factors` [K], as new weights.

        `factors` must be what `spread(fold(·))` leaves alone.
        """
        rows = self.fold(factors)
        for node, name in self.producers:
            _rescale(program, node, name, rows.reciprocal(), dim=0)
        for node in self.consumers:
            _rescale(program, node, "weight", factors, dim=-1)


def find_scale_groups(program: Program) -> Iterator[ScaleGroup | Skip]:
    """Every value that only linear layers read, with the weights that can take its factors, or why none can."""
    seen: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.target is not aten.linear.default or not isinstance(node.args[0], fx.Node) or node.args[0] in seen:
            continue
        value = node.args[0]
        seen.add(value)
        consumers = tuple(value.users)
        problem = _why_not_consumers(program, value, consumers)
        if problem is not None:
            yield Skip.at(value, problem)
            continue
        found = _producers(program, value)
        if isinstance(found, str):
            yield Skip.at(value, found)
        else:
            yield ScaleGroup(value, consumers, *found)


def _why_not_consumers(program: Program, value: fx.Node, consumers: tuple[fx.Node, ...]) -> str | None:
    for user in consumers:
        if user.target is not aten.linear.default or user.args[0] is not value:
            return f"{user.name} = {user.target} reads its channels as well, and is no linear layer"
        reason = _why_not_own(user, "weight")
        if reason is not None:
            return reason
    return None


def _why_not_own(node: fx.Node, name: str) -> str | None:
    """Why a weight argument cannot be replaced for this operation alone, or None."""
    weight = arguments(node).get(name)
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return f"the {name} of {node.name} is no stored weight"
    if len(weight.users) > 1:
        return f"the {name} {weight.target} of {node.name} is shared"
    return None


Producers = tuple[tuple[fx.Node, str], ...]
Found = tuple[Producers, tuple[fx.Node, ...], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _same(factors: Tensor) -> Tensor:
    return factors


def _producers(program: Program, value: fx.Node) -> Found | str:
    if is_irc_op(value.target, "rms_norm") or value.target is aten.layer_norm.default:
        return _norm(value)
    if is_irc_op(value.target, "glu"):
        up = value.args[1]
        if not isinstance(up, fx.Node) or up.target is not aten.linear.default:
            return f"the factor {up} of {value.name} is no linear layer"
        return _linear_rows(up, value)
    if value.target is aten.relu.default and isinstance(value.args[0], fx.Node):
        inner = value.args[0]
        if inner.target is not aten.linear.default:
            return f"{value.name} is over {inner.name}, which is no linear layer"
        return _linear_rows(inner, value)
    if value.target is aten.linear.default:
        return _linear_rows(value, None)
    return _attention(value)


def _norm(node: fx.Node) -> Found | str:
    given = arguments(node)
    names = [name for name in ("weight", "bias") if given.get(name) is not None]
    if "weight" not in names:
        return f"{node.name} has no weight that could take the factors"
    for name in names:
        reason = _why_not_own(node, name)
        if reason is not None:
            return reason
    return tuple((node, name) for name in names), (), _same, _same


def _linear_rows(node: fx.Node, user: fx.Node | None) -> Found | str:
    if user is not None and len(node.users) > 1:
        return f"{node.name} has other uses than {user.name}"
    names = ["weight", *(["bias"] if arguments(node).get("bias") is not None else [])]
    for name in names:
        reason = _why_not_own(node, name)
        if reason is not None:
            return reason
    return tuple((node, name) for name in names), (), _same, _same


@dataclass(frozen=True)
class HeadValues:
    """[B, S, H·D] ← views ← attention [B, H, S, D] ← values [B, Hkv, S, D] ← views ← linear [B, S, Hkv·D].

    Attributes:
        source: the linear layer that gives the values.
        consumers: the linear layers that read the attention's result.
        between: what lies between the two.
        heads, kv_heads, width: H, Hkv, D.
    """

    source: fx.Node
    consumers: tuple[fx.Node, ...]
    between: tuple[fx.Node, ...]
    heads: int
    kv_heads: int
    width: int


def find_head_values(program: Program) -> Iterator[HeadValues | Skip]:
    """The value path of every attention between two linear layers, or why it is none."""
    for attention in program.graph.nodes:
        if not _is_attention(attention):
            continue
        value = attention
        while len(value.users) == 1 and next(iter(value.users)).target in _VIEWS | _COPIES | {aten.transpose.int}:
            value = next(iter(value.users))
        consumers = tuple(value.users)
        problem = _why_not_consumers(program, value, consumers)
        found = problem or _head_values(value)
        yield Skip.at(attention, found) if isinstance(found, str) else found


def _head_values(value: fx.Node) -> HeadValues | str:
    merged = _through(value, _VIEWS | _COPIES)
    if not _is_head_swap(merged) or not isinstance(merged.args[0], fx.Node) or not _is_attention(merged.args[0]):
        return f"{value.name} = {value.target} is made by nothing that can take factors"
    attention = merged.args[0]
    values = attention.args[2]
    assert isinstance(values, fx.Node)
    if not _is_head_swap(values) or not isinstance(values.args[0], fx.Node):
        return f"the values {values.name} of {attention.name} are no swapped heads of a linear layer"
    source = _through(values.args[0], _VIEWS | _COPIES)
    if source.target is not aten.linear.default:
        return f"the values of {attention.name} come from {source.name} = {source.target}, no linear layer"
    heads, kv_heads = int(attention.meta[VAL].shape[1]), int(values.meta[VAL].shape[1])
    width = int(values.meta[VAL].shape[3])
    sizes = (int(value.meta[VAL].shape[-1]), int(source.meta[VAL].shape[-1]))
    if sizes != (heads * width, kv_heads * width) or any(len(n.users) > 1 for n in _between(value, source)):
        return f"the heads between {source.name} and {value.name} are laid out otherwise, or used elsewhere"
    rows = _linear_rows(source, values.args[0])
    return rows if isinstance(rows, str) else HeadValues(
        source, tuple(value.users), (value, *_between(value, source)), heads, kv_heads, width
    )  # fmt: skip


def _attention(value: fx.Node) -> Found | str:
    found = _head_values(value)
    if isinstance(found, str):
        return found
    heads, kv_heads, width = found.heads, found.kv_heads, found.width

    def fold(factors: Tensor) -> Tensor:
        # One number for all query heads of a group: the geometric mean, which `spread` leaves alone.
        return factors.log().view(kv_heads, heads // kv_heads, width).mean(1).exp().flatten()

    def spread(factors: Tensor) -> Tensor:
        return factors.view(kv_heads, 1, width).expand(-1, heads // kv_heads, -1).flatten()

    rows = _linear_rows(found.source, None)
    return rows if isinstance(rows, str) else (rows[0], tuple(_between(value, found.source)), fold, spread)


def _is_attention(node: fx.Node) -> bool:
    return is_irc_op(node.target, "attention") or is_irc_op(node.target, "flash_attention")


def _is_head_swap(node: fx.Node) -> bool:
    dims: Any = node.args[1:3]
    return node.target is aten.transpose.int and sorted(dim % 4 for dim in dims) == [1, 2]


def _through(node: fx.Node, targets: frozenset[object]) -> fx.Node:
    while node.target in targets and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _between(value: fx.Node, source: fx.Node) -> Iterator[fx.Node]:
    node = value
    while node is not source:
        if node is not value:
            yield node
        node = input_node(node, 2 if is_irc_op(node.target) else 0)


def _rescale(program: Program, node: fx.Node, name: str, factors: Tensor, *, dim: int) -> None:
    """Give `node` its own copy of a weight, multiplied along a dimension; computed in f32, rounded once."""
    weight = arguments(node)[name]
    assert isinstance(weight, fx.Node)
    old = program.weight(weight)
    shape = [1] * old.ndim
    shape[dim] = -1
    scaled = (old.detach().float() * factors.to(old.device, torch.float32).view(shape)).to(old.dtype)
    node.replace_input_with(
        weight, program.weight_node(f"{weight.target}_scaled", trainable_like(scaled, old), before=node)
    )
