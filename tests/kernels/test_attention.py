"""Attention kernels against `irc::attention` in f64, within the bound that irc/attention.h states."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from irc.core.errors import TargetError
from irc.lowering.cpp.templates import attention as template
from irc.lowering.cpp.templates.attention import AttentionProblem
from irc.lowering.cpp.templates.base import C_TYPES
from tests.kernels.building import aligned, build, needs_compiler, pointer, runnable_isas

_BIAS_TYPES = {"f32": "float", "bool": "bool"}
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
PROBLEMS = {
    "causal": AttentionProblem(width=64, value_width=64, mask="causal", scale=0.125),
    "full": AttentionProblem(width=16, value_width=48, mask="full", scale=0.25),
    "sliding": AttentionProblem(width=24, value_width=20, mask="sliding", window=37, scale=0.2),
    "chunked": AttentionProblem(width=32, value_width=32, mask="chunked", window=50, scale=0.2, softcap=3.0),
    "halves": AttentionProblem(width=32, value_width=32, query="f16", cache="bf16", mask="causal", scale=0.2),
    "wide": AttentionProblem(width=160, value_width=160, mask="causal", scale=0.08),
}
# With a bias a head, or a mask for all heads whose first query sees nothing.
BIASED = {
    "biased": AttentionProblem(width=32, value_width=32, scale=0.2, softcap=3.0, bias="f32"),
    "masked": AttentionProblem(width=16, value_width=48, mask="causal", scale=0.25, bias="bool"),
}
_SIZES = ("batch", "heads", "kv_heads", "queries", "length")


def _function(name: str, problem: AttentionProblem, paged: bool) -> str:
    """Operands lie as [batch, row, head, width]; the output as [batch, head, query, width], added to."""
    args = {
        key: key for key in ("worker", "scratch", "workers", "query", "keys", "values", "positions", "sinks", *_SIZES)
    }
    args["query_strides"] = f"queries * heads * {problem.width}, {problem.width}, heads * {problem.width}"
    for key, width in (("keys", problem.width), ("values", problem.value_width)):
        args[f"{key}_strides"] = f"rows * kv_heads * {width}, {width}, kv_heads * {width}"
    bias = ""
    if problem.bias is not None:
        args |= {"bias": "bias", "bias_strides": "queries * length, 0, length, 1, length"}
        if problem.bias == "f32":
            args["bias_strides"] = "0, length, 0, 1, length"
        bias = f" const {_BIAS_TYPES[problem.bias]}* bias,"
    if paged:
        args |= {key: key for key in ("sequence_ids", "table", "table_stride")}
        args["page_size"] = "rows"
    width = problem.value_width
    epilogue = (
        f"[&](int64_t b, int64_t h, int64_t s, const float* got) {{ for (int64_t d = 0; d < {width}; ++d)"
        f" out[((b * heads + h) * queries + s) * {width} + d] += got[d]; }}"
    )
    query, cache = C_TYPES[problem.query], C_TYPES[problem.cache]
    return (
        f'extern "C" int64_t {name}_scratch(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries,'
        f" int64_t length, int workers) {{\n"
        f"    return {template.scratch_expression(problem, args, paged=paged)};\n}}\n"
        f'extern "C" void {name}(int threads, const {query}* query, const {cache}* keys, const {cache}* values,'
        f" const int64_t* positions, const float* sinks,{bias} int64_t batch, int64_t heads, int64_t kv_heads,"
        f" int64_t queries, int64_t length, int64_t rows, const int64_t* sequence_ids, const int64_t* table,"
        f" int64_t table_stride, uint8_t* scratch, float* out) {{\n"
        f"    (void)rows; (void)sequence_ids; (void)table; (void)table_stride;\n"
        f"    auto body = [&](irc::Worker& worker) {{\n        give_memory(worker);\n"
        f"{template.call(problem, args, epilogue)}    }};\n"
        "    pool(threads).run(body);\n}"
    )


@pytest.fixture(scope="module", params=runnable_isas())
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    functions = [_function(name, problem, False) for name, problem in (PROBLEMS | BIASED).items()]
    functions += [_function(f"paged_{name}", PROBLEMS[name], True) for name in ("causal", "sliding", "halves")]
    library = build(template.INCLUDES, functions, request.param)
    for name in [*PROBLEMS, *BIASED, "paged_causal", "paged_sliding", "paged_halves"]:
        getattr(library, f"{name}_scratch").restype = ctypes.c_int64
    return library


def _random(shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(_DTYPES[kind])


def _call(
    kernels: ctypes.CDLL, name: str, threads: int, sizes: list[int], operands: list[Tensor | None], rows: int,
    paging: tuple[Tensor, Tensor] | None, value_width: int,
) -> Tensor:  # fmt: skip
    """Operands: query, keys, values, positions, sinks. Output [batch, heads, queries, value_width]."""
    longs = [ctypes.c_int64(size) for size in sizes]
    scratch = aligned(getattr(kernels, f"{name}_scratch")(*longs, threads))
    out = torch.zeros(sizes[0], sizes[1], sizes[3], value_width)
    pointers = [None if operand is None else pointer(operand) for operand in operands]
    ids, table, stride = (None, None, 0) if paging is None else (*map(pointer, paging), paging[1].shape[1])
    getattr(kernels, name)(
        threads,
        *pointers,
        *longs,
        ctypes.c_int64(rows),
        ids,
        table,
        ctypes.c_int64(stride),
        pointer(scratch),
        pointer(out),
    )
    return out


def _reference(
    problem: AttentionProblem,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(attention in f64 of [B, H, S, D] operands, bound on the error)."""
    query, keys, values = query.double(), keys.double(), values.double()
    options = {
        "positions": positions, "sinks": None if sinks is None else sinks.double(), "mask": problem.mask,
        "window": problem.window, "scale": problem.scale, "softcap": problem.softcap, "bias": bias,
    }  # fmt: skip
    wanted = torch.ops.irc.attention(query, keys, values, **options)
    weighed = torch.ops.irc.attention(query, keys, values.abs(), **options)
    score = float(query.norm(dim=-1).max() * keys.norm(dim=-1).max()) * problem.scale
    relative = 2 * problem.width * 2.0**-24 * score + keys.shape[2] * 2.0**-24 + 1e-6
    return wanted, relative * weighed + 1e-12


def _check(found: Tensor, wanted: Tensor, bound: Tensor, what: str) -> None:
    excess = ((found - wanted).abs() - bound).max()
    assert excess <= 0, f"{what}: {float(excess):.3g} beyond the bound"


# (batch, heads, kv heads, queries, keys)
SHAPES = [
    (1, 4, 1, 1, 1), (2, 4, 2, 1, 5), (1, 2, 2, 1, 300), (1, 3, 1, 1, 4096), (2, 8, 2, 7, 129), (1, 6, 2, 17, 200),
    (1, 2, 1, 40, 40), (2, 4, 2, 33, 150), (1, 3, 3, 150, 161), (1, 71, 1, 2, 65),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_reference(kernels: ctypes.CDLL, name: str) -> None:
    problem = PROBLEMS[name]
    for batch, heads, kv_heads, queries, length in SHAPES:
        query = _random((batch, queries, heads, problem.width), problem.query, 1)
        keys = _random((batch, length, kv_heads, problem.width), problem.cache, 2)
        values = _random((batch, length, kv_heads, problem.value_width), problem.cache, 3)
        by_head = [x.transpose(1, 2) for x in (query, keys, values)]
        wanted, bound = _reference(problem, *by_head, None, None)
        for threads in (1, 3):
            found = _call(
                kernels, name, threads, [batch, heads, kv_heads, queries, length],
                [query, keys, values, None, None], length, None, problem.value_width,
            )  # fmt: skip
            _check(found, wanted, bound, f"{(batch, heads, kv_heads, queries, length)}, {threads} threads")


@needs_compiler
@pytest.mark.parametrize("name", BIASED)
def test_bias(kernels: ctypes.CDLL, name: str) -> None:
    problem = BIASED[name]
    for batch, heads, kv_heads, queries, length in SHAPES:
        query = _random((batch, queries, heads, problem.width), "f32", 1)
        keys = _random((batch, length, kv_heads, problem.width), "f32", 2)
        values = _random((batch, length, kv_heads, problem.value_width), "f32", 3)
        bias = _random((1, heads, 1, length) if name == "biased" else (batch, 1, queries, length), "f32", 4)
        if name == "masked":
            bias = bias > 0
            bias[:, :, 0] = False
        wanted, bound = _reference(problem, *(x.transpose(1, 2) for x in (query, keys, values)), None, None, bias)
        for threads in (1, 3):
            found = _call(
                kernels, name, threads, [batch, heads, kv_heads, queries, length],
                [query, keys, values, None, None, bias], length, None, problem.value_width,
            )  # fmt: skip
            _check(found, wanted, bound, f"{(batch, heads, kv_heads, queries, length)}, {threads} threads")


@needs_compiler
@pytest.mark.parametrize("queries", [1, 3, 35])
@pytest.mark.parametrize("name", ["causal", "sliding", "chunked"])
def test_positions_in_a_longer_cache(kernels: ctypes.CDLL, name: str, queries: int) -> None:
    """Sequences of different lengths; what lies behind the last position is NaN and never read; sinks."""
    problem = PROBLEMS[name]
    batch, heads, kv_heads, length = 3, 4, 2, 700
    starts = torch.tensor([0, 130, length - queries - 5])
    positions = starts.unsqueeze(1) + torch.arange(queries)
    query = _random((batch, queries, heads, problem.width), "f32", 1)
    keys = _random((batch, length, kv_heads, problem.width), "f32", 2)
    values = _random((batch, length, kv_heads, problem.value_width), "f32", 3)
    sinks = _random((heads,), "f32", 4)
    wanted, bound = _reference(problem, *(x.transpose(1, 2) for x in (query, keys, values)), positions, sinks)
    for b in range(batch):
        keys[b, positions[b, -1] + 1 :] = torch.nan
        values[b, positions[b, -1] + 1 :] = torch.nan
    for threads in (1, 3):
        found = _call(
            kernels, name, threads, [batch, heads, kv_heads, queries, length], [query, keys, values, positions, sinks],
            length, None, problem.value_width,
        )  # fmt: skip
        _check(found, wanted, bound, f"{threads} threads")


@needs_compiler
def test_a_query_that_sees_nothing_gives_zeros(kernels: ctypes.CDLL) -> None:
    problem = PROBLEMS["causal"]
    for queries in (2, 40):
        query = _random((1, queries, 2, 64), "f32", 1)
        cache = _random((1, 50, 1, 64), "f32", 2)
        positions = torch.arange(queries).unsqueeze(0) - 1
        found = _call(
            kernels, "causal", 2, [1, 2, 1, queries, 50], [query, cache, cache, positions, None], 50, None, 64
        )
        assert bool((found[0, :, 0] == 0).all())
        assert bool((found[0, :, 1:] != 0).all())
        assert problem.mask == "causal"


@needs_compiler
@pytest.mark.parametrize("name", ["causal", "sliding", "halves"])
def test_paged(kernels: ctypes.CDLL, name: str) -> None:
    """Flat tokens of three sequences: a decode token, a chunk, a prefill; pages in random order."""
    problem = PROBLEMS[name]
    heads, kv_heads, page, pages = 6, 2, 16, 40
    generator = torch.Generator().manual_seed(5)
    table = torch.randperm(3 * pages, generator=generator).view(3, pages).contiguous()
    sequence_ids = torch.tensor([1] + [0] * 5 + [2] * 50)
    positions = torch.cat([torch.tensor([600]), torch.arange(200, 205), torch.arange(50)])
    tokens = len(sequence_ids)
    query = _random((tokens, heads, problem.width), problem.query, 1)
    keys = _random((3 * pages, page, kv_heads, problem.width), problem.cache, 2)
    values = _random((3 * pages, page, kv_heads, problem.value_width), problem.cache, 3)
    wanted, bounds = [], []
    for n in range(tokens):
        sequence = table[sequence_ids[n]]
        own = [cache[sequence].flatten(0, 1).transpose(0, 1).unsqueeze(0) for cache in (keys, values)]
        one, bound = _reference(problem, query[n, None, :, None], *own, positions[n].view(1, 1), None)
        wanted.append(one[0, :, 0])
        bounds.append(bound[0, :, 0])
    for threads in (1, 3):
        found = _call(
            kernels, f"paged_{name}", threads, [1, heads, kv_heads, tokens, pages * page],
            [query, keys, values, positions, None], page, (sequence_ids, table), problem.value_width,
        )  # fmt: skip
        _check(found[0].transpose(0, 1), torch.stack(wanted), torch.stack(bounds), f"{threads} threads")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bias": "i64"}, "bias in i64"),
        ({"query": "f64"}, "queries in f64"),
        ({"cache": "i16"}, "keys and values in i16"),
        ({"mask": "prefix"}, "known: full"),
        ({"mask": "sliding"}, "without a window"),
        ({"width": 1024}, "at most 512"),
    ],
)
def test_refuses(change: dict[str, object], reason: str) -> None:
    problem = replace(PROBLEMS["causal"], **change)
    found = template.refuses(problem, "avx2")
    assert found is not None
    assert reason in found
    with pytest.raises(TargetError, match=reason):
        template.call(problem, {}, "epilogue")
