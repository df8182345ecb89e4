"""The residual stream turned by an orthogonal matrix, so that no channel of it stands out.

Runs on a canonical program before weights or activations are quantized; needs no calibration. Everything is found
by dataflow: the stream is what embeddings and linear layers are added into; RMSNorms read it. Since
rms_norm(x·Q) = rms_norm(x)·Q for a norm without weight, each norm's weight goes into the layers behind it, every
layer that writes the stream gives y·Q, and every layer that reads it takes Qᵀ in. Besides, the values of each
attention head are turned, and turned back in the output projection. Nothing is left to do at run time.
Does not handle: LayerNorm (it subtracts a mean, which Q does not keep), norms between a layer and the stream.
Source: Ashkboos et al. 2024 (QuaRot), https://arxiv.org/abs/2404.00456; Ashkboos et al. 2024 (SliceGPT).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.contract import Move, Pass, PassContext, PassResult, Skip, register_pass
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.core.provenance import location, module_path
from irc.passes._weights import erase_replaced_weights, trainable_like
from irc.passes.fuse._layers import arguments
from irc.passes.quantize._hadamard import random_hadamard
from irc.passes.quantize._scale_groups import HeadValues, find_head_values

aten = torch.ops.aten

_ADDS = frozenset({aten.add.Tensor})
_SCALINGS = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})
_COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.dropout.default, aten.alias.default})


@dataclass
class Stream:
    """The residual stream: nodes that carry it, layers that write it, norms that read it."""

    nodes: set[fx.Node] = field(default_factory=set)
    embeddings: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)
    problems: list[tuple[fx.Node, str]] = field(default_factory=list)


@register_pass
@dataclass(frozen=True, kw_only=True)
class RotateResidual(Pass):
    """linear(rms_norm(x, g), W) → linear(rms_norm(x·Q), W·diag(g)·Q), and y → y·Q for all that is added to x.

    Attributes:
        heads: also turn the values of each attention head.
        seed: of the random signs in Q, a Hadamard matrix times a diagonal of ±1.

    Preserves: exact, up to rounding of the weights that were multiplied.
    """

    name: ClassVar[str] = "rotate-residual"
    heads: bool = True
    seed: int = 0

    def requires(self, program: Program) -> list[str]:
        stream = find_stream(program)
        if not stream.norms and not stream.problems:
            return ["no residual stream was found: nothing that embeddings are added into is read by an RMSNorm"]
        return [f"{_place(node)} {problem}" for node, problem in stream.problems]

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        stream = find_stream(program)
        width = int(stream.embeddings[0].meta[VAL].shape[-1])
        turn = random_hadamard(width, self.seed)
        matches, moved = 0, dict[str, Move | None]()
        if ctx.allow(stream.norms[0]):  # all of the stream or nothing
            for node in stream.embeddings:
                _set_weight(program, node, "weight", lambda w: w @ turn)
            for node in stream.writers:
                _set_weight(program, node, "weight", lambda w: turn.T @ w)
                _set_weight(program, node, "bias", lambda b: b @ turn)
            for node in (*stream.nodes, *stream.writers):
                moved[node.name] = lambda old: old @ turn
            for norm in stream.norms:
                moved[norm.name] = self._read(program, norm, turn)
            matches += len(stream.norms)
        skips: list[Skip] = []
        for found in find_head_values(program) if self.heads else ():
            if isinstance(found, Skip):
                skips.append(found)
            elif ctx.allow(found.source):
                _turn_heads(program, found, random_hadamard(found.width, self.seed + 1))
                moved |= dict.fromkeys((node.name for node in (found.source, *found.between)), None)
                matches += 1
        moved |= erase_replaced_weights(program)
        in_use = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
        program.tied = {alias: name for alias, name in program.tied.items() if name in in_use}
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0, moved=moved)

    def _read(self, program: Program, norm: fx.Node, turn: Tensor) -> Move:
        """Take the norm's weight and the turn into the layers behind it; says what the norm's value became."""
        gain = arguments(norm)["weight"]
        factors = torch.ones(turn.shape[0]) if gain is None else program.weight(gain).detach().float()
        for user in list(norm.users):
            _set_weight(program, user, "weight", lambda w: (w * factors) @ turn)
        norm.args = (norm.args[0], None, *norm.args[2:])
        program.infer_type(norm)
        return lambda old: (old / factors) @ turn


def find_stream(program: Program) -> Stream:
    """Follow the sums from the embeddings; whatever else touches the stream is a problem."""
    stream = Stream()
    for node in program.graph.nodes:
        if node.target is aten.embedding.default:
            _enter(program, stream, node)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    pending = sorted(stream.nodes, key=order.__getitem__)
    while pending:
        node = pending.pop(0)
        for user in node.users:
            if user in stream.nodes:
                continue
            if user.target in _ADDS and user.kwargs.get("alpha", 1) == 1:
                stream.nodes.add(user)
                pending.append(user)
                for other in user.all_input_nodes:
                    if other not in stream.nodes:
                        _enter(program, stream, other)
            elif user.target in _COPIES or (user.target in _SCALINGS and len(user.all_input_nodes) == 1):
                stream.nodes.add(user)
                pending.append(user)
            elif is_irc_op(user.target, "rms_norm") and user.args[0] is node:
                if user not in stream.norms:
                    stream.norms.append(user)
                    _check_readers(stream, user)
            else:
                stream.problems.append((user, f"= {user.target} reads the residual stream and is no RMSNorm"))
    return stream


def _enter(program: Program, stream: Stream, node: fx.Node) -> None:
    """A value that is added to the stream: an embedding, or a linear layer behind copies and constant factors."""
    source = node
    while (source.target in _COPIES or source.target in _SCALINGS) and len(source.all_input_nodes) == 1:
        if len(source.users) > 1 and source is not node:
            break
        source = source.all_input_nodes[0]
    if source.target is aten.embedding.default:
        weight = source.args[0]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            stream.problems.append((source, "looks up a table that is no stored weight"))
            return
        if source not in stream.embeddings:
            stream.embeddings.append(source)
    elif source.target is aten.linear.default and len(source.users) == 1:
        if arguments(source)["weight"].op != "get_attr":
            stream.problems.append((source, "has a weight that is computed"))
            return
        if source not in stream.writers:
            stream.writers.append(source)
    else:
        stream.problems.append((source, f"= {source.target} is added to the residual stream and is no linear layer"))
        return
    stream.nodes.update(_chain(node, source))


def _chain(node: fx.Node, source: fx.Node) -> set[fx.Node]:
    found = {node}
    while node is not source:
        node = node.all_input_nodes[0]
        found.add(node)
    return found


def _check_readers(stream: Stream, norm: fx.Node) -> None:
    gain = arguments(norm)["weight"]
    if gain is not None and (not isinstance(gain, fx.Node) or gain.op != "get_attr"):
        stream.problems.append((norm, "has a weight that is computed"))
    for user in norm.users:
        if user.target is not aten.linear.default or user.args[0] is not norm:
            stream.problems.append((user, f"= {user.target} reads {norm.name} and is no linear layer"))
        elif arguments(user)["weight"].op != "get_attr":
            stream.problems.append((user, "has a weight that is computed"))


def _turn_heads(program: Program, found: HeadValues, turn: Tensor) -> None:
    def rows(w: Tensor) -> Tensor:
        return (turn.T @ w.view(found.kv_heads, found.width, -1)).reshape(w.shape)

    def columns(w: Tensor) -> Tensor:
        return (w.view(len(w), found.heads, found.width) @ turn).reshape(w.shape)

    _set_weight(program, found.source, "weight", rows)
    _set_weight(program, found.source, "bias", lambda b: (b.view(found.kv_heads, found.width) @ turn).flatten())
    for user in found.consumers:
        _set_weight(program, user, "weight", columns)


def _set_weight(program: Program, node: fx.Node, name: str, change: Move) -> None:
    """Give a layer its own changed copy of a weight, computed in f32 and rounded once; no bias, no change."""
    weight = arguments(node).get(name)
    if weight is None:
        return
    old = program.weight(weight)
    turned = change(old.detach().float()).to(old.dtype).contiguous()
    new = program.weight_node(f"{weight.target}_turned", trainable_like(turned, old), before=node)
    node.replace_input_with(weight, new)


def _place(node: fx.Node) -> str:
    return " ".join(filter(None, (node.name, f"({module_path(node)} {location(node)})")))
