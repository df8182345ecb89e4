"""Raising attention: every call of scaled_dot_product_attention becomes one `irc.attention`, whatever its mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from irc.core.program import VAL
from irc.frontend import capture
from irc.passes.canonicalize.drop_noise import DropNoise
from irc.passes.canonicalize.raise_attention import RaiseAttention
from tests.passes.attention_blocks import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    MIN,
    SCALE,
    WIDTH,
    Attend,
    Block,
    assert_same,
    attentions,
    causal,
    changed,
    describe,
    distance,
    drop_future,
    eager,
    heads,
    raised,
)
from tests.passes.running import run_pass

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
