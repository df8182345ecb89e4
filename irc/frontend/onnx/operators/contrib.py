"""ONNX Runtime's own operators, as irc, onnxruntime-genai's builder and ONNX Runtime's optimizer write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irc.core.errors import CaptureError
from irc.core.formats import QuantFormat
from irc.frontend.onnx.calls import Call, operator

_DOMAIN = "com.microsoft"


@operator("SkipSimplifiedLayerNormalization", domain=_DOMAIN)
def skip_simplified_norm(call: Call) -> tuple[Any, ...]:
    """(norm of the sum, -, -, the sum)."""
    total = _sum(call, 3)
    return torch.ops.irc.rms_norm(total, call.tensor(2), call.attribute("epsilon", 1e-5)), None, None, total


@operator("SkipLayerNormalization", domain=_DOMAIN)
def skip_norm(call: Call) -> tuple[Any, ...]:
    """The same by mean and variance."""
    total = _sum(call, 4)
    gamma = call.tensor(2)
    normed = F.layer_norm(total, list(gamma.shape), gamma, call.maybe(3), call.attribute("epsilon", 1e-12))
    return normed, None, None, total


def _sum(call: Call, bias: int) -> Tensor:
    total = call.tensor(0) + call.tensor(1)
    return total + call.tensor(bias) if call.has(bias) else total


@operator("RotaryEmbedding", domain=_DOMAIN)
def rotary_embedding(call: Call) -> Tensor:
    """x [B, S, H·D] or [B, H, S, D], positions [B, S] or an offset [1], tables [L, R]."""
    x, positions, cos, sin = (call.tensor(index) for index in range(4))
    width, heads = int(call.attribute("rotary_embedding_dim", 0)), int(call.attribute("num_heads", 0))
    if call.attribute("is_packed_batching", 0) or call.attribute("scale", 1.0) != 1.0:
        raise CaptureError(f"RotaryEmbedding {call.name!r}: packed batches and scales are not read")
    if width and 2 * cos.shape[-1] != width:
        raise CaptureError(
            f"RotaryEmbedding {call.name!r}: tables of {cos.shape[-1]} angles for {width} channels are not read"
        )
    flat = x.dim() == 3
    if flat:
        x = x.unflatten(2, (heads, -1) if heads else (-1, 2 * int(cos.shape[-1]))).transpose(1, 2)
    if positions.dim() == 1:
        positions = (positions + torch.arange(x.shape[2])).expand(x.shape[0], -1)
    turned = _turn(x, positions, cos, sin, call.attribute("interleaved", 0))
    return turned.transpose(1, 2).flatten(2) if flat else turned


def _turn(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: int) -> Tensor:
    angles = (F.embedding(positions.long(), table).unsqueeze(1) for table in (cos, sin))
    return torch.ops.irc.rope(x, *angles, interleaved=bool(interleaved))


_GQA_INPUTS = {12: "k_scale", 13: "v_scale"}  # quantized caches


@operator("GroupQueryAttention", domain=_DOMAIN)
def group_query_attention(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(attention [B, S, H·D], keys, values): new keys and values are written behind the past of each row.

    A row has `seqlens_k` + 1 tokens in the end. The past is a buffer that has room for them, or, where the result is
    declared to be longer, grows by the new ones.
    """
    heads, kv_heads = int(call.attribute("num_heads")), int(call.attribute("kv_num_heads"))
    unread = [name for index, name in _GQA_INPUTS.items() if call.has(index)]
    if unread or not (call.has(3) and call.has(4)):
        what = f"{', '.join(unread)} are not read" if unread else "it has no past keys and values"
        raise CaptureError(f"GroupQueryAttention {call.name!r}: {what}")
    query, key, value = _heads(call, heads, kv_heads)
    positions = _positions(call, query)
    if call.attribute("do_rotary", 0):
        where = call.tensor(9) if call.has(9) else positions
        tables = (call.tensor(7), call.tensor(8), call.attribute("rotary_interleaved", 0))
        query, key = (_turn(x, where, *tables) for x in (query, key))
    past = [call.tensor(3), call.tensor(4)]
    if call.attribute("irc_grows", False):
        past = [torch.cat((old, torch.zeros_like(new)), 2) for old, new in zip(past, (key, value), strict=True)]
    keys, values = (torch.ops.irc.cache_write(old, new, positions) for old, new in zip(past, (key, value), strict=True))
    window = int(call.attribute("local_window_size", -1))
    sinks = call.maybe(11)
    if sinks is None and call.attribute("smooth_softmax", 0) == 1:
        sinks = torch.zeros(heads)
    out = torch.ops.irc.attention(
        query, keys, values, bias=call.maybe(10), positions=positions, sinks=sinks,
        mask="sliding" if window > 0 else "causal", window=window if window > 0 else None,
        scale=call.attribute("scale", 0.0) or query.shape[-1] ** -0.5, softcap=call.attribute("softcap", 0.0) or None,
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2), keys, values


def _heads(call: Call, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, S, D], out of three inputs or one."""
    query = call.tensor(0)
    if call.has(1):
        parts = (query, call.tensor(1), call.tensor(2))
    else:
        width = query.shape[-1] // (heads + 2 * kv_heads)
        parts = query.split([heads * width, kv_heads * width, kv_heads * width], -1)
    counts = (heads, kv_heads, kv_heads)
    query, key, value = (
        part.unflatten(2, (count, -1)).transpose(1, 2) for part, count in zip(parts, counts, strict=True)
    )
    return query, key, value


def _positions(call: Call, query: Tensor) -> Tensor:
    """Of each token: rows end at `seqlens_k`, after as many tokens as `query_seqlens` says (or all)."""
    last = call.tensor(5).reshape(-1).long()
    count: Any = call.tensor(16).reshape(-1).long() if call.has(16) else query.shape[2]
    return (last + 1 - count).unsqueeze(1) + torch.arange(query.shape[2])


@operator("GatherBlockQuantized", domain=_DOMAIN)
def gather_block_quantized(call: Call) -> Tensor:
    """Rows of a table of integers in blocks."""
    table, ids, scales, zeros = call.tensor(0), call.tensor(1), call.tensor(2), call.maybe(3)
    bits, block = int(call.attribute("bits", 4)), int(call.attribute("block_size", 128))
    axes = (call.attribute("gather_axis", 0), call.attribute("quantize_axis", 1) % 2)
    if table.dim() != 2 or axes != (0, 1) or table.dtype != torch.uint8 or bits not in (4, 8):
        raise CaptureError(f"GatherBlockQuantized {call.name!r}: only rows of a matrix in blocks of bytes are read")
    return F.embedding(ids.long(), blocks(table, scales, zeros, bits, block))


def blocks(stored: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int) -> Tensor:
    """irc::dequantize of bytes u8[N, K · bits / 8], scales [N, K / block], zero points packed in rows.

    Without zero points the integers are centred: then the format is the symmetric one, over the same integers.
    """
    rows, count = scales.shape
    if zeros is None:
        form = QuantFormat(bits, group_size=block)
        stored = stored if bits == 4 else (stored.to(torch.int16) - 128).to(torch.int8)
        return torch.ops.irc.dequantize(stored, scales, None, format=str(form))
    if bits == 4:
        packed = zeros.reshape(rows, -1)
        zeros = torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :count]
    form = QuantFormat(bits, group_size=block, symmetric=False, signed=False)
    return torch.ops.irc.dequantize(stored, scales, zeros.reshape(rows, count).contiguous(), format=str(form))
