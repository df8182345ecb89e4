// How one token reads packed weights: panels of 16 rows, several at a time, each a stream of memory.
#pragma once

#include "irc/isa.h"
#include "irc/pool.h"

IRC_BEGIN

// Panels that one token passes at a time: as many streams of memory a thread. A single stream, however far ahead it is
// prefetched, reaches half of what a core can read (13 against 25 GB/s where it was measured).
constexpr int64_t row_panels = 4, row_ahead = 512;

// How far ahead of `done` bytes of its panel a stream of a block prefetches: behind the panel's end it goes on at the
// panel that the worker's next block of as many panels has there.
IRC_INLINE int64_t stream_ahead(int64_t panels, int64_t done, int64_t ahead, int64_t panel_bytes) {
    return ahead + (done + ahead < panel_bytes ? 0 : (panels - 1) * panel_bytes);
}

// The start of this worker's share of `for_blocks` over units of `unit` columns: the lines that its streams read before
// their own prefetches arrive. Asked for ahead of other work, they are there behind it.
inline void prefetch_share(const Worker& worker, const uint8_t* packed, int64_t num_columns, int64_t unit,
                           int64_t panel_bytes) {
    const int64_t first = ceil_div(num_columns, unit) * worker.index / worker.count * unit / 16;
    const int64_t panels = min_of(row_panels, ceil_div(num_columns, 16) - first);
    for (int64_t i = 0; i < min_of(2 * row_ahead, panel_bytes); i += 64)
        for (int64_t p = 0; p < panels; ++p) prefetch(packed + (first + p) * panel_bytes + i);
}

IRC_END
