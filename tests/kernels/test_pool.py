"""The thread pool: every chunk once, barriers order memory, sleeping workers wake up."""

from __future__ import annotations

import ctypes
import time

import pytest
import torch

from tests.kernels.building import build, needs_compiler, pointer

_SOURCE = """
// Rounds of a shared loop with a barrier after each; the second half reads what other workers wrote in the first.
extern "C" int64_t rounds(int threads, int64_t count, int64_t chunks, int64_t* hits, int64_t* sums) {
    int64_t wrong = 0;
    auto body = [&](irc::Worker& worker) {
        int64_t bad = 0;
        for (int64_t round = 0; round < count; ++round) {
            irc::for_chunks(worker, chunks, [&](int64_t chunk) { hits[chunk] += 1; });
            worker.barrier();
            irc::for_chunks(worker, chunks, [&](int64_t chunk) {
                if (hits[chunks - 1 - chunk] != round + 1) ++bad;
                sums[chunk] += hits[chunks - 1 - chunk];
            });
            irc::for_chunks(worker, chunks, [&](int64_t) {});
            worker.barrier();
        }
        __atomic_fetch_add(&wrong, bad, __ATOMIC_RELAXED);
    };
    pool(threads).run(body);
    return wrong;
}
extern "C" int64_t workers(int threads) {
    int64_t seen = 0;
    auto body = [&](irc::Worker& worker) {
        __atomic_fetch_add(&seen, int64_t{1} << (8 * worker.index), __ATOMIC_RELAXED);
    };
    pool(threads).run(body);
    return seen;
}
"""


@pytest.fixture(scope="module")
def pool() -> ctypes.CDLL:
    library = build((), (_SOURCE,), "plain")
    library.rounds.restype = library.workers.restype = ctypes.c_int64
    return library


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chunks", [1, 2, 7, 100])
def test_every_chunk_once_a_round(pool: ctypes.CDLL, threads: int, chunks: int) -> None:
    hits, sums = torch.zeros(chunks, dtype=torch.int64), torch.zeros(chunks, dtype=torch.int64)
    count = 200
    for run in range(3):
        wrong = pool.rounds(
            threads, ctypes.c_int64(count), ctypes.c_int64(chunks), pointer(hits.zero_()), pointer(sums.zero_())
        )
        assert wrong == 0, f"run {run}"
        assert hits.tolist() == [count] * chunks
        assert sums.tolist() == [count * (count + 1) // 2] * chunks


@needs_compiler
def test_sleeping_workers_wake_up(pool: ctypes.CDLL) -> None:
    for _ in range(3):
        time.sleep(0.02)  # longer than workers spin
        assert pool.workers(3) == 0x010101
