"""Raising attention that is written out: products, masks and a softmax become one `irc.attention`, or stay."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from irc.core.program import VAL
from tests.passes.attention_blocks import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    MIN,
    SCALE,
    Attend,
    Block,
    assert_same,
    attentions,
    changed,
    describe,
    drop_future,
    eager,
    heads,
    raised,
)


def alibi(block: Block, s: Tensor) -> Tensor:
    distance = torch.arange(s.shape[-1])[None, :] - torch.arange(s.shape[-2])[:, None]
    return distance * block.slopes[:, None, None]


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
