"""Small hand-written transformers with names that no library uses: what a program is must be read off its graph."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irc.core.program import Program
from irc.frontend import capture

VOCABULARY, WIDTH, LENGTH = 64, 64, 9


class Scale(nn.Module):
    """RMSNorm, called something else."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


class Wobble(nn.Module):
    """A block of a Llama-like decoder: one merged projection in the order v, q, k; grouped heads; a gated MLP."""

    def __init__(self, hidden: int, *, out_bias: bool = False, late_norm: bool = False) -> None:
        super().__init__()
        self.zip, self.zap = Scale(WIDTH), Scale(WIDTH)
        self.everything = nn.Linear(WIDTH, 32 + 64 + 32, bias=False)
        self.back = nn.Linear(64, WIDTH, bias=out_bias)
        self.both = nn.Linear(WIDTH, 2 * hidden, bias=False)
        self.home = nn.Linear(hidden, WIDTH, bias=False)
        self.late = Scale(WIDTH) if late_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        value, query, key = self.everything(self.zip(x)).split([32, 64, 32], -1)
        query, key, value = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in (query, key, value))
        query, key = turn(query, cos, sin), turn(key, cos, sin)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.back(out.transpose(1, 2).flatten(2))
        up, gate = self.both(self.zap(x)).chunk(2, -1)
        given = self.home(F.silu(gate) * up)
        return x + (given if self.late is None else self.late(given))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


class Oddity(nn.Module):
    """The decoder around those blocks."""

    def __init__(self, widths: tuple[int, ...] = (96, 96), **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.steps = nn.ModuleList(Wobble(width, **options) for width in widths)
        self.last = Scale(WIDTH)
        self.speak = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("speeds", 5000.0 ** (-torch.arange(8) / 8))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.speeds
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for step in self.steps:
            x = step(x, cos, sin)
        return self.speak(self.last(x))


class Plain(nn.Module):
    """A GPT-2-like decoder: looked-up positions, LayerNorm, GELU, tied head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(32, WIDTH)
        self.c = nn.ModuleList(
            nn.ModuleDict(
                {
                    "n": nn.LayerNorm(WIDTH), "m": nn.LayerNorm(WIDTH), "q": nn.Linear(WIDTH, WIDTH),
                    "k": nn.Linear(WIDTH, WIDTH, bias=False), "v": nn.Linear(WIDTH, WIDTH),
                    "o": nn.Linear(WIDTH, WIDTH), "u": nn.Linear(WIDTH, 128), "d": nn.Linear(128, WIDTH),
                }
            )
            for _ in range(2)
        )  # fmt: skip
        self.z = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.a(tokens) + self.b(torch.arange(tokens.shape[1], device=tokens.device))
        for part in self.c:
            y = part["n"](x)
            heads = [part[name](y).unflatten(-1, (4, 16)).transpose(1, 2) for name in "qkv"]
            x = x + part["o"](F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
            x = x + part["d"](F.gelu(part["u"](part["m"](x)), approximate="tanh"))
        return F.linear(self.z(x), self.a.weight)


def half(model: Oddity) -> Oddity:
    """Weights, and rotary tables once they are made, in bf16."""
    speeds = model.speeds
    model.to(torch.bfloat16).speeds = speeds.float()
    return model


MODELS = {
    "half": lambda: half(Oddity()),
    "odd": lambda: Oddity(),
    "pruned": lambda: Oddity((96, 64)),
    "late": lambda: Oddity(late_norm=True),
    "biased": lambda: Oddity(out_bias=True),
    "plain": Plain,
    "deep": lambda: Oddity((256, 256)),
}


def ids(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def program(name: str) -> Program:
    """The captured program of that name; shared, so copy it before changing it."""
    model = MODELS[name]().eval().requires_grad_(False)
    return capture(model, (ids(),), dynamic=({0: "B", 1: "S"},), name=name)


__all__ = ["MODELS", "ids", "program"]
