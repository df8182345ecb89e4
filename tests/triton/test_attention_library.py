"""Attention kernels against the reference ops, in Triton's interpreter or on a GPU, and compiled ahead of time for two.

On a machine with a GPU, `pytest tests/triton/test_attention_library.py` runs the same cases as compiled kernels.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import irc  # noqa: F401  registers the reference ops
from irc.core.errors import TargetError
from irc.lowering.triton.templates import attention as template
from irc.lowering.triton.templates.attention import AttentionProblem, Config

NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bool: "bool"}
ONE = Config(block_rows=16, block_keys=16)
SPLIT = Config(block_rows=16, block_keys=16, splits=3)
ON_GPU = torch.cuda.is_available()
TOLERANCE = 2e-5 if ON_GPU else 3e-6  # sums of f32 in another order, of outputs around 1; tf32x3 on a GPU

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Any:
    """Triton decides when it is imported, so kernels run here only where nothing has imported it for compiling."""
    if not ON_GPU:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from irc.lowering.triton.library.attention import attend

    if not ON_GPU and type(attend).__name__ != "InterpretedFunction":
        pytest.skip("triton was imported in this process before TRITON_INTERPRET was set")


def problem_of(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> AttentionProblem:
    bias = options.get("bias")
    return AttentionProblem(
        width=query.shape[-1], value_width=value.shape[-1], query=NAMES[query.dtype], cache=NAMES[key.dtype],
        mask=options.get("mask", "full"), window=options.get("window"), scale=options.get("scale", 1.0),
        softcap=options.get("softcap"), bias=None if bias is None else NAMES[bias.dtype],
    )  # fmt: skip


def broadcast_strides(bias: Tensor | None) -> list[int]:
    if bias is None:
        return [0, 0, 0, 0]
    return [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)]


def attend(query: Tensor, key: Tensor, value: Tensor, config: Config | None = None, **options: Any) -> Tensor:
    """The kernels' result [B, H, S, Dv], stored with heads side by side; memory holds NaN before."""
    query, key, value, options = moved(query), moved(key), moved(value), moved(options)
    (batch, heads, queries, _), (kv_heads, length) = query.shape, key.shape[1:3]
    problem = problem_of(query, key, value, **options)
    config = config or template.choose(problem, batch, heads, kv_heads, queries, length)
    out = moved(torch.full((batch, queries, heads, value.shape[-1]), torch.nan, dtype=value.dtype)).transpose(1, 2)
    scratch = moved(torch.full((template.scratch_elements(problem, config, batch * queries, heads),), torch.nan))
    bias = options.get("bias")
    template.launch(
        problem, config, out, query, key, value, batch=batch, heads=heads, kv_heads=kv_heads, queries=queries,
        length=length, out_strides=out.stride()[:3], query_strides=query.stride()[:3], key_strides=key.stride()[:3],
        value_strides=value.stride()[:3], positions=options.get("positions"), sinks=options.get("sinks"), bias=bias,
        bias_strides=broadcast_strides(bias), bias_keys=0 if bias is None else bias.shape[-1],
        scratch=scratch if config.splits > 1 else None,
    )  # fmt: skip
    return out.cpu()


def paged_attend(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, sequence_ids: Tensor, positions: Tensor,
    config: Config, **options: Any,
) -> Tensor:  # fmt: skip
    """The kernels' result [N, H, Dv]."""
    query, keys, values, tables, sequence_ids, positions, options = (
        moved(x) for x in (query, keys, values, tables, sequence_ids, positions, options)
    )
    (tokens, heads, _), (page, kv_heads) = query.shape, keys.shape[1:3]
    bias = options.get("bias")
    problem = problem_of(query, keys, values, mask="causal", **options)
    out = moved(torch.full((tokens, heads, values.shape[-1]), torch.nan, dtype=values.dtype))
    scratch = moved(torch.full((template.scratch_elements(problem, config, tokens, heads),), torch.nan))
    bias_strides = broadcast_strides(bias)
    template.launch(
        problem, config, out, query, keys, values, batch=1, heads=heads, kv_heads=kv_heads, queries=tokens,
        length=tables.shape[1] * page, out_strides=[0, *_head_row(out)], query_strides=[0, *_head_row(query)],
        key_strides=[keys.stride(0), keys.stride(2), keys.stride(1)],
        value_strides=[values.stride(0), values.stride(2), values.stride(1)], positions=positions,
        sinks=options.get("sinks"), bias=bias,
        bias_strides=(0, 0, 0, 0) if bias is None else (0, bias_strides[1], bias_strides[0], bias_strides[2]),
        bias_keys=0 if bias is None else bias.shape[-1], tables=tables, table_stride=tables.stride(0),
        sequence_ids=sequence_ids, page_size=page, scratch=scratch if config.splits > 1 else None,
    )  # fmt: skip
    return out.cpu()


def moved(x: Any) -> Any:
    """Tensors to where kernels run."""
    if isinstance(x, dict):
        return {name: moved(value) for name, value in x.items()}
    return x.to("cuda") if ON_GPU and isinstance(x, Tensor) else x


def _head_row(x: Tensor) -> tuple[int, int]:
    return x.stride(1), x.stride(0)


def operands(batch: int, heads: int, kv_heads: int, queries: int, length: int, width: int = 16, value_width: int = 16,
             dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries with heads side by side in memory, as a layer writes them; keys and values as a cache has them."""
    generator = torch.Generator().manual_seed(queries * 100 + length)
    query = torch.randn(batch, queries, heads, width, generator=generator, dtype=dtype).transpose(1, 2)
    key = torch.randn(batch, kv_heads, length, width, generator=generator, dtype=dtype)
    return query, key, torch.randn(batch, kv_heads, length, value_width, generator=generator, dtype=dtype)


def check(config: Config | None, q: Tensor, k: Tensor, v: Tensor, tolerance: float = TOLERANCE, **options: Any) -> None:
    options = {"scale": q.shape[-1] ** -0.5, **options}
    expected = torch.ops.irc.attention(q, k, v, **options)
    torch.testing.assert_close(attend(q, k, v, config, **options), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("mask", "window", "config"),
    [("full", None, ONE), ("causal", None, ONE), ("sliding", 18, ONE), ("chunked", 24, ONE), ("causal", None, SPLIT),
     ("sliding", 18, SPLIT)],
)  # fmt: skip
def test_masks(mask: str, window: int | None, config: Config) -> None:
    # Four rows a query: the tiles start within the keys, so every mask has blocks left out, compared and not compared.
    check(config, *operands(1, 4, 1, 5, 67), mask=mask, window=window)


@pytest.mark.parametrize(
    ("mask", "window", "config"),
    [("causal", None, ONE), ("sliding", 7, ONE), ("chunked", 8, ONE), ("chunked", 8, SPLIT)],
)
def test_positions_of_each_query(mask: str, window: int | None, config: Config) -> None:
    positions = torch.tensor([[3, 40, -1], [0, 20, 21]])  # -1 sees nothing
    q, k, v = operands(2, 2, 1, 3, 41)
    check(config, q, k, v, mask=mask, window=window, positions=positions)


def test_more_queries_than_keys() -> None:
    """By default the last query sees the last key, so the first ones see nothing."""
    check(ONE, *operands(1, 2, 2, 20, 5), mask="causal")


@pytest.mark.parametrize(("width", "value_width"), [(24, 16), (80, 24)])
def test_widths(width: int, value_width: int) -> None:
    check(ONE, *operands(1, 3, 1, 4, 19, width, value_width), mask="causal")
    check(SPLIT, *operands(1, 3, 1, 1, 19, width, value_width), mask="causal")


@pytest.mark.parametrize("config", [ONE, SPLIT], ids=["one", "split"])
def test_softcap_and_sinks(config: Config) -> None:
    q, k, v = operands(2, 4, 2, 1, 23)
    check(config, q * 5, k, v, mask="causal", softcap=2.0)
    sinks = torch.tensor([0.5, -torch.inf, 3.0, -1.0])
    check(config, q, k, v, mask="causal", sinks=sinks)
    check(config, q, k, v, mask="causal", sinks=sinks, positions=torch.tensor([[-1], [5]]))


@pytest.mark.parametrize("config", [ONE, SPLIT], ids=["one", "split"])
def test_additive_bias(config: Config) -> None:
    q, k, v = operands(1, 4, 2, 3, 21)
    bias = torch.randn(1, 4, 3, 21, generator=torch.Generator().manual_seed(1))
    bias[0, 1, 2] = -torch.inf  # a row that sees nothing
    bias[0, 2, 1] = torch.finfo(torch.float32).min  # one that sees all keys alike, as libraries write masks
    check(config, q, k, v, bias=bias, softcap=3.0)
    check(config, q, k, v, bias=bias[:, :1, :, :], mask="causal", sinks=torch.randn(4))
    check(config, q, k, v, bias=bias[:, :, :1, :].half())
    check(config, q, k, v, bias=bias[:, :, :, :1])


@pytest.mark.parametrize("config", [ONE, SPLIT], ids=["one", "split"])
def test_boolean_bias(config: Config) -> None:
    q, k, v = operands(2, 2, 2, 3, 21)
    keep = torch.rand(2, 1, 3, 21, generator=torch.Generator().manual_seed(1)) > 0.4
    keep[1, 0, 2] = False
    check(config, q, k, v, bias=keep, mask="causal")


def test_types() -> None:
    q, k, v = operands(1, 4, 2, 5, 37, dtype=torch.float16)
    check(ONE, q, k, v, tolerance=2e-3, mask="causal")
    # A cache in 16 bits for queries in f32: as exact as f32, of what the cache holds, and stored in the cache's type.
    wide = torch.ops.irc.attention(q.float(), k.float(), v.float(), mask="causal", scale=0.25)
    got = attend(q.float(), k, v, SPLIT, mask="causal", scale=0.25)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, wide.half(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 2, 1, 5), (1, 8, 1, 20, 33)])
def test_chosen_blocks(shape: tuple[int, ...]) -> None:
    check(None, *operands(*shape), mask="causal")


def test_keys_that_no_query_sees_are_not_read() -> None:
    """A cache holds anything behind the last token: even NaN, which times a weight of 0 would be NaN."""
    q, k, v = operands(1, 2, 1, 1, 50)
    positions = torch.tensor([[20]])
    expected = torch.ops.irc.attention(q, k, v, mask="sliding", window=10, scale=0.25, positions=positions)
    k[:, :, 21:], v[:, :, 21:], k[:, :, :0], v[:, :, :0] = [torch.nan] * 4
    for config in (ONE, SPLIT):
        got = attend(q, k, v, config, mask="sliding", window=10, scale=0.25, positions=positions)
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


# Two prompts, sequences with one token, one that comes back later, and an end within a tile.
IDS = [2, 2, 2, 2, 2, 0, 1, 1, 1, 3, 0]
POSITIONS = [9, 10, 11, 12, 13, 22, 0, 1, 2, 7, 23]


@pytest.mark.parametrize(
    ("page", "heads", "kv_heads", "config"),
    [(5, 3, 1, ONE), (5, 3, 1, replace(ONE, extra=2)), (16, 4, 2, replace(ONE, extra=1)), (5, 2, 1, SPLIT),
     (5, 2, 1, replace(SPLIT, extra=3))],
)  # fmt: skip
def test_pages(page: int, heads: int, kv_heads: int, config: Config) -> None:
    generator = torch.Generator().manual_seed(page)
    blocks = -(-24 // page)
    tables = torch.randperm(4 * blocks, generator=generator).view(4, blocks)
    q = torch.randn(len(IDS), heads, 24, generator=generator)
    k = torch.randn(4 * blocks, page, kv_heads, 24, generator=generator)
    v = torch.randn(4 * blocks, page, kv_heads, 16, generator=generator)
    where = tables, torch.tensor(IDS), torch.tensor(POSITIONS)
    options: dict[str, Any] = {"scale": 0.3, "sinks": torch.randn(heads)}
    expected = torch.ops.irc.paged_attention(q, k, v, *where, **options)
    torch.testing.assert_close(paged_attend(q, k, v, *where, config, **options), expected, rtol=0, atol=TOLERANCE)


def test_bias_over_pages() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = torch.randperm(8, generator=generator).view(4, 2)
    q, bias = torch.randn(11, 2, 16, generator=generator), torch.randn(11, 2, 24, generator=generator)
    k, v = (torch.randn(8, 16, 2, 16, generator=generator) for _ in range(2))
    where = tables, torch.tensor(IDS), torch.tensor(POSITIONS)
    expected = torch.ops.irc.paged_attention(q, k, v, *where, bias=bias)
    torch.testing.assert_close(paged_attend(q, k, v, *where, ONE, bias=bias), expected, rtol=0, atol=TOLERANCE)


def test_refusals() -> None:
    plain = AttentionProblem(width=64, value_width=64, mask="causal")
    assert template.refuses(plain) is None
    for change, words in [
        ({"bias": "i64"}, "a bias in i64"), ({"query": "f64"}, "queries in f64"), ({"cache": "i8"}, "values in i8"),
        ({"mask": "prefix"}, "mask 'prefix'"), ({"mask": "sliding"}, "without a window"), ({"width": 320}, "most 256"),
        ({"value_width": 0}, "at most 256"), ({"scale": 0.0}, "must be positive"), ({"softcap": -1.0}, "positive"),
    ]:  # fmt: skip
        assert words in (template.refuses(replace(plain, **change)) or "")
    assert "129 query heads" in (template.refuses(plain, group=129, paged=True) or "")
    assert template.refuses(plain, group=129) is None


def test_launch_says_what_it_lacks() -> None:
    q, k, v = operands(1, 2, 1, 1, 5)
    with pytest.raises(TargetError, match="heads of 320"):
        attend(torch.zeros(1, 2, 1, 320), torch.zeros(1, 1, 5, 320), v, ONE)
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 1, "length": 5}
    strides = {f"{name}_strides": (0, 0, 0) for name in ("out", "query", "key", "value")}
    with pytest.raises(TargetError, match="in 3 parts needs scratch"):
        template.launch(problem_of(q, k, v), SPLIT, q, q, k, v, **sizes, **strides)
    with pytest.raises(TargetError, match="needs positions"):
        template.launch(problem_of(q, k, v), ONE, q, q, k, v, **sizes, **strides, page_size=4)


def test_choices() -> None:
    """Few queries share a tile of 16 rows and split the keys until the GPU is full; many fill it with tiles."""
    half = AttentionProblem(width=128, value_width=128, query="bf16", cache="bf16", mask="causal")
    decode = template.choose(half, 1, 32, 4, 1, 32768)
    assert decode.block_rows == 16
    assert 132 <= 4 * decode.splits <= 3 * 132
    assert template.choose(half, 64, 32, 4, 1, 4096).splits == 1
    assert template.choose(half, 1, 32, 4, 1, 100).splits == 1
    prefill = template.choose(half, 1, 32, 4, 2048, 2048)
    assert (prefill.block_rows, prefill.splits) == (128, 1)
    # A prompt's parts are more than its keys: 512 tokens of 32 heads in 2 parts are 17 MB, to be read from 0.5 MB.
    for width in (64, 128):
        short = template.choose(replace(half, width=width, value_width=width), 1, 32, 4, 512, 512)
        assert (short.block_rows, short.splits) == (64, 1)
    # Behind a long cache the parts of few tokens are little, and their program has much to read.
    assert template.choose(half, 1, 32, 4, 16, 32768).splits > 8
    assert template.choose(half, 8, 64, 1, 8, 4096, page_size=16).block_rows >= 64
    # A token of each sequence has a program each; of prompts a tile, and one for each sequence that begins within one.
    assert template.choose(half, 8, 32, 4, 8, 4096, page_size=16).extra is None
    assert template.choose(half, 1, 32, 4, 2048, 2048, page_size=16).extra == 0
    assert template.choose(half, 8, 32, 4, 2048, 2048, page_size=16).extra == 7
    assert template.scratch_elements(half, decode, 1, 32) == 32 * decode.splits * 130
    assert template.scratch_elements(half, prefill, 2048, 32) == 0


def test_compiles_ahead_of_time() -> None:
    """For an A100 and an H100: tensor cores, 16-byte copies into shared memory, and hardly a register spilled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_attention.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for name, kernel in found.items():
        if "attend" in name:
            product = "wgmma.mma_async" if "prefill" in name and name.endswith("sm_90") else "mma.sync"
            assert kernel[product] > 0, name
            # ptxas says that it lets every product wait for the one before (C7515) only to those who ask.
            assert product == "mma.sync" or 4 * kernel["waits"] <= kernel["products"], name
            assert kernel["cp.async, 16 bytes"] > 0, name
        assert kernel["stack"] <= 16, f"{name} spills {kernel['stack']} bytes a thread"
    assert len(found) == 6
