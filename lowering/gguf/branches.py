"""What one branch of the residual stream computes: an attention, an MLP, or experts behind a router."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import TargetError
from irc.core.operands import input_node
from irc.core.ops.registry import is_irc_op
from irc.core.program import Program
from irc.core.provenance import module_path
from irc.core.slices import evaluate_at
from irc.lowering.gguf import experts
from irc.lowering.gguf.description import Attention, Experts, HeadNorm, Linear, Mlp, Norm, Rope
from irc.lowering.gguf.rotary import read_rope
from irc.lowering.gguf.trace import (
    Event,
    NotLayout,
    Trace,
    factor,
    is_linear_like,
    is_stored,
    linear_input,
    linear_of,
    skip_layout,
    trace,
)

aten = torch.ops.aten

PLAIN_ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.tanh.default: "tanh",
}


@dataclass(frozen=True)
class Branch:
    """A term of the residual stream.

    Attributes:
        node: the term.
        reads: the partial sum that it reads.
        norm, post_norm: in front, and on its result.
        scale: factor on its result.
    """

    node: fx.Node
    reads: fx.Node
    norm: Norm | None
    post_norm: Norm | None
    scale: float
    attention: Attention | None = None
    mlp: Mlp | Experts | None = None

    def without_norm(self) -> Branch:
        return dataclasses.replace(self, norm=None)


class Reader:
    """Reads branches of one program; keeps what they share (rotary tables)."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._ropes: dict[tuple[fx.Node, ...], Rope] = {}

    def norm(self, node: fx.Node) -> tuple[Norm | None, fx.Node]:
        """(norm, its input), or (None, node)."""
        given: list[Any] = [*node.args, *(None,) * (5 - len(node.args))]
        if node.target is aten.layer_norm.default:
            x, shape, weight, bias, fifth = given[:5]
            eps: Any = node.kwargs.get("eps", 1e-5 if fifth is None else fifth)
            if len(shape) == 1 and _stored_or_none(weight) and _stored_or_none(bias):
                return Norm("layer", float(eps), weight, bias), x
        if is_irc_op(node.target, "rms_norm"):
            x, weight, eps, *_ = given
            if _stored_or_none(weight):
                return Norm("rms", float(eps), weight), x
        return None, node

    def evaluated(self, node: fx.Node, length: int) -> Tensor:
        """A value that depends on sizes alone, for sequences of that length."""
        tokens = self.program.shape_expr(self.program.placeholders[0])
        sizes = {name: max(1, dim.minimum) for name, dim in self.program.dims.items()}
        for name in sizes:
            if str(tokens[-1]) == name:
                sizes[name] = length
        return evaluate_at(self.program, [node], sizes)[0][..., :length]

    def is_branch_end(self, node: fx.Node) -> bool:
        """A linear layer that closes an attention or an MLP (and so is no head)."""
        source = skip_layout(linear_input(node))
        return _is_attention(source) or is_irc_op(source.target, "glu")

    def branch(self, term: fx.Node) -> Branch:
        """Read a term of the stream.

        Raises:
            TargetError: it is neither an attention nor an MLP; says what it is.
        """
        node, scale = term, 1.0
        while (scaled := factor(self.program, node)) is not None:
            node, scale = scaled[0], scale * scaled[1]
        post_norm, node = self.norm(node)
        if not is_linear_like(node):
            found = experts.read(self.program, node)
            if found is not None:
                norm, reads = self.norm(found.reads)
                return Branch(term, reads, norm, post_norm, scale, mlp=found.experts)
            raise TargetError(
                f"{_where(node)} is added to the residual stream, but is no attention, MLP or mixture of experts:"
                f" it is {node.target}"
            )
        source = skip_layout(linear_input(node))
        if _is_attention(source):
            attention, reads = self._attention(source, node)
            norm, below = self.norm(reads)
            return Branch(term, below, norm, post_norm, scale, attention=attention)
        mlp, reads = self._mlp(node)
        norm, below = self.norm(reads)
        return Branch(term, below, norm, post_norm, scale, mlp=mlp)

    # ---------------------------------------------------------------- attention

    def _attention(self, node: fx.Node, output: fx.Node) -> tuple[Attention, fx.Node]:
        query, key, value = (self._projection(node, index) for index in range(3))
        reads = {linear_input(part.source) for part in (query, key, value)}
        if len(reads) != 1:
            raise TargetError(f"{_where(node)}: queries, keys and values are made from different values")
        heads, head_dim = query.rows.shape
        key_rows, value_rows = _distinct_heads(key.rows), _distinct_heads(value.rows)
        if len(key_rows) != len(value_rows):
            raise TargetError(f"{_where(node)}: {len(key_rows)} heads of keys and {len(value_rows)} of values")
        columns = trace(self.program, linear_input(output), node).rows.flatten()
        if not bool((columns == torch.arange(columns.numel())).all()):
            raise TargetError(f"{_where(output)} takes the heads in another order than the attention gives them")
        rope = self._rope(node, query, key)
        options: dict[str, Any] = dict(node.kwargs)
        mask, bias = str(options.get("mask", "full")), options.get("bias")
        if bias is not None:
            raise TargetError(f"{_where(node)} adds a bias to its scores, which no architecture of irc's table does")
        if options.get("sinks") is not None:
            raise TargetError(f"{_where(node)} has attention sinks: not written yet")
        if mask == "chunked":
            raise TargetError(f"{_where(node)} has a chunked mask: not written yet")
        softcap = options.get("softcap")
        found = Attention(
            linear_of(self.program, query.source, query.rows),
            linear_of(self.program, key.source, key_rows),
            linear_of(self.program, value.source, value_rows),
            linear_of(self.program, output),
            heads, len(key_rows), head_dim, value_rows.shape[-1], float(options.get("scale", 1.0)),
            self._head_norm(query, query.rows), self._head_norm(key, key_rows), rope,
            int(options["window"]) if mask == "sliding" else None, mask != "full",
            None if softcap is None else float(softcap),
        )  # fmt: skip
        return found, reads.pop()

    def _projection(self, node: fx.Node, index: int) -> Trace:
        value = node.args[index]
        assert isinstance(value, fx.Node)
        found = trace(self.program, value)
        rows = found.rows[0] if found.rows.ndim == 3 else found.rows  # sequences of a fixed batch are all alike
        if not is_linear_like(found.source) or rows.ndim != 2:
            what = ("queries", "keys", "values")[index]
            raise TargetError(f"{_where(node)}: its {what} come from {found.source.target}, not from a linear layer")
        if index == 2 and found.events:
            raise TargetError(f"{_where(found.events[0].node)}: values that are normalized or rotated are not written")
        return Trace(found.source, rows, found.events)

    def _rope(self, node: fx.Node, query: Trace, key: Trace) -> Rope | None:
        found = []
        for part in (query, key):
            turns = [event for event in part.events if is_irc_op(event.node.target, "rope")]
            if len(turns) > 1:
                raise TargetError(f"{_where(node)} turns its queries or keys twice")
            if turns and turns[0].rows.shape[-1] != part.rows.shape[-1]:
                raise TargetError(f"{_where(turns[0].node)} turns a part of a head that was cut out of it")
            found.append(read_rope(self.program, turns[0].node, self._ropes) if turns else None)
        first, second = found
        if first is None or second is None:
            if first is not second:
                raise TargetError(f"{_where(node)} turns its queries or its keys, not both")
            return None
        if not first.same_as(second):
            raise TargetError(f"{_where(node)} turns queries and keys by different angles")
        return first

    def _head_norm(self, part: Trace, rows: Tensor) -> HeadNorm | None:
        norms = [event for event in part.events if not is_irc_op(event.node.target, "rope")]
        norms = [event for event in norms if not _is_inner(event, norms)]
        if not norms:
            return None
        weights = torch.zeros(int(part.rows.max()) + 1)
        kinds, spans = set(), set()
        for event in norms:
            norm, factor_node = self._norm_of_event(event.node)
            kinds.add((norm.kind, norm.eps))
            if norm.bias is not None:
                raise TargetError(f"{_where(event.node)}: a norm of queries or keys with a bias is in no architecture")
            values = self._norm_weight(norm, factor_node, event.rows)
            weights[event.rows.flatten()] = values.flatten()
            spans.add("all" if event.rows.shape[-1] > rows.shape[-1] else "head")
        if len(kinds) != 1 or len(spans) != 1:
            raise TargetError(f"{_where(norms[0].node)}: the heads are normalized in different ways")
        ordered = weights[rows]
        span = spans.pop()
        if span == "head":
            if bool((ordered == ordered[:1]).all()):
                ordered = ordered[0]
            else:
                span = "heads"
        else:
            covered = norms[0].rows.unique().numel()
            if covered != rows.numel():
                raise TargetError(f"{_where(norms[0].node)} normalizes more than the heads that are used")
            ordered = ordered.flatten()
        kind, eps = kinds.pop()
        turned = [event for event in part.events if is_irc_op(event.node.target, "rope")]
        after = bool(turned) and part.events.index(turned[0]) < part.events.index(norms[0])
        return HeadNorm(kind, span, eps, ordered, after)

    def _norm_of_event(self, node: fx.Node) -> tuple[Norm, fx.Node | None]:
        if node.target is aten.mul.Tensor:
            inner, weight = input_node(node), input_node(node, 1)
            if is_stored(inner):
                inner, weight = weight, inner
            norm, _ = self.norm(inner)
            if norm is None or norm.weight is not None:
                raise TargetError(f"{_where(node)}: a product that is no norm's weight")
            return norm, weight
        norm, _ = self.norm(node)
        if norm is None:
            raise TargetError(f"{_where(node)} is no norm with a stored weight")
        return norm, None

    def _norm_weight(self, norm: Norm, factor_node: fx.Node | None, rows: Tensor) -> Tensor:
        """The weight of each row: [n, width] like `rows`."""
        holder = factor_node if factor_node is not None else norm.weight
        if holder is None:
            return torch.ones(rows.shape)
        weight = self.stored(holder).float()
        if weight.ndim == 1:
            return weight.expand(rows.shape)
        if weight.ndim == 2:  # [H, D] against [B, S, H, D]
            return weight.repeat(len(rows) // len(weight), 1)
        raise TargetError(f"{holder.name}: a norm's weight of shape {list(weight.shape)}")

    def stored(self, node: fx.Node) -> Tensor:
        """The numbers of a stored weight."""
        from irc.lowering.gguf.stored import numbers

        return numbers(self.program, node)

    # ---------------------------------------------------------------- MLP

    def _mlp(self, down: fx.Node) -> tuple[Mlp, fx.Node]:
        inner = linear_input(down)
        if is_irc_op(inner.target, "glu"):
            gate, up = (self._hidden(inner.args[index]) for index in range(2))
            if linear_input(gate[1]) is not linear_input(up[1]):
                raise TargetError(f"{_where(inner)}: gate and up read different values")
            activation = str(inner.kwargs.get("activation", "silu"))
            return Mlp(up[0], linear_of(self.program, down), activation, gate[0]), linear_input(up[1])
        if is_irc_op(inner.target, "linear_activation"):
            weight, bias = inner.args[1], inner.args[2] if len(inner.args) > 2 else None
            up_layer = Linear(weight, bias)
            return Mlp(up_layer, linear_of(self.program, down), str(inner.kwargs["activation"])), inner.args[0]
        plain = _activation(inner)
        if plain is None:
            raise TargetError(
                f"{_where(down)} is added to the residual stream, but closes neither an attention nor an MLP: it reads"
                f" {inner.target}"
            )
        before = inner.args[0]
        hidden, source = self._hidden(before.args[0] if plain == "relu_squared" else before)
        return Mlp(hidden, linear_of(self.program, down), plain), linear_input(source)

    def _hidden(self, node: Any) -> tuple[Linear, fx.Node]:
        found = trace(self.program, node)
        if not is_linear_like(found.source) or found.events:
            raise NotLayout(f"{_where(node)} does not come straight from a linear layer")
        rows = found.rows.reshape(-1, found.rows.shape[-1])[0]
        return linear_of(self.program, found.source, rows), found.source


def _activation(node: fx.Node) -> str | None:
    if node.target in (aten.gelu.default,):
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return "gelu_tanh" if approximate == "tanh" else "gelu"
    if node.target is aten.mul.Tensor and node.args[0] is node.args[1] and isinstance(node.args[0], fx.Node):
        return "relu_squared" if node.args[0].target is aten.relu.default else None
    return PLAIN_ACTIVATIONS.get(node.target)


def _is_inner(event: Event, events: list[Event]) -> bool:
    """A norm whose weight is multiplied on by another event."""
    return any(event.node in other.node.all_input_nodes for other in events if other.node.target is aten.mul.Tensor)


def _distinct_heads(rows: Tensor) -> Tensor:
    """[Hkv, D] of heads that are repeated for groups of queries: [H, D]."""
    heads = len(rows)
    distinct = len(rows.unique(dim=0))
    grouped = rows[:: heads // distinct] if heads % distinct == 0 else rows
    if distinct < heads and bool((grouped.repeat_interleave(heads // distinct, 0) == rows).all()):
        return grouped
    return rows


def _is_attention(node: fx.Node) -> bool:
    return is_irc_op(node.target, "attention") or is_irc_op(node.target, "flash_attention")


def _stored_or_none(node: Any) -> bool:
    return node is None or is_stored(node)


def _where(node: fx.Node) -> str:
    path = module_path(node)
    return f"{path} ({node.name})" if path else node.name
