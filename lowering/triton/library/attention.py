"""Attention kernels: `attend`, for many and few queries, contiguous and paged, and `combine` for keys in several parts.

A program of `attend` has a tile of query rows of one key-value head (see `online_softmax`) and one part of the keys
that the tile sees. With SPLIT (Flash-Decoding) it leaves its maximum, sum and weighted values in scratch, and
`combine` merges the parts of a row, where sinks come in, too. What a part gets is decided in the kernel, by positions,
so a long cache that is hardly filled still gives every program the same share.

Flat tokens over pages: tokens are grouped into tiles of BM // GROUP, and a run of tokens of one sequence within a tile
is worked on together. Tile i has a program for the run that starts with it; runs that start within a tile are shared
by `extra` programs, which look for theirs. A program without work is not free: it waits for its multiprocessor's
shared memory, and one for each token takes longer than the products of a prompt. Where `extra` is None, each token has
a program of its own. So the launch depends on sizes only, never on what the sequences are.

Scratch, in f32: weighted values [tokens, heads, splits, VALUE_WIDTH], then (maximum, sum) [tokens, heads, splits, 2].
Sources: Dao 2023, https://arxiv.org/abs/2307.08691; Dao et al. 2023, Flash-Decoding; Kwon et al. 2023 (PagedAttention),
https://arxiv.org/abs/2309.06180.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from irc.lowering.triton.library.online_softmax import LOG2E, key_ranges, load_rows, sweep


@triton.jit
def heavy_first(program, tiles, heads, section):
    """(tile, head) of a program: late tiles, which see most keys, first, within sections of heads that fit the L2."""
    part = program // (tiles * section)
    rest = program % (tiles * section)
    heads_here = tl.minimum(section, heads - part * section)
    return tiles - 1 - rest // heads_here, part * section + rest % heads_here


@triton.jit
def run_of_tokens(sequence_ids, first, queries, GROUP: tl.constexpr, BM: tl.constexpr):
    """(number of tokens, sequence) of the run that starts at token `first`."""
    TOKENS: tl.constexpr = BM // GROUP
    sequence = tl.load(sequence_ids + first)
    end = tl.minimum((first // TOKENS + 1) * TOKENS, queries)
    token = first + tl.arange(0, BM) // GROUP
    other = tl.load(sequence_ids + tl.minimum(token, queries - 1)) != sequence
    return tl.minimum(tl.min(tl.where(other, token, end), 0), end) - first, sequence


@triton.jit
def starts_within_tiles(sequence_ids, rank, queries, TOKENS: tl.constexpr):
    """(number of runs that do not start with a tile, the token that the one number `rank` starts at)."""
    SPAN: tl.constexpr = 1024
    count = queries * 0
    found = queries
    for start in range(0, queries, SPAN):
        token = start + tl.arange(0, SPAN)
        inside = (token < queries) & (token % TOKENS != 0)
        here = tl.load(sequence_ids + token, mask=inside, other=0)
        before = tl.load(sequence_ids + token - 1, mask=inside, other=0)
        starts = (here != before).to(tl.int32)
        nth = count + tl.cumsum(starts, 0) - 1
        found = tl.minimum(found, tl.min(tl.where((starts != 0) & (nth == rank), token, queries), 0))
        count += tl.sum(starts, 0)
    return count, found


@triton.jit
def attend_tile(
    out, query, keys, values, scratch, positions, bias, sinks, out_strides, query_strides, key_strides, value_strides,
    bias_strides, batch, kv_heads, queries, length, bias_keys, b, kv_head, h, s, inside, pages,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    VALUE_PADDED: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, MASK: tl.constexpr,
    WINDOW: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, PAGE: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of sequence b and one key-value head, with query heads h [BM] and queries s [BM], stored where `inside`."""
    keys += kv_head.to(tl.int64) * key_strides[1]
    values += kv_head.to(tl.int64) * value_strides[1]
    if positions is None:
        p = s + (length - queries)
    else:
        p = tl.load(positions + b * queries + s).to(tl.int32)
    wide_s = s.to(tl.int64)
    q = load_rows(
        query + (b * query_strides[0] + h * query_strides[1] + wide_s * query_strides[2]), inside, False, WIDTH, PADDED
    )
    if query.dtype.element_ty != keys.dtype.element_ty:
        q = q.to(tl.float32)
    rows_of_bias = None
    if bias is not None:
        at = b * bias_strides[0] + h * bias_strides[1] + wide_s * bias_strides[2]
        rows_of_bias = (bias + at, bias_strides[3])

    start, free, free_end, end = key_ranges(tl.min(p, 0), tl.max(p, 0), length, MASK, WINDOW)
    start = start // BN * BN
    stop = end
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), BN), splits) * BN
        start += split * share
        stop = tl.minimum(start + share, end)
    # [start, free) and [free_end, stop) are compared key by key, [free, free_end) holds whole blocks that all rows see.
    free = tl.minimum(tl.maximum(tl.cdiv(free, BN) * BN, start), tl.cdiv(stop, BN) * BN)
    free_end = tl.maximum(tl.minimum(free_end // BN * BN, stop), free)

    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if sinks is not None and not SPLIT:
        top = tl.load(sinks + h).to(tl.float32)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        if UNIT is not None:
            top = top * LOG2E
    acc = tl.zeros((BM, VALUE_PADDED), tl.float32)
    if MASK == "sliding" or MASK == "chunked":
        acc, top, total = sweep(
            acc, top, total, q, p, keys, values, key_strides, value_strides, pages, rows_of_bias, bias_keys,
            start, free, end, True, MASK, WINDOW, SCALE, SOFTCAP, UNIT,
            WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, KEY_ROW, VALUE_ROW, PAGE, BN, PRECISION,
        )  # fmt: skip
    acc, top, total = sweep(
        acc, top, total, q, p, keys, values, key_strides, value_strides, pages, rows_of_bias, bias_keys,
        free, free_end, end, False, MASK, WINDOW, SCALE, SOFTCAP, UNIT,
        WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, KEY_ROW, VALUE_ROW, PAGE, BN, PRECISION,
    )  # fmt: skip
    acc, top, total = sweep(
        acc, top, total, q, p, keys, values, key_strides, value_strides, pages, rows_of_bias, bias_keys,
        free_end, stop, end, True, MASK, WINDOW, SCALE, SOFTCAP, UNIT,
        WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, KEY_ROW, VALUE_ROW, PAGE, BN, PRECISION,
    )  # fmt: skip

    e = tl.arange(0, VALUE_PADDED)
    stored = inside[:, None] & (e < VALUE_WIDTH)[None, :]
    if not SPLIT:
        mixed = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        at = b * out_strides[0] + h * out_strides[1] + wide_s * out_strides[2]
        tl.store(out + at[:, None] + e[None, :], mixed.to(out.dtype.element_ty), mask=stored)
    else:
        heads = kv_heads * GROUP
        slot = ((b * queries + wide_s) * heads + h) * splits + split
        tl.store(scratch + slot[:, None] * VALUE_WIDTH + e[None, :], acc, mask=stored)
        states = scratch + tl.cast(batch * queries, tl.int64) * heads * splits * VALUE_WIDTH
        tl.store(states + slot * 2, top, mask=inside)
        tl.store(states + slot * 2 + 1, total, mask=inside)


# Sizes change from step to step: a kernel compiled once takes all of them (Triton would make others for 1 and for
# multiples of 16, which loads gain nothing from: what lies side by side is said by the strides).
@triton.jit(
    do_not_specialize=["batch", "kv_heads", "queries", "length", "bias_keys", "section", "table_stride", "extra"]
)
def attend(
    out, query, keys, values, scratch, positions, bias, sinks, tables, sequence_ids,
    out_strides, query_strides, key_strides, value_strides, bias_strides, table_stride,
    batch, kv_heads, queries, length, bias_keys, section, extra,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    VALUE_PADDED: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, MASK: tl.constexpr,
    WINDOW: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, PAGE: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(cap(query · keyᵀ · scale) + bias, masked) · value, or parts of it in scratch.

    Strides are (batch, head, row) in elements, of keys and values (batch, head) with rows KEY_ROW and VALUE_ROW apart,
    for pages (block, head), of the bias (batch, head, query, key).
    positions [batch, queries], sinks [heads] or None; without pages tables, sequence_ids and PAGE are None.
    Grid: (tiles · batch · kv_heads, splits), tiles = ⌈queries · GROUP / BM⌉, for pages queries, or with `extra`
    ⌈queries / (BM // GROUP)⌉ + extra.
    """
    row = tl.arange(0, BM)
    if PAGE is None:
        tile, pair = heavy_first(tl.program_id(0), tl.cdiv(queries * GROUP, BM), batch * kv_heads, section)
        last = queries * GROUP - 1
        inside = tile * BM + row <= last
        index = tl.minimum(tile * BM + row, last)
        s = index // GROUP
        b = (pair // kv_heads).to(tl.int64)
        kv_head = pair % kv_heads
        h = kv_head * GROUP + index % GROUP
        keys += b * key_strides[0]
        values += b * value_strides[0]
        pages = None
        attend_tile(
            out, query, keys, values, scratch, positions, bias, sinks,
            out_strides, query_strides, key_strides, value_strides, bias_strides,
            batch, kv_heads, queries, length, bias_keys, b, kv_head, h, s, inside, pages,
            GROUP, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, KEY_ROW, VALUE_ROW, MASK, WINDOW, SCALE, SOFTCAP, UNIT,
            PAGE, SPLIT, BM, BN, PRECISION,
        )  # fmt: skip
    elif extra is None:
        s, kv_head = heavy_first(tl.program_id(0), queries, kv_heads, section)
        inside = row < GROUP
        h = kv_head * GROUP + row % GROUP
        b = tl.cast(0, tl.int64)
        pages = tables + tl.load(sequence_ids + s).to(tl.int64) * table_stride
        s += row * 0
        attend_tile(
            out, query, keys, values, scratch, positions, bias, sinks,
            out_strides, query_strides, key_strides, value_strides, bias_strides,
            batch, kv_heads, queries, length, bias_keys, b, kv_head, h, s, inside, pages,
            GROUP, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, KEY_ROW, VALUE_ROW, MASK, WINDOW, SCALE, SOFTCAP, UNIT,
            PAGE, SPLIT, BM, BN, PRECISION,
        )  # fmt: skip
    else:
        TOKENS: tl.constexpr = BM // GROUP
        tiles = tl.cdiv(queries, TOKENS)
        tile, kv_head = heavy_first(tl.program_id(0), tiles + extra, kv_heads, section)
        h = kv_head * GROUP + row % GROUP
        b = tl.cast(0, tl.int64)
        first = tile * TOKENS
        rank = tl.maximum(tile - tiles, 0)
        runs = rank + 1
        if tile >= tiles:
            runs, first = starts_within_tiles(sequence_ids, rank, queries, TOKENS)
        while rank < runs:
            count, sequence = run_of_tokens(sequence_ids, first, queries, GROUP, BM)
            inside = row // GROUP < count
            s = first + tl.minimum(row // GROUP, count - 1)
            pages = tables + sequence.to(tl.int64) * table_stride
            attend_tile(
                out, query, keys, values, scratch, positions, bias, sinks,
                out_strides, query_strides, key_strides, value_strides, bias_strides,
                batch, kv_heads, queries, length, bias_keys, b, kv_head, h, s, inside, pages,
                GROUP, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, KEY_ROW, VALUE_ROW, MASK, WINDOW, SCALE, SOFTCAP, UNIT,
                PAGE, SPLIT, BM, BN, PRECISION,
            )  # fmt: skip
            rank += tl.maximum(extra, 1)
            if rank < runs:
                runs, first = starts_within_tiles(sequence_ids, rank, queries, TOKENS)


@triton.jit(do_not_specialize=["batch", "heads", "queries", "splits"])
def combine(
    out, scratch, sinks, out_strides, batch, heads, queries, splits,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, NATURAL: tl.constexpr, SPLITS_PADDED: tl.constexpr,
):  # fmt: skip
    """out from the parts of each row that `attend` left in scratch; NATURAL: maxima are natural logarithms.

    Grid: (batch · queries · heads).
    """
    row = tl.program_id(0).to(tl.int64)
    h = row % heads
    s = row // heads % queries
    b = row // heads // queries
    n = tl.arange(0, SPLITS_PADDED)
    e = tl.arange(0, VALUE_PADDED)
    states = scratch + tl.cast(batch * queries, tl.int64) * heads * splits * VALUE_WIDTH + row * splits * 2
    unit: tl.constexpr = LOG2E if NATURAL else 1.0
    tops = tl.load(states + n * 2, mask=n < splits, other=float("-inf"))
    totals = tl.load(states + n * 2 + 1, mask=n < splits, other=0.0)
    top = tl.max(tops, 0)
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32)
        if not NATURAL:
            sink = sink * LOG2E
        top = tl.maximum(top, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    decay = tl.exp2((tops - shift) * unit)
    total = tl.sum(totals * decay, 0)
    if sinks is not None:
        total += tl.exp2((sink - shift) * unit)
    # Parts without a key hold nothing, and are not read.
    known = (tops > float("-inf"))[:, None] & (e < VALUE_WIDTH)[None, :]
    parts = tl.load(scratch + (row * splits + n)[:, None] * VALUE_WIDTH + e[None, :], mask=known, other=0.0)
    mixed = tl.sum(parts * decay[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    at = out + b * out_strides[0] + h * out_strides[1] + s * out_strides[2]
    tl.store(at + e, mixed.to(out.dtype.element_ty), mask=e < VALUE_WIDTH)
