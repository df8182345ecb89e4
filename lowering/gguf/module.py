"""One plain PyTorch module for every architecture of the table, over a file's tensors as they are stored.

It is captured like any other module; quantized weights become `irc.dequantize` in front of ordinary operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irc.lowering.gguf.architectures import Architecture

Activation = str


@dataclass(frozen=True)
class LayerSettings:
    """Numbers of one layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    rope: int | None  # which of the frequencies; None: no rotation


@dataclass(frozen=True)
class Settings:
    """Numbers of a model, out of its metadata."""

    layers: list[LayerSettings]
    eps: float
    interleaved: bool
    magnitude: float = 1.0
    parallel: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logit_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    num_used_experts: int = 0
    dtype: torch.dtype = torch.float32


class Leaf(nn.Module):
    """A tensor of the file: floats, or blocks that are dequantized where they are used."""

    def __init__(self, data: Tensor, kind: str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.dtype = kind, dtype
        if kind is None:
            self.weight: Tensor = nn.Parameter(data.to(dtype), requires_grad=False)
        else:
            self.register_buffer("weight", data)

    def forward(self) -> Tensor:
        if self.kind is None:
            return self.weight
        return torch.ops.irc.dequantize(self.weight, None, None, format=self.kind, dtype=self.dtype)


class Part(nn.Module):
    """The weight and bias of one name: `blk.0.attn_q`."""

    def __init__(self, weight: Leaf | None, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored = weight
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def numbers(self) -> Tensor:
        assert self.stored is not None
        return self.stored()

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.numbers(), self.bias)


Parts = dict[str, Part]


class GgufModel(nn.Module):
    """Token ids i64[B, S] → logits [B, S, V], or hidden states [B, S, E] for encoders."""

    def __init__(self, architecture: Architecture, settings: Settings, parts: Parts, frequencies: list[Tensor]) -> None:
        super().__init__()
        self.architecture, self.settings = architecture, settings
        self.parts = nn.ModuleDict({name.replace(".", "/"): part for name, part in parts.items()})
        for index, table in enumerate(frequencies):
            self.register_buffer(f"frequencies_{index}", table.float())

    def part(self, name: str) -> Part | None:
        key = name.replace(".", "/")
        found = self.parts[key] if key in self.parts else None  # noqa: SIM401 - a ModuleDict has no get
        assert found is None or isinstance(found, Part)
        return found

    def need(self, name: str) -> Part:
        found = self.part(name)
        assert found is not None, name
        return found

    def forward(self, input_ids: Tensor) -> Tensor:
        settings, entry = self.settings, self.architecture
        x = F.embedding(input_ids, self.need("token_embd").numbers())
        if settings.embedding_scale != 1:
            x = x * settings.embedding_scale
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        types, table = self.part("token_types"), self.part("position_embd")
        if types is not None:
            x = x + types.numbers()[0]
        if table is not None:
            x = x + F.embedding(positions.unsqueeze(0), table.numbers())
        x = self.norm("token_embd_norm", x)
        tables = self.tables(positions, x.dtype)
        for index, layer in enumerate(settings.layers):
            x = self.layer(index, layer, x, tables)
        x = self.norm("output_norm", x)
        if not entry.causal:
            return x
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        settings = self.settings
        own = self.part("output")
        if own is not None and own.stored is not None:
            logits = own.linear(x)
        else:
            logits = F.linear(x, self.need("token_embd").numbers(), None if own is None else own.bias)
        if settings.logit_scale != 1:
            logits = logits * settings.logit_scale
        if settings.logit_softcap is not None:
            logits = torch.tanh(logits / settings.logit_softcap) * settings.logit_softcap
        return logits

    def tables(self, positions: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """cos and sin [1, 1, S, R] of each set of frequencies."""
        found = []
        index = 0
        while hasattr(self, f"frequencies_{index}"):
            angles = positions.float().unsqueeze(-1) * getattr(self, f"frequencies_{index}")
            cos, sin = angles.cos(), angles.sin()
            if self.settings.magnitude != 1:
                cos, sin = cos * self.settings.magnitude, sin * self.settings.magnitude
            found.append((cos.to(dtype)[None, None], sin.to(dtype)[None, None]))
            index += 1
        return found

    def norm(self, name: str, x: Tensor) -> Tensor:
        part = self.part(name)
        if part is None:
            return x
        if self.architecture.norm == "rms":
            return torch.ops.irc.rms_norm(x, part.numbers(), self.settings.eps)
        return F.layer_norm(x, x.shape[-1:], part.numbers(), part.bias, self.settings.eps)

    # ---------------------------------------------------------------- layers

    def layer(self, index: int, layer: LayerSettings, x: Tensor, tables: list[tuple[Tensor, Tensor]]) -> Tensor:
        name = f"blk.{index}"
        scale = self.settings.residual_scale
        first = self.norm(f"{name}.attn_norm", x)
        second = self.norm(f"{name}.attn_norm_2", x) if self.part(f"{name}.attn_norm_2") is not None else first
        attended = self.norm(f"{name}.post_attention_norm", self.attention(name, layer, second, tables))
        attended = attended if scale == 1 else attended * scale
        if self.settings.parallel:
            own = self.part(f"{name}.ffn_norm")
            read = first if own is None else self.norm(f"{name}.ffn_norm", x)
            return x + attended + self.mlp(name, read)
        x = self.norm(f"{name}.attn_output_norm", x + attended)
        given = self.norm(f"{name}.post_ffw_norm", self.mlp(name, self.norm(f"{name}.ffn_norm", x)))
        given = given if scale == 1 else given * scale
        return self.norm(f"{name}.layer_output_norm", x + given)

    def attention(self, name: str, layer: LayerSettings, x: Tensor, tables: list[tuple[Tensor, Tensor]]) -> Tensor:
        query = self.heads(f"{name}.attn_q", x, layer.num_heads, layer.head_dim)
        key = self.heads(f"{name}.attn_k", x, layer.num_kv_heads, layer.head_dim)
        value = (
            self.need(f"{name}.attn_v").linear(x).unflatten(-1, (layer.num_kv_heads, layer.head_dim)).transpose(1, 2)
        )
        if layer.rope is not None:
            cos, sin = tables[layer.rope]
            query, key = (
                torch.ops.irc.rope(part, cos, sin, interleaved=self.settings.interleaved) for part in (query, key)
            )
        scale = self.settings.attention_scale or 1 / math.sqrt(layer.head_dim)
        mask = "full" if not self.architecture.causal else "causal" if layer.window is None else "sliding"
        out = torch.ops.irc.attention(
            query, key, value, mask=mask, window=layer.window, scale=scale, softcap=self.settings.attention_softcap
        )
        return self.need(f"{name}.attn_output").linear(out.transpose(1, 2).flatten(2))

    def heads(self, name: str, x: Tensor, count: int, width: int) -> Tensor:
        """[B, H, S, D], normalized as the architecture does."""
        flat, norm = self.need(name).linear(x), self.part(f"{name}_norm")
        if norm is None or self.architecture.head_norm is None:
            return flat.unflatten(-1, (count, width)).transpose(1, 2)
        kind, span = self.architecture.head_norm
        if span == "all":
            return (
                torch.ops.irc.rms_norm(flat, norm.numbers(), self.settings.eps)
                .unflatten(-1, (count, width))
                .transpose(1, 2)
            )
        split = flat.unflatten(-1, (count, width))
        if kind == "rms":
            split = torch.ops.irc.rms_norm(split, norm.numbers(), self.settings.eps)
        else:
            split = F.layer_norm(split, (width,), None, None, self.settings.eps) * norm.numbers()
        return split.transpose(1, 2)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        if self.part(f"{name}.ffn_gate_inp") is not None:
            return self.experts(name, x)
        activation = "gelu_tanh" if self.architecture.activation == "gelu" else self.architecture.activation
        up = self.need(f"{name}.ffn_up").linear(x)
        if self.architecture.gated:
            hidden = torch.ops.irc.glu(self.need(f"{name}.ffn_gate").linear(x), up, activation=activation)
        else:
            hidden = F.gelu(up, approximate="tanh") if activation == "gelu_tanh" else F.relu(up)
        return self.need(f"{name}.ffn_down").linear(hidden)

    def experts(self, name: str, x: Tensor) -> Tensor:
        """Softmax over all experts, the likeliest of them, weights to add up to 1 where the architecture says so."""
        num_used = self.settings.num_used_experts
        tokens = x.flatten(0, 1)
        scores = self.need(f"{name}.ffn_gate_inp").linear(tokens).softmax(-1)
        weights, chosen = scores.topk(num_used)
        if self.architecture.experts_normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        chosen = chosen.reshape(-1)
        rows = tokens.repeat_interleave(num_used, 0).unsqueeze(-1)
        gate, up, down = (self.need(f"{name}.ffn_{part}_exps").numbers()[chosen] for part in ("gate", "up", "down"))
        hidden = torch.ops.irc.glu(
            torch.bmm(gate, rows).squeeze(-1), torch.bmm(up, rows).squeeze(-1), activation="silu"
        )
        out = torch.bmm(down, hidden.unsqueeze(-1)).squeeze(-1) * weights.reshape(-1).unsqueeze(-1)
        return out.reshape(tokens.shape[0], num_used, -1).sum(1).reshape(x.shape)
