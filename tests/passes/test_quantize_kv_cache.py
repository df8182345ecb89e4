"""Quantized key-value caches: signature, metadata, numbers through steps, generation, refusals."""

from __future__ import annotations

import pytest
import torch

import irc
from irc.core.errors import OptionError, PassError
from irc.core.kv_cache import KVCache
from irc.core.ops import is_irc_op
from irc.core.pipeline import parse_pipeline, print_pipeline
from irc.core.program import Program
from irc.core.target import get_target
from irc.passes import InsertKVCache, QuantizeKVCache
from irc.runtime.engine import EngineOptions
from tests import zoo

each_format = pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
BYTES = {"int8": 8 + 4, "int4": 4 + 4, "fp8": 8 + 4}


@pytest.fixture(scope="module")
def step() -> Program:
    return irc.PassManager([InsertKVCache(max_length=32)], verify="off").run(zoo.captured("llama")).program


def quantized(step: Program, format: str):
    return irc.PassManager([QuantizeKVCache(format=format)]).run(step)


@each_format
def test_rewrite(step: Program, format: str) -> None:
    result = quantized(step, format)
    program, row = result.program, result.report.rows[-1]
    assert row.matches == 4
    cache = KVCache.of(program)
    assert cache is not None
    assert [c.name for c in cache.caches][:2] == ["cache_k_0", "cache_k_0_scale"]
    assert {c.stores for c in cache.caches} == {
        {"int8": "int8.row", "int4": "int4.row", "fp8": "f8e4m3.row"}[format],
        None,
    }
    assert len(program.outputs) == 1 + len(cache.caches) == len(program.placeholders) - 2
    # 4 caches of 2 heads, 32 positions, 8 numbers each.
    assert row.statistics == {"bytes_before": 4 * 2 * 32 * 8 * 4, "bytes_after": 4 * 2 * 32 * BYTES[format]}
    assert sum(t.numel() * t.element_size() for t in cache.empty(1)) == cache.num_bytes() == 4 * 64 * BYTES[format]
    assert sum(is_irc_op(n.target, "cache_write") for n in program.graph.nodes) == 8
    parsed = irc.parse(str(program), weights=program.weights)
    assert str(parsed) == str(program)
    again = quantized(program, format).report.rows[-1]
    assert (again.matches, again.modified, len(again.skips)) == (0, False, 8)


@each_format
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 9), (3, 4)])
def test_numbers_read_back_are_within_half_a_step(step: Program, format: str, batch: int, length: int) -> None:
    program = quantized(step, format).program
    cache, plain = KVCache.of(program), KVCache.of(step)
    assert cache is not None
    assert plain is not None
    tokens = zoo.token_ids(batch, length)
    positions = torch.arange(length).expand(batch, -1).contiguous()
    expected = step.run(tokens, positions, positions, *plain.empty(batch))
    found = program.run(tokens, positions, positions, *cache.empty(batch))
    assert float((found[0] - expected[0]).abs().max()) <= 0.3 * float(expected[0].abs().max())
    first, stored, scale = expected[1], found[1], found[2]
    text = "f8e4m3.row" if format == "fp8" else f"{format}.row"
    back = torch.ops.irc.dequantize(stored, scale, None, format=text)
    if format == "fp8":
        bound = first.abs() / 16 + first.abs().amax(-1, keepdim=True) / 448 / 1024
    else:
        bound = first.abs().amax(-1, keepdim=True) / (127 if format == "int8" else 7) / 2
    assert bool(((back - first).abs() <= bound * 1.001).all())
    assert not torch.equal(back, first)


@each_format
def test_generation_equals_the_program_run_by_hand(step: Program, format: str) -> None:
    """The compiled steps write in place; run functionally, token by token, the program gives the same."""
    program = quantized(step, format).program
    prompts = [[5, 9, 11], [7, 20, 30, 31, 32]]
    made = irc.compile(program).generate(prompts, max_new_tokens=6).token_ids
    cache = KVCache.of(program)
    assert cache is not None
    for prompt, tokens in zip(prompts, made, strict=True):
        ids, caches, position = list(prompt), cache.empty(1), 0
        new = torch.tensor([prompt])
        for _ in range(6):
            count = new.shape[1]
            positions = torch.arange(position, position + count).view(1, -1)
            logits, *caches = program.run(new, positions, torch.tensor([[count - 1]]), *caches)
            ids.append(int(logits[0, -1].argmax()))
            position, new = position + count, torch.tensor([[ids[-1]]])
        assert ids[len(prompt) :] == tokens


@each_format
def test_pages(format: str) -> None:
    """Pages hold the numbers of the contiguous cache, and an engine over them gives the tokens that it gives."""
    passes = [InsertKVCache(max_length=32, layout="paged", block_size=4), QuantizeKVCache(format=format)]
    result = irc.PassManager(passes).run(zoo.captured("llama"))
    program, row = result.program, result.report.rows[-1]
    cache = KVCache.of(program)
    assert row.matches == 4
    assert cache is not None
    assert cache.num_bytes(1) == 4 * 2 * 4 * BYTES[format]
    assert [page.shape[1:3] for page in cache.empty(3)] == [(4, 2)] * 8
    contiguous = quantized(irc.PassManager([InsertKVCache(max_length=32)]).run(zoo.captured("llama")).program, format)
    prompts = [[5, 9, 11], [7, 20, 30, 31, 32, 40]]
    expected = irc.compile(contiguous.program).generate(prompts, max_new_tokens=12).token_ids
    assert irc.compile(program).generate(prompts, max_new_tokens=12).token_ids == expected
    options = EngineOptions(memory_bytes=5 * cache.num_bytes(1))
    small = irc.compile(program).generate(prompts, max_new_tokens=12, options=options)
    assert small.token_ids == expected  # with room for one of them: the other waits, or is computed again


def test_a_cache_of_another_type_is_quantized_too(step: Program) -> None:
    passes = [InsertKVCache(max_length=32, cache_dtype="bf16"), QuantizeKVCache()]
    result = irc.PassManager(passes).run(zoo.captured("llama"))
    assert result.report.rows[-1].matches == 4


def test_onnx_gives_the_same_numbers(step: Program) -> None:
    program = quantized(step, "int8").program
    assert get_target("onnx").lower(program).verify(program).passed


def test_onnx_refuses_fp8_with_the_reason(step: Program) -> None:
    coverage = get_target("onnx").check(quantized(step, "fp8").program)
    assert len(coverage.refused) == 5
    packed = get_target("onnx").check(quantized(step, "int4").program)
    assert "irc.quantize × 4: packs 4-bit numbers at run time" in str(packed)
    assert "cache_k_0 × 1: ONNX Runtime's CPU kernels move no f8e4m3 numbers" in str(coverage)


def test_refusals(step: Program) -> None:
    with pytest.raises(PassError, match="the program has no key-value cache: run insert-kv-cache before"):
        quantized(zoo.captured("llama"), "int8")
    spoiled = step.copy()
    node = spoiled.placeholders[3]
    write = next(iter(node.users))
    write.replace_input_with(node, spoiled.insert(torch.ops.aten.neg.default, node, before=write))
    reason = QuantizeKVCache().run(spoiled, irc.PassContext()).skips[0].reason
    assert reason == "cache_k_0 is read by neg, not only by its own write"


def test_options() -> None:
    with pytest.raises(OptionError, match=r"no cache format is called 'int9' \(did you mean 'int"):
        QuantizeKVCache(format="int9")
    assert parse_pipeline(print_pipeline([QuantizeKVCache(format="fp8")])) == [QuantizeKVCache(format="fp8")]
