"""Attention written in many ways: a block around it, the pass run over it, and the same numbers after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from irc.core.contract import PassResult
from irc.core.ops.registry import is_irc_op
from irc.core.program import Program
from irc.frontend import capture
from irc.passes.canonicalize.drop_noise import DropNoise
from irc.passes.canonicalize.raise_attention import RaiseAttention
from tests.passes.running import run_pass

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 24, 4, 2, 6
SHAPES = ((3, 7), (1, 1), (2, 13))
MIN = torch.finfo(torch.float32).min
SCALE = HEAD_DIM**-0.5

Attend = Callable[["Block", Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Projections, then `attend` on q [B, S, H, D] and k, v [B, S, Hkv, D], giving [B, S, ·]."""

    def __init__(self, attend: Attend, kv_heads: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.kv_heads = attend, kv_heads
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.k = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.v = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.trained_scale = nn.Parameter(torch.tensor(0.7))
        self.head_scale = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.register_buffer("root", torch.tensor(HEAD_DIM**0.5))
        self.register_buffer("table", torch.tril(torch.ones(1, 1, 16, 16)))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, HEADS + 1))
        self.register_buffer("kv_index", torch.arange(HEADS) // (HEADS // kv_heads))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, HEAD_DIM)
        k = self.k(x).view(batch, length, self.kv_heads, HEAD_DIM)
        v = self.v(x).view(batch, length, self.kv_heads, HEAD_DIM)
        return self.attend(self, q, k, v)


def heads(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def distance(q: Tensor) -> Tensor:
    """Key position - query position."""
    p = torch.arange(q.shape[1])
    return p[None, :] - p[:, None]


def causal(q: Tensor) -> Tensor:
    return distance(q) <= 0


def eager(q: Tensor, k: Tensor, v: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """softmax(change(q·kᵀ))·v on [B, S, H, D] inputs."""
    q, k, v = heads(q, k, v)
    return (torch.softmax(change(q @ k.transpose(2, 3)), dim=-1) @ v).transpose(1, 2)


def raised(module: nn.Module, *more: Any, names: Any = ({0: "B", 1: "S"},)) -> tuple[Program, Program, PassResult]:
    x = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    before = capture(module, (x, *more), dynamic=names, canonicalize=False)
    before = run_pass(DropNoise(), before).program
    result = run_pass(RaiseAttention(), before)
    return before, result.program, result


def attentions(program: Program) -> list[fx.Node]:
    return [node for node in program.operations() if is_irc_op(node.target, "attention")]


def assert_same(before: Program, after: Program, *more: Callable[[int, int], Tensor]) -> None:
    generator = torch.Generator().manual_seed(2)
    for batch, length in SHAPES:
        inputs = [torch.randn(batch, length, WIDTH, generator=generator), *(make(batch, length) for make in more)]
        for old, new in zip(before.run(*inputs), after.run(*inputs), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)


def drop_future(s: Tensor, fill: float = -torch.inf) -> Tensor:
    keep = torch.arange(s.shape[-1])[None, :] <= torch.arange(s.shape[-2])[:, None]
    return s.masked_fill(~keep, fill)


def describe(node: fx.Node) -> str:
    """The kind of an attention in one word, for the tables below."""
    options = node.kwargs
    text = str(options.get("mask", "full"))
    if options.get("window") is not None:
        text += f"({options['window']})"
    for option in ("bias", "sinks", "softcap"):
        if options.get(option) is not None:
            text += f" {option}"
    return text


def changed(change: Callable[[Block, Tensor], Tensor]) -> Attend:
    return lambda block, q, k, v: eager(q, k, v, lambda s: change(block, s))
