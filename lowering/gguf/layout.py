"""From a transformer and its architecture to the file's tensors and metadata, names as llama.cpp has them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.program import VAL, Program
from irc.lowering.gguf.architectures import ALWAYS, DOWN, GATE, HEAD, NEVER, UP, Architecture, K, O, Q, V
from irc.lowering.gguf.description import Experts, HeadNorm, Layer, Linear, Mlp, Norm, Rope, Transformer
from irc.lowering.gguf.match import all_norms, distinct_ropes, mlp_width
from irc.lowering.gguf.pieces import FileTensor, Piece, bias_piece, check_factor, weight_piece, zeros
from irc.lowering.gguf.rotary import explain_frequencies

_DEFAULT_CONTEXT = 2048
# Keys that llama.cpp does not look at: what the program had before, for a reader that wants exactly that.
ROPE_KEY = "irc.rope.pairs"
FREQUENCIES_KEY = "irc.rope.frequencies"


@dataclass
class Layout:
    """What the file will hold.

    Attributes:
        metadata: values by key; int is written as u32, float as f32.
        notes: what a person should know.
    """

    architecture: Architecture
    tensors: list[FileTensor] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def lay_out(program: Program, model: Transformer, entry: Architecture, context_length: int | None = None) -> Layout:
    """Tensors and metadata of a transformer that matches the architecture.

    Raises:
        TargetError: a quantized weight would have to be multiplied by a number.
    """
    writer = _Layout(program, model, entry, Layout(entry))
    writer.metadata(context_length)
    writer.tensors()
    return writer.out


class _Layout:
    def __init__(self, program: Program, model: Transformer, entry: Architecture, out: Layout) -> None:
        self.program, self.model, self.entry, self.out = program, model, entry, out

    # ---------------------------------------------------------------- metadata

    def metadata(self, context_length: int | None) -> None:
        model, entry = self.model, self.entry
        first = model.layers[0].attention
        values: dict[str, Any] = {
            "context_length": self._context(context_length),
            "embedding_length": model.width,
            "block_count": len(model.layers),
            "vocab_size": model.vocabulary,
            "attention.head_count": self._per_layer([layer.attention.num_heads for layer in model.layers]),
            "attention.head_count_kv": self._per_layer([layer.attention.num_kv_heads for layer in model.layers]),
            "feed_forward_length": self._per_layer([mlp_width(layer.mlp) for layer in model.layers]),
        }
        if first.head_dim * first.num_heads != model.width or entry.per_layer:
            values["attention.key_length"] = values["attention.value_length"] = first.head_dim
        eps = next((norm.eps for norm in all_norms(model) if norm is not None), 1e-5)
        values["attention.layer_norm_" + ("rms_epsilon" if entry.norm == "rms" else "epsilon")] = eps
        if not entry.causal:
            # llama.cpp: pooling 0 gives the hidden state of each token.
            values |= {"attention.causal": False, "pooling_type": 0}
            types = self.model.token_types
            self.out.metadata["tokenizer.ggml.token_type_count"] = 1 if types is None else int(types.meta[VAL].shape[0])
        if "parallel-2" in entry.block and "sequential" in entry.block:
            values["use_parallel_residual"] = model.layers[0].parallel
        self._scales(values)
        self._experts(values)
        self._windows(values)
        self._ropes(values)
        self.out.metadata |= {f"{entry.name}.{key}": value for key, value in values.items()}

    def _context(self, wanted: int | None) -> int:
        limits = [self.model.max_length]
        if self.model.positions is not None:
            limits.append(int(self.model.positions.meta[VAL].shape[0]))
        windows = [layer.attention.window for layer in self.model.layers]
        window = max((w for w in windows if w is not None), default=None)
        if (
            window is not None
            and (not self.entry.window or None not in windows)
            and self.entry.name not in ("gemma2", "gemma3")
        ):
            limits.append(window)
            self.out.notes.append(
                f"{self.entry.name} has no sliding window: the context length is the window, {window} tokens, up to"
                " which both are the same"
            )
        known = [limit for limit in limits if limit is not None]
        longest = min(known) if known else None
        if wanted is None:
            if longest is None:
                self.out.notes.append(
                    f"context length {_DEFAULT_CONTEXT}: the program has no limit; set context_length"
                )
            return longest or _DEFAULT_CONTEXT
        if self.model.positions is not None:
            return int(self.model.positions.meta[VAL].shape[0])
        return wanted if longest is None else min(wanted, longest)

    def _per_layer(self, values: list[int]) -> int | list[int]:
        return values if self.entry.per_layer and len(set(values)) > 1 else values[0]

    def _scales(self, values: dict[str, Any]) -> None:
        model, entry = self.model, self.entry
        if entry.embedding_scale == "key":
            values["embedding_scale"] = model.embedding_scale
        if entry.logit_scale is not None:
            values["logit_scale"] = model.logit_scale if entry.logit_scale == "multiply" else 1 / model.logit_scale
        if entry.residual_scale:
            values["residual_scale"] = self._shared_residual_scale()
        if entry.attention_scale:
            values["attention.scale"] = model.layers[0].attention.scale
        if model.softcap is not None:
            values["final_logit_softcapping"] = model.softcap
        cap = model.layers[0].attention.softcap
        if cap is not None:
            values["attn_logit_softcapping"] = cap

    def _shared_residual_scale(self) -> float:
        found = {scale for layer in self.model.layers for scale in (layer.attention_scale, layer.mlp_scale)}
        return found.pop() if self.entry.residual_scale and len(found) == 1 else 1.0

    def _experts(self, values: dict[str, Any]) -> None:
        mlp = self.model.layers[0].mlp
        if not isinstance(mlp, Experts):
            return
        values |= {"expert_count": mlp.num_experts, "expert_used_count": mlp.num_used}
        if self.entry.experts == ALWAYS:
            values["expert_feed_forward_length"] = mlp_width(mlp)

    def _windows(self, values: dict[str, Any]) -> None:
        windows = [layer.attention.window for layer in self.model.layers]
        found = [window for window in windows if window is not None]
        if self.entry.window and found:
            values["attention.sliding_window"] = found[0]
            values["attention.sliding_window_pattern"] = [window is not None for window in windows]

    def _ropes(self, values: dict[str, Any]) -> None:
        groups = distinct_ropes(self.model)
        if not groups:
            return
        plain: Rope = groups[0]
        found = explain_frequencies(plain.frequencies)
        values |= {"rope.dimension_count": plain.width, "rope.freq_base": found.base}
        if found.scaling != 1:
            values |= {"rope.scaling.type": "linear", "rope.scaling.factor": found.scaling}
        if plain.magnitude != 1:
            values["rope.scaling.attn_factor"] = plain.magnitude
        if found.factors is not None:
            self.out.tensors.append(FileTensor("rope_freqs.weight", "rope", (Piece(literal=found.factors),)))
        # Layers with a window may turn at another base, and llama.cpp does not scale theirs.
        if self.entry.name in ("gemma2", "gemma3") and any(layer.attention.window for layer in self.model.layers):
            values["rope.freq_base_swa"] = explain_frequencies(groups[-1].frequencies).base
            self.out.metadata[FREQUENCIES_KEY + "_swa"] = groups[-1].frequencies.float().tolist()
        self.out.metadata[FREQUENCIES_KEY] = plain.frequencies.float().tolist()
        if not plain.interleaved and self.entry.rope == "interleaved":
            self.out.metadata[ROPE_KEY] = "half"

    # ---------------------------------------------------------------- tensors

    def tensors(self) -> None:
        model, entry = self.model, self.entry
        built_in = math.sqrt(model.width) if entry.embedding_scale == "sqrt" else 1.0
        scale = 1.0 if entry.embedding_scale == "key" else model.embedding_scale / built_in
        scale = 1.0 if abs(scale - 1) < 1e-5 else scale
        self._add("token_embd.weight", "embedding", Piece(model.embedding, None, None, scale), why="its scale")
        if model.positions is not None:
            self._add("position_embd.weight", "positions", Piece(model.positions))
        if model.token_types is not None:
            self._add("token_types.weight", "positions", Piece(model.token_types))
        self._norm("token_embd_norm", model.embedding_norm)
        for index, layer in enumerate(model.layers):
            self._layer(index, layer)
        self._norm("output_norm", model.final_norm)
        if model.head is not None:
            self._head(model.head, embedding_scale=scale)

    def _head(self, head: Linear, *, embedding_scale: float) -> None:
        scale = 1.0 if self.entry.logit_scale is not None else self.model.logit_scale
        tied = self.model.tied and scale == 1 and embedding_scale == 1 and head.rows is None
        if not tied or self.entry.head == ALWAYS:
            self._add("output.weight", "output", weight_piece(head, scale), why="the logits' scale")
            if self.model.tied:
                self.out.notes.append("the head is written apart from the embedding it shares its weight with")
        bias = bias_piece(head, scale)
        if bias is None and self.entry.bias(HEAD) == ALWAYS:
            bias = zeros(self.model.vocabulary)
        if bias is not None:
            self._add("output.bias", "bias", bias)

    def _add(self, name: str, role: str, *pieces: Piece, layer: int | None = None, why: str = "a scale") -> None:
        checked = tuple(check_factor(self.program, piece, why) for piece in pieces)
        prefix = "" if layer is None else f"blk.{layer}."
        self.out.tensors.append(FileTensor(prefix + name, role, checked, layer))

    def _norm(self, name: str, norm: Norm | None, layer: int | None = None, factor: float = 1.0) -> None:
        if norm is None:
            return
        weight = Piece(literal=torch.ones(self.model.width)) if norm.weight is None else Piece(norm.weight)
        self._add(f"{name}.weight", "norm", dataclasses.replace(weight, factor=factor), layer=layer)
        if self.entry.norm_bias:
            bias = zeros(self.model.width) if norm.bias is None else Piece(norm.bias, factor=factor)
            self._add(f"{name}.bias", "norm", bias, layer=layer)

    def _layer(self, index: int, layer: Layer) -> None:
        for name, norm, factor in self._layer_norms(layer):
            self._norm(name, norm, index, factor)
        self._attention(index, layer)
        scale = self._branch_scale(layer.mlp_scale)
        scale = scale if layer.mlp_post_norm is None else 1.0
        if isinstance(layer.mlp, Experts):
            self._moe(index, layer.mlp, scale)
        else:
            self._mlp(index, layer.mlp, scale)

    def _branch_scale(self, scale: float) -> float:
        """What a branch's last layer is multiplied by: all of it, unless the metadata holds it."""
        shared = self._shared_residual_scale()
        return scale / shared if shared else scale

    def _layer_norms(self, layer: Layer) -> Iterator[tuple[str, Norm | None, float]]:
        attention, mlp = layer.attention_norm, layer.mlp_norm
        one_norm = layer.parallel and attention == mlp and "parallel" in self.entry.block
        if layer.parallel and self.entry.name == "falcon":
            yield "attn_norm", mlp, 1.0
            yield "attn_norm_2", None if one_norm else attention, 1.0
        else:
            yield "attn_norm", attention, 1.0
            yield "ffn_norm", None if one_norm else mlp, 1.0
        yield "post_attention_norm", layer.attention_post_norm, self._branch_scale(layer.attention_scale)
        yield "post_ffw_norm", layer.mlp_post_norm, self._branch_scale(layer.mlp_scale)
        yield "attn_output_norm", layer.attention_out_norm, 1.0
        yield "layer_output_norm", layer.mlp_out_norm, 1.0

    # ---------------------------------------------------------------- attention

    def _attention(self, index: int, layer: Layer) -> None:
        attention = layer.attention
        order = _channel_order(attention.rope, self.entry, attention.head_dim)
        query = _reordered(attention.query, attention.num_heads, order)
        key = _reordered(attention.key, attention.num_kv_heads, order)
        default = 1 / math.sqrt(attention.head_dim)
        factor = 1.0 if self.entry.attention_scale else attention.scale / default
        factor = 1.0 if abs(factor - 1) < 1e-6 else factor
        normed = attention.query_norm
        q_factor = factor if normed is None else 1.0
        parts = [(Q, "attn_q", query, q_factor), (K, "attn_k", key, 1.0), (V, "attn_v", attention.value, 1.0)]
        if self.entry.fused_qkv:
            self._fused("attn_qkv", parts, index)
        else:
            for part, name, linear, scale in parts:
                self._linear(name, part, linear, index, scale)
        for name, norm, scale in (("attn_q_norm", normed, factor), ("attn_k_norm", attention.key_norm, 1.0)):
            if norm is not None:
                self._add(f"{name}.weight", "norm", self._head_norm(norm, order, scale, name, attention), layer=index)
        scale = self._branch_scale(layer.attention_scale) if layer.attention_post_norm is None else 1.0
        self._linear("attn_output", O, attention.output, index, scale)

    def _head_norm(self, norm: HeadNorm, order: Tensor | None, scale: float, name: str, attention: Any) -> Piece:
        weight = norm.weight * scale
        heads = attention.num_heads if name == "attn_q_norm" else attention.num_kv_heads
        if order is not None:
            weight = weight.reshape(-1, attention.head_dim)[:, order].reshape(weight.shape)
        if self.entry.head_norm is not None and self.entry.head_norm[1] == "heads" and norm.span == "head":
            weight = weight.expand(heads, -1).contiguous()
        return Piece(literal=weight)

    def _linear(self, name: str, part: str, linear: Linear, index: int, factor: float = 1.0) -> None:
        self._add(f"{name}.weight", name, weight_piece(linear, factor), layer=index, why="a scale behind it")
        bias = bias_piece(linear, factor)
        if bias is None and self.entry.bias(part) == ALWAYS:
            bias = zeros(weight_piece(linear).shape[0])
        if bias is not None:
            self._add(f"{name}.bias", "bias", bias, layer=index)

    def _fused(self, name: str, parts: list[tuple[str, str, Linear, float]], index: int) -> None:
        weights = [weight_piece(linear, factor) for _, _, linear, factor in parts]
        self._add(f"{name}.weight", name, *weights, layer=index, why="the attention's scale")
        needed = any(self.entry.bias(part) == ALWAYS for part, *_ in parts)
        if needed or any(linear.bias is not None for _, _, linear, _ in parts):
            pieces = [
                bias_piece(linear, factor) or zeros(piece.shape[0])
                for (_, _, linear, factor), piece in zip(parts, weights, strict=True)
            ]
            self._add(f"{name}.bias", "bias", *pieces, layer=index)

    # ---------------------------------------------------------------- MLP

    def _mlp(self, index: int, mlp: Mlp, scale: float) -> None:
        if mlp.activation == "gelu" and "gelu" not in " ".join(self.out.notes):
            self.out.notes.append("llama.cpp computes gelu by its tanh approximation: it differs by up to 5e-4")
        if mlp.gate is not None and self.entry.fused_gate_up:
            self._fused("ffn_up", [(GATE, "ffn_gate", mlp.gate, 1.0), (UP, "ffn_up", mlp.up, 1.0)], index)
        else:
            if mlp.gate is not None:
                self._linear("ffn_gate", GATE, mlp.gate, index)
            self._linear("ffn_up", UP, mlp.up, index)
        self._linear("ffn_down", DOWN, mlp.down, index, scale)

    def _moe(self, index: int, moe: Experts, scale: float) -> None:
        self._add("ffn_gate_inp.weight", "router", weight_piece(moe.router), layer=index)
        for name, linear, factor in (
            ("ffn_gate", moe.gate, 1.0),
            ("ffn_up", moe.up, 1.0),
            ("ffn_down", moe.down, scale),
        ):
            self._add(f"{name}_exps.weight", name, weight_piece(linear, factor), layer=index)


def _channel_order(rope: Rope | None, entry: Architecture, head_dim: int) -> Tensor | None:
    """Channels of a head in the order that the architecture pairs them, or None if they are."""
    if rope is None or entry.rope is None or (entry.rope == "interleaved") == rope.interleaved:
        return None
    half = rope.width // 2
    turning = torch.arange(rope.width)
    ordered = turning.view(2, half).T if entry.rope == "interleaved" else turning.view(half, 2).T
    return torch.cat((ordered.reshape(-1), torch.arange(rope.width, head_dim)))


def _reordered(linear: Linear, heads: int, order: Tensor | None) -> Linear:
    if order is None:
        return linear
    rows = torch.arange(heads * order.numel()) if linear.rows is None else linear.rows
    return dataclasses.replace(linear, rows=rows.view(heads, -1)[:, order].reshape(-1))


__all__ = ["FREQUENCIES_KEY", "NEVER", "ROPE_KEY", "Layout", "fx", "lay_out"]
