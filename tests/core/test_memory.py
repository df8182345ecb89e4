"""Memory that is touched before it is needed: what is taken is zero, one's own, and given back by itself."""

from __future__ import annotations

import ctypes
import gc
import sys

import pytest
import torch
from torch import Tensor, nn

import irc
from irc import compiler
from irc.core import memory

MB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="mappings are made by hand on Linux only")


def pages_in_use(address: int, num_bytes: int) -> int | None:
    """Pages of a range that are in memory; None where nothing is mapped."""
    count = -(-num_bytes // 4096)
    found = (ctypes.c_ubyte * count)()
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), found):
        return None
    return sum(byte & 1 for byte in found)


def test_without_a_reserve_it_is_torch_empty() -> None:
    made = memory.empty((3, 1 << 20), torch.float16)
    assert made.shape == (3, 1 << 20)
    assert made.dtype is torch.float16
    memory.expect(1 << 30)  # nobody listens


@linux
def test_what_is_taken_is_zero_and_of_its_own() -> None:
    with memory.ahead() as reserve:
        memory.expect(16 * MB)
        reserve.start()
        blocks = [
            memory.empty((512, 1024), torch.int32),
            memory.large_memory(3 * MB + 5),
            memory.empty((MB,), torch.int8),
        ]
        for number, block in enumerate(blocks):
            assert not block.any()
            block.fill_(number + 1)
    assert [sorted(set(block.flatten().tolist())) for block in blocks] == [[1], [2], [3]]


@linux
def test_pages_are_found_ahead() -> None:
    with memory.ahead() as reserve:
        memory.expect(40 * MB)
        reserve.start()
        assert reserve._thread is not None
        reserve._thread.join(timeout=60)
        block = reserve.take(40 * MB)
        beyond = reserve.take(20 * MB)  # expectations are rough: there is room for more, but nobody touched it
        assert block is not None
        assert beyond is not None
        assert pages_in_use(block.data_ptr(), 40 * MB) == 40 * MB // 4096
        assert pages_in_use(beyond.data_ptr() + 2 * MB, 16 * MB) == 0
        assert reserve.take(1 << 40) is None
        assert memory.large_memory(80 * MB).numel() == 80 * MB


@linux
def test_wrong_expectations_take_a_share_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.os, "sysconf", lambda name: 64 * MB // 4096)
    with memory.ahead() as reserve:
        memory.expect(1 << 34)
        reserve.start()
        assert reserve._thread is not None
        reserve._thread.join(timeout=60)
        block = reserve.take(32 * MB)
        assert block is not None
        assert pages_in_use(block.data_ptr(), 32 * MB) == 16 * MB // 4096


@linux
def test_each_block_is_given_back_by_itself() -> None:
    with memory.ahead() as reserve:
        memory.expect(16 * MB)
        reserve.start()
        first, second, rest = reserve.take(4 * MB), reserve.take(4 * MB), reserve._next
    assert first is not None
    assert second is not None
    kept, gone = second[5:], first.data_ptr()
    del first, second
    gc.collect()
    assert pages_in_use(gone, 4096) is None
    assert pages_in_use(rest, 4096) is None  # what was not taken
    assert pages_in_use(kept.data_ptr() // 4096 * 4096, 4096) == 1
    assert not kept.any()


@linux
def test_takers_wait_for_what_is_being_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ctypes.memset
    touched = []

    def slow(address: int, value: int, size: int) -> None:
        touched.append((address, size))
        ctypes.CDLL(None).usleep(20_000)
        plain(address, value, size)

    monkeypatch.setattr(memory.ctypes, "memset", slow)
    with memory.ahead() as reserve:
        memory.expect(96 * MB)
        reserve.start()
        blocks: list[Tensor] = []
        for number in range(12):
            block = reserve.take(8 * MB)
            assert block is not None
            blocks.append(block.fill_(number + 1))
    assert touched
    assert [int(block.min()) for block in blocks] == [int(block.max()) for block in blocks] == list(range(1, 13))


def test_a_compilation_is_the_same_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    x = torch.randn(2, 512)
    expected = irc.compile(model, "quantize-weights{bits=8}", example_inputs=x)
    taken: list[int] = []
    take = memory.Reserve.take
    monkeypatch.setattr(memory.Reserve, "take", lambda self, size: taken.append(size) or take(self, size))
    monkeypatch.setattr(compiler, "_LARGE", 1 << 20)
    found = irc.compile(model, "quantize-weights{bits=8}", example_inputs=x)
    assert taken == [512 * 1024] * 2
    assert torch.equal(found(x), expected(x))
