"""From a program to a `Transformer`: by what the graph computes, never by names of modules.

The residual stream is a sum. Its terms are the embedding and what each branch adds; a branch reads the sum of the
terms before it, which says whether it runs after or beside its neighbour. Encoders that normalize the sum
itself (BERT) are read backwards, sum by sum. What a branch computes is read in `branches`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import TargetError
from irc.core.kv_cache import KVCache
from irc.core.operands import input_node
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.core.provenance import module_path
from irc.core.slices import data_dependent
from irc.lowering.gguf import trace
from irc.lowering.gguf.branches import Branch, Reader
from irc.lowering.gguf.description import Layer, Linear, Norm, Transformer
from irc.lowering.gguf.trace import NotLayout, constant, factor, is_linear_like, is_stored, linear_input, linear_of

aten = torch.ops.aten
_SUMS = (aten.add.Tensor, aten.add_.Tensor)


def describe(program: Program) -> Transformer:
    """What a program computes.

    Raises:
        TargetError: it is no transformer over token ids, or a part of it is none that can be described; says which.
    """
    if KVCache.of(program) is not None:
        raise TargetError(
            f"program {program.name} has a key-value cache; llama.cpp brings its own: lower the program from before"
            " insert-kv-cache"
        )
    outputs = [out for out in program.outputs if isinstance(out, fx.Node)]
    if len(outputs) != 1 or len(program.placeholders) != 1:
        raise TargetError(
            f"program {program.name} has {len(program.placeholders)} inputs and {len(outputs)} outputs; a GGUF"
            " model has token ids and one output"
        )
    tokens = program.placeholders[0].meta[VAL]
    if not isinstance(tokens, Tensor) or tokens.dtype.is_floating_point:
        raise TargetError(
            f"program {program.name} reads {program.type_text(program.placeholders[0])}, not token ids: GGUF files are"
            " language models and text encoders"
        )
    return _Description(program).read(outputs[0])


@dataclass
class _Head:
    node: fx.Node
    head: Linear | None
    scale: float
    softcap: float | None


@dataclass
class _Stream:
    """The terms of the residual stream and what each partial sum holds."""

    terms: list[fx.Node] = field(default_factory=list)
    holds: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)


class _Description:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.dependent = data_dependent(program)
        self.reader = Reader(program)

    def read(self, output: fx.Node) -> Transformer:
        top = self._head(output)
        final_norm, below = self.reader.norm(top.node)
        if final_norm is not None and self._is_embedding_sum(below):
            raise TargetError(f"program {self.program.name} has no layers")
        if top.head is None and final_norm is not None and self._normalizes_sums(below):
            return self._encoder(top.node)
        return self._decoder(top, final_norm, below)

    # ---------------------------------------------------------------- head

    def _head(self, node: fx.Node) -> _Head:
        softcap, scale = None, 1.0
        capped = factor(self.program, node)
        if capped is not None and capped[0].target is aten.tanh.default:
            inner = factor(self.program, capped[0].args[0])
            if inner is None or abs(inner[1] * capped[1] - 1) > 1e-6:
                raise TargetError(f"{node.name}: a cap on the logits must divide by what it multiplies with")
            softcap, node = capped[1], inner[0]
        while (scaled := factor(self.program, node)) is not None:
            node, scale = scaled[0], scale * scaled[1]
        if is_linear_like(node) and not self.reader.is_branch_end(node):
            return _Head(linear_input(node), linear_of(self.program, node), scale, softcap)
        if softcap is not None or scale != 1.0:
            raise TargetError(f"{node.name}: only logits can be scaled or capped")
        return _Head(node, None, 1.0, None)

    # ---------------------------------------------------------------- sums

    def _is_sum(self, node: fx.Node) -> bool:
        """A sum of two values of the stream (not of a layer and its bias)."""
        if node.op != "call_function" or node.target not in _SUMS or is_linear_like(node):
            return False
        if node.kwargs.get("alpha", 1) != 1:
            return False
        return all(isinstance(a, fx.Node) and not self._is_vector(a) for a in node.args[:2])

    def _is_vector(self, node: fx.Node) -> bool:
        value = node.meta.get(VAL)
        return not isinstance(value, torch.Tensor) or value.ndim < 2

    def _stream(self, node: fx.Node, stream: _Stream) -> frozenset[fx.Node]:
        if node in stream.holds:
            return stream.holds[node]
        if self._is_sum(node):
            parts = [self._stream(input_node(node, place), stream) for place in range(2)]
            if parts[0] & parts[1]:
                raise TargetError(f"{node.name} adds a value to the residual stream twice")
            stream.holds[node] = parts[0] | parts[1]
        else:
            stream.terms.append(node)
            stream.holds[node] = frozenset((node,))
        return stream.holds[node]

    def _is_embedding_sum(self, node: fx.Node) -> bool:
        stream = _Stream()
        self._stream(node, stream)
        return all(self._is_lookup(term) for term in stream.terms)

    def _is_lookup(self, node: fx.Node) -> bool:
        while (scaled := factor(self.program, node)) is not None:
            node = scaled[0]
        return node.target is aten.embedding.default or node not in self.dependent

    # ---------------------------------------------------------------- decoders

    def _decoder(self, top: _Head, final_norm: Norm | None, below: fx.Node) -> Transformer:
        stream = _Stream()
        self._stream(below, stream)
        lookups = [term for term in stream.terms if self._is_lookup(term)]
        branches = [self.reader.branch(term) for term in stream.terms if term not in lookups]
        start = frozenset(lookups)
        layers = self._layers(branches, stream, start, lookups)
        return self._transformer(lookups, layers, final_norm, top, None)

    def _layers(
        self, branches: list[Branch], stream: _Stream, start: frozenset[fx.Node], lookups: list[fx.Node]
    ) -> list[Layer]:
        """Branches in pairs of an attention and an MLP, by what each of them reads."""
        reads: dict[fx.Node, frozenset[fx.Node]] = {}
        for branch in branches:
            if branch.reads not in stream.holds:
                raise TargetError(
                    f"{_where(branch.node)} reads {branch.reads.name}, which is not the residual stream"
                    f" ({branch.reads.target})"
                )
            reads[branch.node] = stream.holds[branch.reads]
        layers: list[Layer] = []
        before = start
        rest = list(branches)
        while rest:
            here = [branch for branch in rest if reads[branch.node] == before]
            attention = next((branch for branch in here if branch.attention is not None), None)
            if attention is None:
                named = _where(here[0].node if here else rest[0].node)
                raise TargetError(
                    f"layer {len(layers)}: an attention was expected after the layers before, not {named}"
                )
            after = before | {attention.node}
            mlp = next((b for b in rest if b.mlp is not None and reads[b.node] in (before, after)), None)
            if mlp is None:
                raise TargetError(f"layer {len(layers)}: the attention {_where(attention.node)} has no MLP after it")
            parallel = reads[mlp.node] == before
            layers.append(_layer(attention, mlp, parallel=parallel))
            rest = [branch for branch in rest if branch is not attention and branch is not mlp]
            before = after | {mlp.node}
        if not layers:
            raise TargetError(f"program {self.program.name} has no layers of attention and MLP")
        return layers

    # ---------------------------------------------------------------- encoders that normalize sums

    def _normalizes_sums(self, node: fx.Node) -> bool:
        """x + branch(x) where x itself is a norm's result."""
        if not self._is_sum(node):
            return False
        return any(self.reader.norm(a)[0] is not None for a in node.args[:2])

    def _encoder(self, node: fx.Node) -> Transformer:
        layers: list[Layer] = []
        while True:
            norm, below = self.reader.norm(node)
            if norm is None:
                raise TargetError(f"{_where(node)}: a norm was expected here, not {node.target}")
            if not self._normalizes_sums(below):
                break
            mlp, middle = self._post_branch(below)
            attention_norm, below = self.reader.norm(middle)
            attention, node = self._post_branch(below)
            if mlp.mlp is None or attention.attention is None or attention_norm is None:
                raise TargetError(f"{_where(middle)}: an attention and an MLP were expected to alternate here")
            layer = _layer(attention, mlp, parallel=False)
            layers.insert(0, _with_out_norms(layer, attention_norm, norm))
        stream = _Stream()
        self._stream(below, stream)
        if not all(self._is_lookup(term) for term in stream.terms):
            raise TargetError(f"{_where(below)}: embeddings were expected below the first layer")
        return self._transformer(stream.terms, layers, None, _Head(node, None, 1.0, None), norm)

    def _post_branch(self, node: fx.Node) -> tuple[Branch, fx.Node]:
        """The branch of a sum x + branch(x), and x."""
        left, right = node.args[:2]
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        for term, other in ((left, right), (right, left)):
            if self.reader.norm(other)[0] is None:
                continue
            try:
                branch = self.reader.branch(term)
            except TargetError:
                continue
            if branch.reads is other and branch.norm is None:
                return branch, other
            if branch.norm is not None and self.reader.norm(other)[1] is branch.reads:
                # The norm in front is that of the sum before.
                return branch.without_norm(), other
        raise TargetError(f"{_where(node)}: neither term of this sum is a branch of the other")

    # ---------------------------------------------------------------- embeddings

    def _transformer(
        self, lookups: list[fx.Node], layers: list[Layer], final_norm: Norm | None, top: _Head, norm: Norm | None
    ) -> Transformer:
        embedding: fx.Node | None = None
        scale, positions, types = 1.0, None, None
        notes: list[str] = []
        for term in lookups:
            node, found = term, 1.0
            while (scaled := factor(self.program, node)) is not None:
                node, found = scaled[0], found * scaled[1]
            if node.target is not aten.embedding.default or not is_stored(node.args[0]):
                positions = self._positions(node, positions)
            elif node.args[1] is self.program.placeholders[0]:
                embedding, scale = input_node(node), found
            elif node.args[1] in self.dependent:
                raise TargetError(f"{_where(node)} looks up something other than the token ids")
            elif self._is_row_zero(node):
                types = node.args[0]
            else:
                positions = self._positions(node, positions)
        if embedding is None:
            raise TargetError(f"program {self.program.name} does not start with an embedding of its input")
        vocabulary, width = (int(size) for size in embedding.meta[VAL].shape)
        limits = [dim.maximum for dim in self.program.dims.values() if dim.maximum is not None]
        return Transformer(
            embedding, width, vocabulary, layers, final_norm, top.head, scale, positions, types,
            norm, top.scale, top.softcap, min(limits) if limits else None, notes,
        )  # fmt: skip

    def _positions(self, node: fx.Node, known: fx.Node | None) -> fx.Node:
        if known is not None:
            raise TargetError(f"{_where(node)}: the positions are added twice")
        if node.target is not aten.embedding.default:
            raise TargetError(
                f"{_where(node)}: positions that are computed, not looked up, are in no GGUF architecture"
            )
        ids = self.reader.evaluated(node.args[1], 3)
        if ids.flatten().tolist() != [0, 1, 2]:
            raise TargetError(
                f"{_where(node)}: positions must count from 0, not {ids.flatten().tolist()}: no GGUF architecture"
                " offsets them"
            )
        table = node.args[0]
        assert isinstance(table, fx.Node)
        return table

    def _is_row_zero(self, node: fx.Node) -> bool:
        ids = self.reader.evaluated(node.args[1], 3)
        return bool((ids == 0).all())


def _layer(attention: Branch, mlp: Branch, *, parallel: bool) -> Layer:
    assert attention.attention is not None
    assert mlp.mlp is not None
    return Layer(
        attention.attention, mlp.mlp, attention.norm, mlp.norm, attention.post_norm, mlp.post_norm,
        parallel=parallel, attention_scale=attention.scale, mlp_scale=mlp.scale,
    )  # fmt: skip


def _with_out_norms(layer: Layer, attention: Norm, mlp: Norm) -> Layer:
    import dataclasses

    return dataclasses.replace(layer, attention_out_norm=attention, mlp_out_norm=mlp)


def _where(node: fx.Node) -> str:
    path = module_path(node)
    return f"{path} ({node.name})" if path else node.name


__all__ = ["NotLayout", "constant", "describe", "is_irc_op", "trace"]
