"""Raising attention: every spelling becomes one `irc.attention`; what is not attention is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from irc.core.contract import PassResult
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
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


# ------------------------------------------------------------------ scaled_dot_product_attention


def sdpa(**options: Any) -> Attend:
    def attend(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = options["mask"](q) if "mask" in options else None
        rest = {key: value for key, value in options.items() if key != "mask"}
        return F.scaled_dot_product_attention(*heads(q, k, v), attn_mask=mask, **rest).transpose(1, 2)

    return attend


def merged_heads(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, length = q.shape[:2]
    q, k, v = (t.reshape(batch * HEADS, length, HEAD_DIM) for t in heads(q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def one_head(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.flatten(2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def repeated_by_expand(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def repeat(t: Tensor) -> Tensor:
        batch, num_heads, length, width = t.shape
        t = t[:, :, None].expand(batch, num_heads, HEADS // num_heads, length, width)
        return t.reshape(batch, HEADS, length, width)

    q, k, v = heads(q, k, v)
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True).transpose(1, 2)


def repeated_by_interleave(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=2) for t in (k, v))
    return F.scaled_dot_product_attention(*heads(q, k, v), is_causal=True).transpose(1, 2)


def repeated_by_index(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = heads(q, k, v)
    return F.scaled_dot_product_attention(q, k[:, block.kv_index], v.index_select(1, block.kv_index), is_causal=True)


def grouped(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*heads(q, k, v), is_causal=True, enable_gqa=True)


SDPA: dict[str, tuple[Attend, int, str, int]] = {
    "plain": (sdpa(), HEADS, "full", HEADS),
    "is_causal": (sdpa(is_causal=True), HEADS, "causal", HEADS),
    "scale": (sdpa(is_causal=True, scale=0.2), HEADS, "causal", HEADS),
    "bool mask": (sdpa(mask=causal), HEADS, "causal", HEADS),
    "float mask": (sdpa(mask=lambda q: drop_future(torch.zeros(q.shape[1], q.shape[1]), MIN)), HEADS, "causal", HEADS),
    "window": (sdpa(mask=lambda q: causal(q) & (distance(q) > -3)), HEADS, "sliding(3)", HEADS),
    "window + 1": (sdpa(mask=lambda q: causal(q) & (distance(q) >= -3)), HEADS, "sliding(4)", HEADS),
    "both ways": (sdpa(mask=lambda q: distance(q).abs() < 3), HEADS, "full bias", HEADS),
    "merged heads": (merged_heads, HEADS, "causal", HEADS),
    "one head": (one_head, HEADS, "full", 1),
    "expand": (repeated_by_expand, KV_HEADS, "causal", KV_HEADS),
    "interleave": (repeated_by_interleave, KV_HEADS, "causal", KV_HEADS),
    "index": (repeated_by_index, KV_HEADS, "causal", KV_HEADS),
    "enable_gqa": (grouped, KV_HEADS, "causal", KV_HEADS),
    "one kv head": (sdpa(is_causal=True), 1, "causal", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", SDPA)
def test_sdpa(name: str) -> None:
    attend, kv_heads, kind, found_heads = SDPA[name]
    before, after, result = raised(Block(attend, kv_heads))
    (node,) = attentions(after)
    assert (result.matches, describe(node)) == (1, kind)
    assert node.args[1].meta[VAL].shape[1] == found_heads == node.args[2].meta[VAL].shape[1]
    assert_same(before, after)


# ------------------------------------------------------------------ eager


def alibi(block: Block, s: Tensor) -> Tensor:
    distance = torch.arange(s.shape[-1])[None, :] - torch.arange(s.shape[-2])[:, None]
    return distance * block.slopes[:, None, None]


def changed(change: Callable[[Block, Tensor], Tensor]) -> Attend:
    return lambda block, q, k, v: eager(q, k, v, lambda s: change(block, s))


def with_sinks(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = heads(q, k, v)
    scores = drop_future(q @ k.transpose(2, 3) * SCALE)
    sinks = block.sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    joined = torch.cat([scores, sinks], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return torch.softmax(joined, dim=-1)[..., :-1] @ v


def by_bmm(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, length = q.shape[:2]
    q, k, v = (t.reshape(batch * HEADS, length, HEAD_DIM) for t in heads(q * SCALE, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, HEADS, length, length)
    weights = torch.softmax(drop_future(scores), dim=-1).view(batch * HEADS, length, length)
    return torch.bmm(weights, v).view(batch, HEADS, length, HEAD_DIM).transpose(1, 2)


def by_baddbmm(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, length = q.shape[:2]
    q, k, v = (t.reshape(batch * HEADS, length, HEAD_DIM) for t in heads(q, k, v))
    bias = alibi(block, torch.empty(batch, HEADS, length, length)).expand(batch, -1, -1, -1)
    bias = bias.reshape(batch * HEADS, length, length)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=0.5, alpha=SCALE)
    return torch.bmm(torch.softmax(drop_future(scores), dim=-1), v)


def by_einsum(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(drop_future(scores), dim=-1), v)


def grouped_eager(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=2) for t in (k, v))
    return eager(q, k, v, lambda s: drop_future(s * SCALE))


def from_table(block: Block, s: Tensor) -> Tensor:
    length = s.shape[-1]
    return (s / block.root).masked_fill(block.table[:, :, :length, :length] == 0, -torch.inf)


def where_triangle(block: Block, s: Tensor) -> Tensor:
    return torch.where(torch.ones_like(s[0, 0], dtype=torch.bool).tril(), s, -torch.inf)


def slopes_with_causal(block: Block, s: Tensor) -> Tensor:
    return s * SCALE + drop_future(alibi(block, s), MIN)


EAGER: dict[str, tuple[Attend, int, str, float]] = {
    "bare": (changed(lambda b, s: s), HEADS, "full", 1.0),
    "scaled": (changed(lambda b, s: s * SCALE), HEADS, "full", SCALE),
    "divided": (changed(lambda b, s: s / math.sqrt(HEAD_DIM)), HEADS, "full", SCALE),
    "divided by a buffer": (changed(lambda b, s: s / b.root), HEADS, "full", SCALE),
    "causal": (changed(lambda b, s: drop_future(s * SCALE)), HEADS, "causal", SCALE),
    "causal, then scaled": (changed(lambda b, s: drop_future(s) * SCALE), HEADS, "causal", SCALE),
    "causal, -1e9": (changed(lambda b, s: drop_future(s * SCALE, -1e9)), HEADS, "causal", SCALE),
    "causal, added": (changed(lambda b, s: s * SCALE + drop_future(torch.zeros_like(s), MIN)), HEADS, "causal", SCALE),
    "causal, where": (changed(where_triangle), HEADS, "causal", 1.0),
    "causal, table": (changed(from_table), HEADS, "causal", SCALE),
    "soft-cap": (changed(lambda b, s: drop_future(torch.tanh(s * SCALE / 3.0) * 3.0)), HEADS, "causal softcap", SCALE),
    "f32 softmax": (changed(lambda b, s: (s * SCALE).float()), HEADS, "full", SCALE),
    "slopes": (changed(lambda b, s: drop_future(s * SCALE + alibi(b, s))), HEADS, "causal bias", SCALE),
    "slopes, then scaled": (changed(lambda b, s: drop_future((s + alibi(b, s)) * SCALE)), HEADS, "causal bias", SCALE),
    "slopes with causal": (changed(slopes_with_causal), HEADS, "causal bias", SCALE),
    "sinks": (with_sinks, HEADS, "causal sinks", SCALE),
    "bmm, scaled before": (by_bmm, HEADS, "causal", 1.0),
    "baddbmm": (by_baddbmm, HEADS, "causal bias", SCALE),
    "einsum": (by_einsum, HEADS, "causal", SCALE),
    "grouped": (grouped_eager, KV_HEADS, "causal", SCALE),
    "row maximum": (changed(lambda b, s: s - s.amax(-1, keepdim=True)), HEADS, "full", 1.0),
    "dropout in evaluation": (changed(lambda b, s: F.dropout(s, 0.1, training=False)), HEADS, "full", 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", EAGER)
def test_eager(name: str) -> None:
    attend, kv_heads, kind, scale = EAGER[name]
    before, after, result = raised(Block(attend, kv_heads))
    (node,) = attentions(after)
    assert (result.matches, describe(node)) == (1, kind)
    assert node.kwargs["scale"] == pytest.approx(scale)
    assert node.args[1].meta[VAL].shape[1] == kv_heads
    assert not any("softmax" in str(n.target) for n in after.operations())
    assert_same(before, after)


# ------------------------------------------------------------------ left alone


def weights_too(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = heads(q, k, v)
    weights = torch.softmax(q @ k.transpose(2, 3), dim=-1)
    return weights @ v + weights.sum(-1, keepdim=True)


def over_queries(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = heads(q, k, v)
    return torch.softmax(q @ k.transpose(2, 3), dim=-2) @ v


def other_heads(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat(1, 1, HEADS // KV_HEADS, 1) for t in (k, v))  # heads 0 1 0 1, not 0 0 1 1
    return F.scaled_dot_product_attention(*heads(q, k, v))


def drops_a_column(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = heads(q, k, v)
    padded = torch.cat([k, k[:, :, :1]], dim=2)
    return torch.softmax(q @ padded.transpose(2, 3), dim=-1)[..., :-1] @ v


LEFT_ALONE: dict[str, tuple[Attend, str]] = {
    "weights used": (weights_too, "used elsewhere"),
    "wrong axis": (over_queries, "not over the keys"),
    "trained scale": (changed(lambda b, s: s * b.trained_scale), "scaled by a tensor"),
    "scale of each head": (changed(lambda b, s: s * b.head_scale), "scaled by a tensor"),
    "weak mask": (changed(lambda b, s: drop_future(s, -50.0)), "does not surely give them weight 0"),
    "mask before soft-cap": (changed(lambda b, s: torch.tanh(drop_future(s, MIN))), "before the soft-cap"),
    "odd function": (changed(lambda b, s: torch.relu(s)), "pass through relu"),
    "dropped column": (drops_a_column, "no sink logits"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str) -> None:
    attend, reason = LEFT_ALONE[name]
    before, after, result = raised(Block(attend))
    assert (result.matches, attentions(after), result.modified) == (0, [], False)
    (skip,) = result.skips
    assert reason in skip.reason
    assert [n.name for n in after.graph.nodes] == [n.name for n in before.graph.nodes]


def test_heads_repeated_in_another_order_are_not_grouped() -> None:
    before, after, _ = raised(Block(other_heads, KV_HEADS))
    (node,) = attentions(after)
    assert node.args[1].meta[VAL].shape[1] == HEADS
    assert_same(before, after)


def test_router_is_no_candidate() -> None:
    def attend(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q.flatten(2), dim=-1).topk(2).values

    _, _, result = raised(Block(attend))
    assert (result.matches, list(result.skips)) == (0, [])


# ------------------------------------------------------------------ masks that read inputs


class Padded(nn.Module):
    """Causal and padding masks joined in several ways."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.block, self.join = Block(self.attend), join

    def attend(self, block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep, padding = causal(q), self.padding.bool()[:, None, None, :]
        if self.join == "and":
            return F.scaled_dot_product_attention(*heads(q, k, v), attn_mask=keep & padding)
        if self.join == "only":
            return F.scaled_dot_product_attention(*heads(q, k, v), attn_mask=padding.expand(-1, -1, q.shape[1], -1))
        if self.join == "where":
            bias = torch.where(keep & padding, 0.0, MIN)
        else:
            bias = torch.where(keep, 0.0, MIN) + torch.where(padding, 0.0, MIN)
        return eager(q, k, v, lambda s: s * SCALE + bias)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        self.padding = padding
        out = self.block(x)
        del self.padding
        return out


def left_padding(batch: int, length: int) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[:, : length // 3] = 0  # on the left: the first rows see no key at all
    return mask


@pytest.mark.parametrize(
    ("join", "kind", "rows"),
    [("and", "causal bias", 1), ("only", "full bias", 1), ("where", "full bias", None), ("sum", "full bias", None)],
)
def test_padding_stays_a_bias(join: str, kind: str, rows: int | None) -> None:
    """A finite fill gives rows of padding some weights, so only an exact causal mask is taken out of it."""
    names = ({0: "B", 1: "S"}, {0: "B", 1: "S"})
    before, after, _ = raised(Padded(join), left_padding(3, 7), names=names)
    (node,) = attentions(after)
    assert describe(node) == kind
    bias = node.kwargs["bias"]
    assert isinstance(bias, fx.Node)
    if rows is not None:
        assert bias.meta[VAL].shape[-2] == rows
    assert_same(before, after, left_padding)


class CrossAttention(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x[:, None], y[:, None], y[:, None], is_causal=True)[:, 0]


def test_top_left_causal_mask_is_no_kind_when_lengths_differ() -> None:
    names = ({0: "B", 1: "S"}, {0: "B", 1: "T"})
    before, after, _ = raised(CrossAttention(), torch.randn(3, 5, WIDTH), names=names)
    (node,) = attentions(after)
    assert describe(node) == "full bias"
    assert_same(before, after, lambda batch, length: torch.randn(batch, length + 2, WIDTH))


# ------------------------------------------------------------------ the pass


def test_idempotent_and_statistics() -> None:
    _, after, result = raised(Block(sdpa(is_causal=True)))
    assert result.statistics == {"causal": 1}
    again = run_pass(RaiseAttention(), after)
    assert (again.matches, again.modified) == (0, False)


def test_mask_graph_is_gone() -> None:
    _, after, _ = raised(Block(sdpa(mask=causal)))
    assert not any("arange" in str(node.target) for node in after.operations())


def test_half_precision() -> None:
    x = torch.randn(3, 7, WIDTH).to(torch.bfloat16)
    module = Block(changed(lambda b, s: drop_future((s * SCALE).float()).to(s.dtype))).to(torch.bfloat16)
    before = run_pass(DropNoise(), capture(module, (x,), dynamic=({0: "B", 1: "S"},), canonicalize=False)).program
    after = run_pass(RaiseAttention(), before).program
    (node,) = attentions(after)
    assert describe(node) == "causal"
    assert after.run(x)[0].dtype == torch.bfloat16
    torch.testing.assert_close(after.run(x)[0], before.run(x)[0], rtol=2e-2, atol=2e-2)
