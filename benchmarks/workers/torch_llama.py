"""A Llama in plain PyTorch with a static cache: what a careful user of PyTorch writes to decode fast on a GPU.

Weights of queries, keys and values, and of gate and up, are one matrix each; attention is PyTorch's, over the whole
cache with a mask; positions are a tensor, so that one compiled graph serves every step. Weights and caches are
parameters and buffers, which torch.compile's CUDA graphs use where they lie.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module, heads: int, kv_heads: int, width: int, eps: float, length: int) -> None:
        super().__init__()
        own, mlp = layer.self_attn, layer.mlp
        self.heads, self.kv_heads, self.width, self.eps = heads, kv_heads, width, eps
        self.norm1, self.norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = nn.Parameter(torch.cat([p.weight.detach() for p in (own.q_proj, own.k_proj, own.v_proj)]))
        self.out, self.down = own.o_proj.weight, mlp.down_proj.weight
        self.gate_up = nn.Parameter(torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()]))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, kv_heads, length, width).to(self.out))

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [1, S, D]; positions: [S]; mask: [S, L]; cos, sin: [S, width]."""
        count, kv = x.shape[1], self.kv_heads * self.width
        normed = F.rms_norm(x, (x.shape[-1],), self.norm1, self.eps)
        split = F.linear(normed, self.qkv).split([self.heads * self.width, kv, kv], -1)
        q, k, v = (t.view(1, count, -1, self.width).transpose(1, 2) for t in split)
        self.keys.index_copy_(2, positions, _turned(k, cos, sin))
        self.values.index_copy_(2, positions, v)
        y = F.scaled_dot_product_attention(
            _turned(q, cos, sin), self.keys, self.values, attn_mask=mask, enable_gqa=self.heads != self.kv_heads
        )
        x = x + F.linear(y.transpose(1, 2).reshape(1, count, -1), self.out)
        normed = F.rms_norm(x, (x.shape[-1],), self.norm2, self.eps)
        gate, up = F.linear(normed, self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class TorchLlama(nn.Module):
    """The model of a transformers' Llama, for one sequence.

    Args:
        model: a LlamaForCausalLM, whose weights are shared.
        length: of the cache.
    """

    def __init__(self, model: nn.Module, length: int, device: torch.device) -> None:
        super().__init__()
        config, model = model.config, model.to(device)
        heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.embed, self.head = model.model.embed_tokens.weight, model.lm_head.weight
        self.norm, self.eps = model.model.norm.weight, config.rms_norm_eps
        self.layers = nn.ModuleList(
            _Layer(layer, heads, config.num_key_value_heads, width, self.eps, length) for layer in model.model.layers
        )
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool, device=device).tril())
        steps = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
        angles = torch.arange(length, device=device)[:, None] * steps
        for name, function in (("cos", torch.cos), ("sin", torch.sin)):
            self.register_buffer(name, torch.cat([function(angles)] * 2, -1).to(self.embed.dtype))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [1, 1, V] of the last token. tokens: [1, S]; positions: [S]."""
        x = F.embedding(tokens, self.embed)
        for layer in self.layers:
            x = layer(x, positions, self.mask[positions], self.cos[positions], self.sin[positions])
        return F.linear(F.rms_norm(x[:, -1:], (x.shape[-1],), self.norm, self.eps), self.head)
