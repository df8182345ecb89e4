"""A small Llama-style decoder in plain PyTorch: the model that ships with the project.

RMSNorm before each block, rotary positions (half-split), full multi-head attention,
SwiGLU, tied embedding and head. Nothing in irc knows this class: it is ordinary user code.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn


@dataclass(frozen=True)
class TinyPyConfig:
    """Sizes of the model. `hidden_size` must be a multiple of `num_heads`."""

    vocab_size: int = 2048
    hidden_size: int = 256
    num_layers: int = 5
    num_heads: int = 8
    intermediate_size: int = 512
    max_positions: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight, in f32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, config: TinyPyConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TinyPyConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: TinyPyConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class TinyPy(nn.Module):
    """Token ids i64[B, S] → logits f32[B, S, V]."""

    inv_freq: Tensor

    def __init__(self, config: TinyPyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.embed.weight
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        self.register_buffer("inv_freq", config.rope_theta**-exponents, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = torch.outer(positions.float(), self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


def model_dir(which: str = "tinypy") -> Path:
    """Folder of a shipped checkpoint: `tinypy` (the demo model) or `tinypy-draft`."""
    folder = Path(str(files("irc.demo"))) / "model" / which
    if not (folder / "config.json").is_file():
        known = sorted(p.name for p in folder.parent.iterdir() if (p / "config.json").is_file())
        raise FileNotFoundError(f"no shipped model {which!r}; known: {', '.join(known)}")
    return folder


def save_config(config: TinyPyConfig, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")


def load_tokenizer() -> Tokenizer:
    """The byte-level BPE tokenizer of the shipped models."""
    return Tokenizer.from_file(str(model_dir("tinypy") / "tokenizer.json"))


def load_model(which: str = "tinypy", *, dtype: torch.dtype = torch.float32) -> TinyPy:
    """The shipped model, in evaluation mode; weights are stored in bf16 and widened to `dtype`."""
    folder = model_dir(which)
    config = TinyPyConfig(**json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        model = TinyPy(config)
    fresh_buffers = TinyPy(TinyPyConfig(**{**asdict(config), "num_layers": 0, "vocab_size": 1})).inv_freq
    model.inv_freq = fresh_buffers
    state = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    state["lm_head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    model.lm_head.weight = model.embed.weight
    return model.requires_grad_(True).eval()
