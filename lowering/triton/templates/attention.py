"""Attention over contiguous and paged keys and values: which kernels, with what blocks, and the launch.

`refuses` says what the kernels cannot do, `choose` fixes block sizes from sizes that are known when a step is bound,
`scratch_elements` says what it needs, and `launch` runs it on tensors. Queries, keys and values are read as they lie,
with any strides but along the last axis, which is dense; so is the result, which is written where its strides say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from irc.core.errors import TargetError

MASKS = ("full", "causal", "sliding", "chunked")
_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_BIASES = (*_BYTES, "bool")
_WIDEST = 256
_MOST_SPLITS = 64
_MOST_GROUP = 128  # rows of one token over pages, all in one tile
_SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
_LEAST_SHARED_BYTES = 99 << 10  # of consumer GPUs
_PROGRAM_BYTES_PER_NS = 20  # keys and values that a program takes in, measured on an H100
_SCRATCH_BYTES_PER_NS = 2000  # of all programs together, written and read
_L2_BYTES = 32 << 20  # of an H100's 50 MB and an A100's 40 MB, what keys and values may take


@dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """softmax(cap(q · kᵀ · scale) + bias, masked) · v; what is known when the step is printed.

    Attributes:
        width: D of queries and keys.
        value_width: D of values.
        query: type of queries in memory: f32, bf16 or f16.
        cache: type of keys and values: f32, bf16 or f16. Where it is not the queries', products are f32.
        mask: as `irc::attention` has it.
        window: of sliding and chunked masks.
        scale: of the scores.
        softcap: of the scores, or None.
        bias: type of a tensor that is added to the scores: f32, bf16, f16, or bool, which keeps scores where it is
            true. None: there is none.
        precision: of products of f32: "tf32x3" (nearly f32), "tf32" (10 bits) or "ieee" (slow).
    """

    width: int
    value_width: int
    query: str = "f32"
    cache: str = "f32"
    mask: str = "full"
    window: int | None = None
    scale: float = 1.0
    softcap: float | None = None
    bias: str | None = None
    precision: str = "tf32x3"

    @property
    def product(self) -> str:
        """Type of the operands of both products."""
        return self.query if self.query == self.cache else "f32"


@dataclass(frozen=True, kw_only=True)
class Config:
    """How `attend` is launched.

    Attributes:
        block_rows: rows of a tile: queries of all heads that share a key-value head.
        block_keys: keys of a step.
        splits: programs that share the keys of a tile; more than one needs scratch and `combine`.
        warps, stages: of Triton; stages are blocks of keys in flight.
        extra: over pages, programs for runs of tokens that start within a tile; None: a program for each token.
    """

    block_rows: int
    block_keys: int
    splits: int = 1
    warps: int = 4
    stages: int = 2
    extra: int | None = None


def refuses(problem: AttentionProblem, *, group: int = 1, paged: bool = False) -> str | None:
    """Why the kernels cannot do the problem, or None. `group`: query heads of a key-value head."""
    if problem.bias is not None and problem.bias not in _BIASES:
        return f"a bias in {problem.bias}; known: {', '.join(_BIASES)}"
    for what, kind in (("queries", problem.query), ("keys and values", problem.cache)):
        if kind not in _BYTES:
            return f"{what} in {kind}; known: {', '.join(_BYTES)}"
    if problem.mask not in MASKS:
        return f"mask {problem.mask!r}; known: {', '.join(MASKS)}"
    if problem.mask in ("sliding", "chunked") and not problem.window:
        return f"mask {problem.mask!r} without a window"
    if not (0 < problem.width <= _WIDEST and 0 < problem.value_width <= _WIDEST):
        return f"heads of {problem.width} and {problem.value_width}; at most {_WIDEST}"
    if not (problem.scale > 0 and (problem.softcap is None or problem.softcap > 0)):
        return f"scale {problem.scale} and softcap {problem.softcap}, which must be positive"
    if paged and group > _MOST_GROUP:
        return f"{group} query heads a key-value head over pages; at most {_MOST_GROUP}"
    return None


def choose(
    problem: AttentionProblem,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    length: int,
    multiprocessors: int = 132,
    *,
    capability: int = 90,
    page_size: int | None = None,
) -> Config:
    """Block sizes and splits.

    Args:
        batch: sequences; for pages the rows of the block tables.
        queries: of each sequence; for pages flat tokens altogether.
        length: keys of a sequence, at most.
        multiprocessors, capability: of the device (H100: 132 and 90, A100: 108 and 80).
    """
    group, paged = heads // kv_heads, page_size is not None
    a_sequence = -(-queries // max(batch, 1)) if paged else queries
    # Tensor cores want 16 rows. Few rows are bound by reading keys, so a tile wider than what there is costs nothing
    # but registers; many rows are bound by products, and each tile reads all keys from the L2.
    rows = min(max(_power_of_two(a_sequence * group), 16), _most_rows(problem, capability))
    if paged:
        rows = max(rows, _power_of_two(group))
    tokens = queries if paged else batch * queries
    while True:
        keys, warps = _keys_and_warps(problem, rows, capability)
        flights = _flights(problem, rows, keys, capability)
        resident = _resident(problem, rows, keys, warps, flights, capability)
        extra = None
        if paged:
            tiles = -(-queries // (rows // group))
            extra = min(batch - 1, queries - tiles) if a_sequence > 1 else None
            tiles = queries if extra is None else tiles + extra
        else:
            tiles = batch * -(-queries * group // rows)
        programs = kv_heads * tiles
        most = min(length // (2 * keys), _worthwhile_splits(problem, tokens * heads, length))
        splits = _splits(programs, multiprocessors * resident, most)
        # A prompt that does not fill the device gets smaller tiles, down to the 64 rows of Hopper's products. Programs
        # of a causal mask differ by their keys, and even out where multiprocessors have more than one.
        if splits > 1 or rows <= max(64, group) or programs >= 1.5 * multiprocessors:
            break
        rows //= 2
    # Over pages, Triton gives the load of a table half of the stages, and that of the rows which it leads to the rest.
    stages = 2 * flights - 1 if paged else flights
    return Config(block_rows=rows, block_keys=keys, splits=splits, warps=warps, stages=stages, extra=extra)


def _flights(problem: AttentionProblem, rows: int, keys: int, capability: int) -> int:
    """Blocks of keys and values in flight: three, as Triton issues loads at the end of a step, so two wait for them."""
    flights = 3 if rows < 128 or _wide(problem) <= 64 or capability >= 90 else 2
    while flights > 1 and _shared(problem, rows, keys, flights) > _SHARED_BYTES.get(capability, _LEAST_SHARED_BYTES):
        flights -= 1
    return flights


def _resident(problem: AttentionProblem, rows: int, keys: int, warps: int, flights: int, capability: int) -> int:
    """Programs that a multiprocessor holds at once."""
    used = _shared(problem, rows, keys, flights)
    return max(1, min(_SHARED_BYTES.get(capability, _LEAST_SHARED_BYTES) // used, 12 // warps))


def _worthwhile_splits(problem: AttentionProblem, rows: int, length: int) -> int:
    """The most parts of the keys whose results cost a fourth of what reading a part, not all, saves each program.

    All `rows` of all heads write a result of each part to scratch, and `combine` reads it: for a prompt that is more
    than its keys, and it would take longer than the attention.
    """
    whole = length * (problem.width + problem.value_width) * _BYTES[problem.cache] / _PROGRAM_BYTES_PER_NS

    def worthwhile(n: int) -> bool:
        partial = 2 * rows * n * (problem.value_width + 2) * 4 / _SCRATCH_BYTES_PER_NS
        return 4 * partial <= whole * (1 - 1 / n)

    return max((n for n in range(2, _MOST_SPLITS + 1) if worthwhile(n)), default=1)


def _keys_and_warps(problem: AttentionProblem, rows: int, capability: int) -> tuple[int, int]:
    """Keys of a block and warps, such that accumulators and scores stay in registers.

    A thread holds rows · (value width + keys) / threads numbers of f32, the weights again as operands, and where
    products take operands from registers (before Hopper; fewer than 64 rows; f32, which is split in two) those, too.
    What stands here is what ptxas compiles without spilling, but for f32 of more than 128.
    """
    wide, hopper = _wide(problem), capability >= 90
    if problem.product == "f32":
        return 32, 4 if wide <= (64 if rows > 16 else 128) and rows <= 32 else 8
    if rows >= 128 and wide <= 128 and hopper:
        keys, warps = (64, 4) if wide <= 64 else (128, 8)
        return (64, 8) if problem.bias is not None else (keys, warps)
    if rows >= 64 and (wide > 128 or not hopper):
        return (32 if rows >= 128 and wide > 128 else 64), (4 if rows < 128 and wide <= 64 else 8)
    return (32 if wide > 128 else 64), 4


def _splits(programs: int, places: int, most: int) -> int:
    """The fewest parts of the keys that fill the device about as well as any number of them.

    `programs` run on `places` at a time, so n parts take ⌈programs · n / places⌉ rounds of 1/n of the work each.
    """
    if programs >= 0.8 * places:
        return 1

    def filled(n: int) -> float:
        rounds = programs * n / places
        return rounds / math.ceil(rounds)

    counts = range(1, max(1, min(_MOST_SPLITS, most)) + 1)
    best = max(filled(n) for n in counts)
    return next(n for n in counts if filled(n) >= 0.85 * best)


def scratch_elements(problem: AttentionProblem, config: Config, tokens: int, heads: int) -> int:
    """Numbers of f32 that `launch` needs in scratch, for `tokens` queries of all sequences."""
    return 0 if config.splits == 1 else tokens * heads * config.splits * (problem.value_width + 2)


def launch(
    problem: AttentionProblem,
    config: Config,
    out: Any,
    query: Any,
    keys: Any,
    values: Any,
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    length: int,
    out_strides: Sequence[int],
    query_strides: Sequence[int],
    key_strides: Sequence[int],
    value_strides: Sequence[int],
    positions: Any = None,
    sinks: Any = None,
    bias: Any = None,
    bias_strides: Sequence[int] = (0, 0, 0, 0),
    bias_keys: int = 0,
    tables: Any = None,
    table_stride: int = 0,
    sequence_ids: Any = None,
    page_size: int | None = None,
    scratch: Any = None,
) -> None:
    """Attends, on the current stream; no synchronization, no allocation.

    Args:
        out, query, keys, values: tensors; of each only the first element's address and the type are used.
        batch, heads, kv_heads, queries, length: sizes; for pages batch is 1, queries are the flat tokens, and length is
            the block tables' width times page_size.
        out_strides, query_strides: of batch, head and query, in elements.
        key_strides, value_strides: of batch, head and key; for pages of block, head and key.
        positions: i64 [batch, queries], dense; None: the last query sees the last key. Pages need it.
        sinks: [heads].
        bias, bias_strides, bias_keys: strides of batch, head, query and key, 0 where it is broadcast (for pages of
            [N|1, H|1, L] it is batch 0, H, N, L); and its number of keys.
        tables, table_stride, sequence_ids, page_size: of pages: i64 [sequences, table_stride], i64 [queries].
        scratch: f32 [scratch_elements(…)], where the config has splits.

    Raises:
        TargetError: the kernels cannot do it, or scratch is missing.
    """
    from irc.lowering.triton.library.attention import attend, combine

    group = heads // kv_heads
    reason = refuses(problem, group=group, paged=page_size is not None)
    if reason is not None:
        raise TargetError(f"attention cannot do {problem}: {reason}")
    if config.splits > 1 and scratch is None:
        raise TargetError(f"attention in {config.splits} parts needs scratch, and got none")
    if page_size is not None and (positions is None or sequence_ids is None or tables is None):
        raise TargetError("attention over pages needs positions, sequence_ids and tables")
    if batch * queries * heads == 0:
        return
    if bias_strides[3] == 0:
        bias_keys = length
    tiles = -(-queries * group // config.block_rows)
    if page_size is not None:
        tiles = queries if config.extra is None else -(-queries // (config.block_rows // group)) + config.extra
    pairs = batch * kv_heads
    attend[(tiles * pairs, config.splits)](
        out, query, keys, values, scratch, positions, bias, sinks, tables, sequence_ids,
        tuple(out_strides), tuple(query_strides), tuple(key_strides[:2]), tuple(value_strides[:2]), tuple(bias_strides),
        table_stride, batch, kv_heads, queries, length, bias_keys, section_of(problem, length, pairs), config.extra,
        KEY_ROW=key_strides[2], VALUE_ROW=value_strides[2], **attend_constants(problem, config, group, page_size),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if config.splits > 1:
        sizes = batch, heads, queries, config.splits
        combine[(batch * queries * heads,)](
            out, scratch, sinks, tuple(out_strides), *sizes, **combine_constants(problem, config)
        )


def attend_constants(problem: AttentionProblem, config: Config, group: int, page_size: int | None) -> dict[str, object]:
    """What the kernel `attend` is compiled for."""
    natural = problem.bias not in (None, "bool")
    return {
        "GROUP": group, "WIDTH": problem.width, "PADDED": _padded(problem.width), "VALUE_WIDTH": problem.value_width,
        "VALUE_PADDED": _padded(problem.value_width), "MASK": problem.mask, "WINDOW": problem.window,
        "SCALE": problem.scale, "SOFTCAP": problem.softcap,
        "UNIT": None if natural else (problem.scale if problem.softcap is None else problem.softcap) / math.log(2),
        "PAGE": page_size, "SPLIT": config.splits > 1, "BM": config.block_rows, "BN": config.block_keys,
        "PRECISION": problem.precision,
    }  # fmt: skip


def combine_constants(problem: AttentionProblem, config: Config) -> dict[str, object]:
    """What the kernel `combine` is compiled for."""
    return {
        "VALUE_WIDTH": problem.value_width, "VALUE_PADDED": _padded(problem.value_width),
        "NATURAL": problem.bias not in (None, "bool"), "SPLITS_PADDED": _power_of_two(config.splits),
    }  # fmt: skip


def section_of(problem: AttentionProblem, length: int, pairs: int) -> int:
    """How many (sequence, key-value head) pairs run side by side, so that their keys and values stay in the L2."""
    size = length * (problem.width + problem.value_width) * _BYTES[problem.cache]
    return max(1, min(pairs, _L2_BYTES // max(size, 1)))


def _most_rows(problem: AttentionProblem, capability: int = 90) -> int:
    """Rows of the largest tile."""
    wide, hopper = _wide(problem), capability >= 90
    if problem.product == "f32":
        return (64 if hopper else 32) if wide <= 64 else 32 if wide <= 128 else 16
    return 128 if hopper or wide <= 128 else 64


def _wide(problem: AttentionProblem) -> int:
    return max(_padded(problem.width), _padded(problem.value_width))


def _shared(problem: AttentionProblem, rows: int, keys: int, flights: int) -> int:
    """Bytes of shared memory of a program: queries, and blocks of keys, values and bias in flight."""
    width, value_width = _padded(problem.width), _padded(problem.value_width)
    bias = 0 if problem.bias is None else rows * keys * _BYTES.get(problem.bias, 1)
    return (rows * width + flights * keys * (width + value_width)) * _BYTES[problem.product] + flights * bias


def _power_of_two(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


def _padded(width: int) -> int:
    """Tensors in registers have powers of two; products at least 16."""
    return max(16, _power_of_two(width))
