"""How fast the threads read memory together: the limit of everything that reads each weight once.

    python benchmarks/bandwidth.py --threads 2      # GB/s for 1, 2, 4, 8 and 16 streams a thread

The threads share a buffer far larger than the last-level cache (at least 512 MB and eight times its size), each reads
its pieces in several streams at once with prefetches ahead: one stream alone reaches half of what a core can read on
some processors. `Meter.read()` gives the best of the numbers of streams, so that it is a limit and not one more sample.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

from irc.lowering.cpp import build

STREAMS = (1, 2, 4, 8, 16)
_SOURCE = """
#include <cstdint>

#include "irc/pool_impl.h"

extern "C" __attribute__((visibility("default"))) void* meter_pool(int threads) { return new irc::Pool(threads); }

// Sums `bytes` of memory in pieces of 8 MB that workers take from one another, as they do in a product, so that a cpu
// that is taken away holds nobody up. A piece is read in `streams` streams of 256 bytes in turn.
extern "C" __attribute__((visibility("default"))) uint64_t meter_read(void* pool, const uint64_t* memory, int64_t bytes,
                                                                      int64_t streams) {
    constexpr int64_t piece = 1 << 20;
    uint64_t total = 0;
    auto body = [&](irc::Worker& worker) {
        const int64_t stream = piece / streams;
        uint64_t sums[8] = {};
        irc::for_chunks(worker, bytes / 8 / piece, [&](int64_t chunk) {
            for (int64_t i = 0; i < stream; i += 32)
                for (int64_t s = 0; s < streams; ++s) {
                    const uint64_t* p = memory + chunk * piece + s * stream + i;
                    for (int j = 0; j < 32; j += 8) __builtin_prefetch(p + 64 + j, 0, 3);
                    for (int j = 0; j < 32; j += 8)
                        for (int k = 0; k < 8; ++k) sums[k] += p[j + k];
                }
        });
        for (uint64_t sum : sums) __atomic_fetch_add(&total, sum, __ATOMIC_RELAXED);
    };
    static_cast<irc::Pool*>(pool)->run(body);
    return total;
}
"""


class Meter:
    """A buffer and the threads that read it."""

    def __init__(self, threads: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.num_bytes = max(512 << 20, 8 * last_level_cache())
        self._memory = mmap.mmap(-1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        # Written once: pages that were never written are all one page of zeros, which the cache holds.
        self._view = (ctypes.c_char * self.num_bytes).from_buffer(self._memory)
        ctypes.memset(self._view, 1, self.num_bytes)
        self._library = ctypes.CDLL(str(build.build(_SOURCE, isa=build.supported_isas()[-1], name="meter")))
        self._library.meter_pool.restype = ctypes.c_void_p
        self._pool = ctypes.c_void_p(self._library.meter_pool(threads))

    def once(self, streams: int) -> float:
        """Bytes a second of one pass with that many streams a thread."""
        started = self._clock()
        self._library.meter_read(self._pool, self._view, ctypes.c_int64(self.num_bytes), ctypes.c_int64(streams))
        return self.num_bytes / (self._clock() - started)

    def best_streams(self, rounds: int = 3) -> int:
        """The number of streams a thread that reads fastest."""
        return max(STREAMS, key=lambda streams: max(self.once(streams) for _ in range(rounds)))

    def read(self, rounds: int = 2) -> float:
        """Bytes a second: the best of all numbers of streams."""
        return max(self.once(streams) for _ in range(rounds) for streams in STREAMS)


def last_level_cache() -> int:
    """Bytes of the largest cache that this processor reports, or 64 MB where it says nothing."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes, default=64 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    args = parser.parse_args()
    meter = Meter(args.threads)
    found = {}
    for streams in STREAMS:
        found[streams] = max(meter.once(streams) for _ in range(1 if args.quick else 5)) / 1e9
        print(f"{args.threads} threads, {streams:2} streams each: {found[streams]:.1f} GB/s")
    if args.json:
        print(json.dumps({"threads": args.threads, "gb_s": found, "best": max(found.values())}))


if __name__ == "__main__":
    main()
