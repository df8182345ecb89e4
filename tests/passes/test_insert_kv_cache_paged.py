"""The paged layout of cache insertion: the step over flat tokens, its numbers, and the reference target's fast path."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from irc.core.contract import PassContext, PassResult
from irc.core.errors import OptionError, TargetError
from irc.core.kv_cache import KVCache
from irc.core.manager import PassManager
from irc.core.ops.registry import is_irc_op
from irc.core.paged import StepInputs
from irc.core.program import Program
from irc.core.target import get_target
from irc.core.text import parse
from irc.passes.attention.insert_kv_cache import InsertKVCache
from tests import zoo

BLOCK = 4
PAGED = InsertKVCache(layout="paged", block_size=BLOCK, max_length=32)


@functools.cache
def inserted(name: str) -> PassResult:
    return PAGED.run(zoo.captured(name).copy(), PassContext())


def step(name: str) -> Program:
    return inserted(name).program


def test_step_program_has_the_promised_inputs_outputs_and_metadata() -> None:
    program = step("tinypy")
    names = ["input_ids", "positions", "sequence_ids", "block_tables", "slots", "logit_indices"]
    assert program.input_names == [*names, "cache_k_0", "cache_v_0", "cache_k_1", "cache_v_1"]
    types = [program.type_text(node) for node in program.placeholders]
    assert types == [
        "i64[N]", "i64[N]", "i64[N]", "i64[Q, M]", "i64[N]", "i64[R]", *["f32[K, 4, 4, 8]"] * 4
    ]  # fmt: skip
    assert program.type_text(program.outputs[0]) == "f32[R, 96]"
    assert program.aliases == {1: 6, 2: 7, 3: 8, 4: 9}
    cache = KVCache.of(program)
    assert cache is not None
    assert (cache.layout, cache.block_size, cache.max_length) == ("paged", BLOCK, 32)
    assert cache.num_bytes(3) == 3 * 4 * BLOCK * 4 * 8 * 4 == sum(t.numel() * 4 for t in cache.empty(3))
    assert PAGED.ensures(zoo.captured("tinypy"), inserted("tinypy")) == []
    assert str(parse(str(program), weights=program.weights)) == str(program)
    assert sum(is_irc_op(n.target, "paged_attention") for n in program.operations()) == inserted("tinypy").matches == 2


def test_manager_verifies_it() -> None:
    report = PassManager([PAGED]).run(zoo.captured("llama")).report
    assert report.rows[-1].relative_error is not None
    assert report.rows[-1].relative_error < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral", "bloom", "gpt-oss", "qwen3-moe", "nanogpt"])
def test_replay_equals_the_program(name: str) -> None:
    """Windows, biases, sinks, experts, learned positions: over blocks in mixed order, in parts."""
    ids, result = zoo.token_ids(3, 13, seed=5), inserted(name)
    assert result.replay is not None
    expected = zoo.captured(name).run(ids)[0].detach()
    made = result.replay(result.program, [ids])[0].detach()
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def rows(program: Program, *parts: tuple[int, list[int], list[int], list[int]]) -> StepInputs:
    """A step from parts (row of the table, its blocks, token ids, positions)."""
    width = max(len(blocks) for _, blocks, _, _ in parts)
    tables = torch.tensor([[*blocks, *[0] * (width - len(blocks))] for _, blocks, _, _ in parts])
    tokens = torch.tensor([t for _, _, ids, _ in parts for t in ids])
    positions = torch.tensor([p for *_, at in parts for p in at])
    sequences = torch.tensor([row for row, _, ids, _ in parts for _ in ids])
    slots = tables[sequences, positions // BLOCK] * BLOCK + positions % BLOCK
    return StepInputs(tokens, positions, sequences, tables, slots, torch.arange(len(tokens)))


@pytest.mark.parametrize("name", ["llama", "mistral", "bloom", "gpt-oss"])
def test_reference_target_on_mixed_steps(name: str) -> None:
    """Prefill of one sequence beside decoding of others, a shared first block, padding: as the program says."""
    program = step(name)
    artifact = get_target("reference").lower(program)
    ids = zoo.token_ids(3, 16, seed=8).tolist()
    ids[1][:BLOCK] = ids[0][:BLOCK]
    cache = KVCache.of(program)
    assert cache is not None
    owned, plain = artifact.new_pages(9), cache.empty(9)
    steps = [
        rows(program, (0, [7, 2], ids[0][:6], list(range(6)))),
        rows(program, (0, [7, 2], ids[0][6:7], [6]), (1, [7, 5, 3], ids[1][4:11], list(range(4, 11)))),
        rows(
            program, (0, [7, 2], ids[0][7:8], [7]), (1, [7, 5, 3], ids[1][11:12], [11]), (2, [0], ids[2][:3], [0, 1, 2])
        ),
        rows(program, (0, [7, 2, 8], ids[0][8:11], [8, 9, 10]), (1, [0, 1], ids[2][3:6], [3, 4, 5])),
    ]  # fmt: skip
    for inputs in steps:
        expected, *plain = program.run(*inputs.flat(), *plain)
        made = artifact.paged_step(owned, inputs)
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    for mine, theirs in zip(owned, plain, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=1e-5)
    assert artifact.verify(program).passed


def test_padding_is_not_written() -> None:
    artifact = get_target("reference").lower(step("llama"))
    inputs = rows(step("llama"), (0, [3], [5, 6, 7], [0, 1, 2]))
    inputs.slots[1] = -1
    pages = artifact.new_pages(5)
    artifact.paged_step(pages, inputs)
    assert [bool(page[3, at].any()) for page in pages for at in range(3)] == [True, False, True] * len(pages)
    assert not any(bool(page[:3].any()) for page in pages)


def test_whole_rows_and_copied_blocks() -> None:
    program, ids = step("llama"), zoo.token_ids(2, 11, seed=1)
    artifact = get_target("reference").lower(program)
    expected = zoo.captured("llama").run(ids)[0].detach()
    torch.testing.assert_close(artifact.whole_rows(ids), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(OptionError, match="33 tokens do not fit into a key-value cache of 32"):
        artifact.whole_rows(zoo.token_ids(1, 33, seed=1))
    with pytest.raises(TargetError, match="has a paged key-value cache, not a contiguous one"):
        artifact.new_caches(1)
    pages = artifact.new_pages(4)
    artifact.paged_step(pages, rows(program, (0, [1], [4, 5], [0, 1])))
    artifact.copy_blocks(pages, [1, 1], [3, 0])
    assert all(bool(page[1].any()) and torch.equal(page[1], page[3]) for page in pages)
    assert all(torch.equal(page[1], page[0]) for page in pages)


def test_one_row_of_logits_for_each_wanted_token() -> None:
    artifact = get_target("reference").lower(step("llama"))
    inputs = rows(step("llama"), (0, [1], [4, 5, 6], [0, 1, 2]))
    whole = artifact.paged_step(artifact.new_pages(2), inputs)
    wanted = StepInputs(*inputs.flat()[:5], torch.tensor([2, 0]))
    torch.testing.assert_close(artifact.paged_step(artifact.new_pages(2), wanted), whole[[2, 0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layout": "page"}, r"unknown layout 'page' \(did you mean 'paged'"), ({"block_size": 0}, "block-size must be")],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        InsertKVCache(**options)
