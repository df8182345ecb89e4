"""Blocks of keys for a tile of query rows: which are seen, scores, and the online softmax over them.

Rows: the queries of all heads that share a key-value head are one tile (row r: query r // GROUP, head r % GROUP of the
group), so keys and values are read once for the group. What a query at position p sees is an interval of keys, so a
mask costs nothing where it cuts whole blocks away, and comparisons only in the blocks at the ends of the interval.

Scores are f32, in units of `unit`: weights are 2^(scores · unit - top). With a bias they are natural logarithms,
2^((scores - top) · log2 e), as a bias of the lowest f32 must not overflow to -infinity.
Source: Dao 2023, https://arxiv.org/abs/2307.08691.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def first_key(p, MASK: tl.constexpr, WINDOW: tl.constexpr):
    """The first key that a query at position p ≥ 0 sees, as `irc::attention` has the masks."""
    first = p * 0
    if MASK == "sliding":
        first = tl.maximum(p - (WINDOW - 1), 0)
    elif MASK == "chunked":
        first = p // WINDOW * WINDOW
    return first


@triton.jit
def sees(p, t, MASK: tl.constexpr, WINDOW: tl.constexpr):
    """True where a query at position p sees key t; p [BM, 1], t [1, BN]."""
    seen = t <= p
    if MASK == "sliding":
        seen = seen & (t > p - WINDOW)
    elif MASK == "chunked":
        seen = seen & (t // WINDOW == p // WINDOW)
    return seen


@triton.jit
def key_ranges(lowest, highest, length, MASK: tl.constexpr, WINDOW: tl.constexpr):
    """Keys that any row sees [start, end) and those that all see [free, free_end), of rows at lowest … highest."""
    start = lowest * 0
    end = start + length
    free = start
    free_end = end
    if MASK != "full":
        end = tl.maximum(tl.minimum(length, highest + 1), 0)
        free_end = tl.maximum(tl.minimum(length, lowest + 1), 0)
        start = first_key(tl.maximum(lowest, 0), MASK, WINDOW)
        free = first_key(tl.maximum(highest, 0), MASK, WINDOW)
    return start, free, free_end, end


@triton.jit
def places_of(pages, first, last, PAGE: tl.constexpr, BN: tl.constexpr):
    """(origin, place from there [BN]) of keys first … first + BN - 1, those behind `last` being anywhere.

    The origin is the block of pages that a key is in, and without pages, where PAGE is None, the first key.
    """
    place = tl.arange(0, BN)
    origin = tl.cast(first, tl.int64)
    if PAGE is not None:
        if PAGE % BN == 0:  # the keys lie in one page
            origin = tl.load(pages + first // PAGE).to(tl.int64)
            place = first % PAGE + place
        else:
            t = tl.minimum(first + place, last)
            origin = tl.load(pages + t // PAGE).to(tl.int64)
            place = t % PAGE
    return origin, place


@triton.jit
def rows_at(cache, strides, origin, place, ROW: tl.constexpr, PAGE: tl.constexpr):
    """Pointers [BN] to rows of keys or values; `strides`: of batch (block of pages) and head, ROW of row.

    A known stride of rows leaves one address for all rows that a thread copies: theirs differ by constants.
    """
    if PAGE is None:
        rows = cache + origin * ROW + place * ROW
    else:
        rows = cache + (origin * strides[0] + place * ROW)
    return rows


@triton.jit
def load_rows(rows, inside, CUT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED]: WIDTH numbers from each pointer, 0 behind them and, with CUT, where a row is not inside."""
    d = tl.arange(0, PADDED)
    at = rows[:, None] + d[None, :]
    if CUT and WIDTH != PADDED:
        loaded = tl.load(at, mask=inside[:, None] & (d < WIDTH)[None, :], other=0.0)
    elif CUT:
        loaded = tl.load(at, mask=inside[:, None], other=0.0)
    elif WIDTH != PADDED:
        loaded = tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)
    else:
        loaded = tl.load(at)
    return loaded


@triton.jit
def tanh(x):
    """tanh(x) by one exponential: exact to 1e-7 of its range, and ±1 where the exponential overflows or vanishes."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def scores_of(q, k, bias, t, bias_keys, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """f32 [BM, BN], to be multiplied by `unit_of`: cap(q · kᵀ · scale) + bias. `bias`: (pointers [BM], key stride)."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP is not None:
        scores = tanh(scores * (SCALE / SOFTCAP))
    if bias is not None:
        at = bias[0][:, None] + t[None, :] * bias[1]
        known = (t < bias_keys)[None, :]  # keys behind the bias belong to no position: what they get is masked
        if bias[0].dtype.element_ty == tl.int1:
            scores = tl.where(tl.load(at, mask=known, other=0) != 0, scores, float("-inf"))
        else:
            natural: tl.constexpr = SCALE if SOFTCAP is None else SOFTCAP
            scores = scores * natural + tl.load(at, mask=known, other=0.0).to(tl.float32)
    return scores


@triton.jit
def sweep(
    acc, top, total, q, p, keys, values, key_strides, value_strides, pages, bias, bias_keys, start, stop, end,
    CUT: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    VALUE_PADDED: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes the keys [start, stop) into acc [BM, VALUE_PADDED], top [BM] and total [BM].

    Without CUT all rows see all those keys. With it, keys from `end` on do not exist. UNIT None: natural logarithms.
    """
    # The condition is the loop's own, but the wait for its last product comes to stand under it, too. Behind the loop,
    # where a loop without keys also ends, ptxas would see registers of the product set by other instructions, and
    # have every product of the kernel wait for the one before (its C7515).
    if start < stop:
        for first in range(start, stop, BN):
            t = first + tl.arange(0, BN)
            inside = t < end
            origin, place = places_of(pages, first, end - 1, PAGE, BN)
            rows = rows_at(keys, key_strides, origin, place, KEY_ROW, PAGE)
            k = load_rows(rows, inside, CUT, WIDTH, PADDED).to(q.dtype)
            scores = scores_of(q, k, bias, t, bias_keys, SCALE, SOFTCAP, PRECISION)
            if CUT:
                seen = inside[None, :]
                if MASK != "full":
                    seen = seen & sees(p[:, None], t[None, :], MASK, WINDOW)
                scores = tl.where(seen, scores, float("-inf"))
            highest = tl.max(scores, 1)
            if UNIT is not None:
                highest = highest * UNIT
            next_top = tl.maximum(top, highest)
            shift = next_top
            if CUT or bias is not None:  # rows without any key so far have no finite maximum to shift by
                shift = tl.where(next_top == float("-inf"), 0.0, next_top)
            if UNIT is not None:
                weights = tl.exp2(scores * UNIT - shift[:, None])
                decay = tl.exp2(top - shift)
            else:
                weights = tl.exp2((scores - shift[:, None]) * LOG2E)
                decay = tl.exp2((top - shift) * LOG2E)
            total = total * decay + tl.sum(weights, 1)
            rows = rows_at(values, value_strides, origin, place, VALUE_ROW, PAGE)
            v = load_rows(rows, inside, CUT, VALUE_WIDTH, VALUE_PADDED).to(q.dtype)
            acc = tl.dot(weights.to(q.dtype), v, acc * decay[:, None], input_precision=PRECISION)
            top = next_top
    return acc, top, total
