// y[m, n] = sum over k of x[m, k] w[n, k] for integer weights (4 or 8 bits with a scale a group or a row) and
// activations that are quantized to signed bytes a row (quantize.h). The integer sums of a group are exact; a group's
// sum is scaled in f32, groups are added in f32 in ascending order, and the row's scale comes last. group_sums.h has
// the layout of packed weights.
//
// One token: panels are read once, four at a time, the sums stay in registers, memory sets the pace. 2 or more tokens: for each group
// of a panel all tiles of a block of tokens pass, so a group is read from memory once a block.
//
// The epilogue is called as epilogue(m, n0, n1, values) for columns n0 to n1 of row m with n0 a multiple of 32 and
// n1 - n0 = 32 but for the last, each exactly once, from any worker.
#pragma once

#include "irc/group_sums.h"
#include "irc/heights.h"
#include "irc/streams.h"

IRC_BEGIN

constexpr int64_t columns = 32;
constexpr int64_t row_columns = 16 * row_panels;
// Tokens whose sums are kept at a time, and the bytes that their activations may take: they pass as one stream, which the
// third-level cache delivers in time.
constexpr int64_t most_rows = 128, activations_cache = 1024 * 1024;

// One token against P neighbouring panels: 16 results each, not yet times the token's scale. Behind the end of its panel
// a stream prefetches the panel that it reads next, that of the following block.
template <class W, int P>
inline void panels_times_row(const uint8_t* panel, int64_t size, const int8_t* values, const int32_t* seeds,
                             float* results) {
    const int64_t group = W::group(size), groups = W::groups(size), segments = W::segments_of_group(size);
    const int64_t line_bytes = W::line_bytes(size), group_bytes = W::group_bytes(size), panel_bytes = W::panel_bytes(size);
    // Long groups pass in pieces, so that the panels take turns.
    const int64_t piece = W::one_segment ? group : 2 * segment_size;
    const int64_t ahead = W::one_segment ? round_up(row_ahead, group_bytes) : row_ahead;
    // Totals lie in memory: the registers hold the activations of a group, which all panels share.
    for (int p = 0; p < P; ++p) store(results + 16 * p, zero());
    for (int64_t g = 0; g < groups; ++g) {
        if constexpr (W::one_segment) {
            const int64_t next = stream_ahead(P, g * group_bytes, ahead, panel_bytes);
            for (int p = 0; p < P; ++p) {
                const uint8_t* block = panel + p * panel_bytes;
                for (int64_t i = 0; i < group_bytes; i += 64) prefetch(block + next + i);
                i32x16 sums[1];
                group_sums<W, 1, false>(block, block + group_bytes - 16, group, {values, seeds, 1, 0}, sums);
                add_scaled(results + 16 * p, sums[0], W::scales(block + line_bytes));
            }
        } else {
            i32x16 sums[P];
            for (int p = 0; p < P; ++p) sums[p] = zero_i32();
            for (int64_t k = 0; k < group; k += piece) {
                const int64_t length = min_of(piece, group - k), done = k * 2 * W::bits;
                const int64_t next = stream_ahead(P, g * group_bytes + done, ahead, panel_bytes);
                for (int p = 0; p < P; ++p) {
                    const uint8_t* block = panel + p * panel_bytes;
                    for (int64_t i = 0; i < length * 2 * W::bits; i += 64) prefetch(block + done + next + i);
                    i32x16 part[1];
                    group_sums<W, 1, false>(block + done, block + group_bytes - 16, length,
                                            {values + k, seeds + k / segment_size, 1, 0}, part);
                    sums[p] = add(sums[p], part[0]);
                }
            }
            for (int p = 0; p < P; ++p)
                add_scaled(results + 16 * p, sums[p], W::scales(panel + p * panel_bytes + line_bytes));
        }
        panel += group_bytes;
        values += group;
        seeds += segments;
    }
}

// Neighbouring tiles of quantized rows, from row `first` on, whose sums lie in totals [row - first][stride].
struct TileBlock {
    const QuantizedRows& rows;
    int64_t height, count, first, stride;
    float* totals;
};

// A block of tiles of H rows against `panels` neighbouring panels, in turn for each group: sets the block's totals. Not
// inlined: called from two places, its parts would otherwise become calls themselves, which cost a quarter of the speed.
template <class W, int H, bool Unpacked>
__attribute__((noinline)) void panels_times_tiles(const uint8_t* panel, int64_t panels, int64_t size, const TileBlock& block) {
    const int64_t group = W::group(size), groups = W::groups(size), segments = W::segments_of_group(size);
    const int64_t line_bytes = W::line_bytes(size), group_bytes = W::group_bytes(size), panel_bytes = W::panel_bytes(size);
    const int64_t count = block.count, stride = block.stride;
    for (int64_t m = 0; m < count * H; ++m)
        for (int64_t p = 0; p < panels; ++p) store(block.totals + m * stride + 16 * p, zero());
    GroupValues x{block.rows.values, block.rows.seeds, block.rows.count, block.first};
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t next = stream_ahead(panels, g * group_bytes, row_ahead, panel_bytes);
        for (int64_t p = 0; p < panels; ++p) {
            const uint8_t* lines = panel + p * panel_bytes;
            for (int64_t i = 0; i < min_of(group_bytes, row_ahead); i += 64) prefetch(lines + next + i);
            const f32x16 scales = W::scales(lines + line_bytes);
            const uint8_t* zeros = lines + group_bytes - 16;
            alignas(64) uint8_t bytes[Unpacked ? 16 * W::fixed_group : 1];
            if constexpr (Unpacked) {
                unpack_group<W>(lines, bytes);
                lines = bytes;
            }
            float* totals = block.totals + 16 * p;
            GroupValues tile = x;
            for (int64_t t = 0; t < count; ++t) {
                i32x16 sums[H];
                group_sums<W, H, Unpacked>(lines, zeros, group, tile, sums);
#pragma GCC unroll 16
                for (int m = 0; m < H; ++m) add_scaled(totals + m * stride, sums[m], scales);
                tile.first += H;
                totals += H * stride;
            }
        }
        panel += group_bytes;
        x.values += group * x.rows;
        x.seeds += segments * x.rows;
    }
}

template <class W>
inline void panels_times_tiles(const uint8_t* panel, int64_t panels, int64_t size, const TileBlock& block) {
    if constexpr (W::unpacks) {
        // 17 rows or more in tiles of at most 5 are all in tiles of 5.
        static_assert(!W::unpacks || (unpacked_height == 5 && few_tokens >= 16), "other heights need other kernels");
        if (block.height == unpacked_height) return panels_times_tiles<W, unpacked_height, true>(panel, panels, size, block);
    }
    with_height<packed_height>(block.height, [&](auto h) {
        panels_times_tiles<W, decltype(h)::value, false>(panel, panels, size, block);
    });
}

template <class W>
inline int64_t scratch_bytes(int64_t num_rows, int64_t size, int workers) {
    const int64_t rows = Tiles(num_rows, W::tile_height(num_rows)).rows();
    return QuantizedRows::bytes(rows, W::depth(size), W::segments(size)) * (num_rows == 1 ? workers : 1);
}

// Where the quantized rows of this worker lie: with one token each worker has its own copy, which saves a barrier.
template <class W>
inline QuantizedRows quantized_rows(const Worker& worker, uint8_t* scratch, int64_t num_rows, int64_t size) {
    const int64_t depth = W::depth(size), segments = W::segments(size);
    if (num_rows == 1) scratch += worker.index * QuantizedRows::bytes(1, depth, segments);
    return QuantizedRows(scratch, Tiles(num_rows, W::tile_height(num_rows)).rows(), depth, segments);
}

// x [num_rows, size], rows `stride` apart, into scratch. Ends with a barrier where workers share the work.
template <class W, class Input>
inline void quantize_activations(Worker& worker, const Input* x, int64_t stride, int64_t num_rows, int64_t size,
                                 uint8_t* scratch) {
    const QuantizedRows rows = quantized_rows<W>(worker, scratch, num_rows, size);
    const Tiles tiles(num_rows, W::tile_height(num_rows));
    const int64_t depth = W::depth(size), group = W::group(size);
    const auto quantize = [&](int64_t tile) {
        for (int64_t m = 0; m < tiles.height; ++m) {
            const int64_t row = tile * tiles.height + m;
            const RowPlace place{rows.count, tile * tiles.height, tiles.height, m, rows.values, rows.seeds};
            if (row < num_rows)
                rows.scales[row] = quantize_row<W::seeds>(x + row * stride, size, depth, group, W::seed_factor, place);
            else fill_row(depth, group, place);
        }
    };
    if (num_rows == 1) {
        quantize(0);
        return;
    }
    for_chunks(worker, tiles.count, quantize);
    worker.barrier();
}

// Columns n0 to n1 (at most row_columns) of the one token.
template <class W, class Epilogue>
inline void row_block(const uint8_t* packed, int64_t n0, int64_t n1, int64_t size, const QuantizedRows& rows,
                      Epilogue& epilogue) {
    alignas(64) float values[row_columns];
    const uint8_t* panel = packed + n0 / 16 * W::panel_bytes(size);
    if (n1 - n0 > row_columns - 16) {
        panels_times_row<W, row_panels>(panel, size, rows.values, rows.seeds, values);
    } else if (n1 - n0 > 16 && n1 - n0 <= 32) {
        panels_times_row<W, 2>(panel, size, rows.values, rows.seeds, values);
    } else {
        for (int64_t n = n0; n < n1; n += 16, panel += W::panel_bytes(size))
            panels_times_row<W, 1>(panel, size, rows.values, rows.seeds, values + n - n0);
    }
    const f32x16 scale = set1(rows.scales[0]);
    for (int64_t n = 0; n < n1 - n0; n += 16) store(values + n, mul(scale, load(values + n)));
    for (int64_t n = n0; n < n1; n += columns)
        epilogue(int64_t{0}, n, min_of(n1, n + columns), static_cast<const float*>(values + n - n0));
}

// Columns n0 to n1 of a block of tokens, of which there are `num_rows` in all.
template <class W, class Epilogue>
inline void tile_block(const uint8_t* packed, int64_t n0, int64_t n1, int64_t size, int64_t num_rows, const TileBlock& block,
                       Epilogue& epilogue) {
    panels_times_tiles<W>(packed + n0 / 16 * W::panel_bytes(size), ceil_div(n1 - n0, 16), size, block);
    const int64_t last = min_of(num_rows, block.first + block.count * block.height);
    for (int64_t m = block.first; m < last; ++m) {
        float* values = block.totals + (m - block.first) * block.stride;
        const f32x16 scale = set1(block.rows.scales[m]);
        for (int64_t n = 0; n < n1 - n0; n += 16) store(values + n, mul(scale, load(values + n)));
        for (int64_t n = n0; n < n1; n += columns)
            epilogue(m, n, min_of(n1, n + columns), static_cast<const float*>(values + n - n0));
    }
}

// The product of what `quantize_activations` left in scratch. No barrier at the end.
template <class W, class Epilogue>
inline void quantized_product(Worker& worker, const uint8_t* packed, int64_t num_rows, int64_t num_columns, int64_t size,
                              uint8_t* scratch, Epilogue&& epilogue) {
    const QuantizedRows rows = quantized_rows<W>(worker, scratch, num_rows, size);
    if (num_rows == 1) {
        for_blocks(worker, ceil_div(num_columns, columns), row_columns / columns, [&](int64_t first, int64_t last) {
            row_block<W>(packed, first * columns, min_of(num_columns, last * columns), size, rows, epilogue);
        });
        return;
    }
    const Tiles tiles(num_rows, W::tile_height(num_rows));
    // Few tokens: memory sets the pace, so as many streams as for one. Many: totals that stay in the first-level cache.
    if (num_rows <= few_tokens) {
        for_blocks(worker, ceil_div(num_columns, columns), row_columns / columns, [&](int64_t first, int64_t last) {
            alignas(64) float totals[(few_tokens + packed_height) * row_columns];
            tile_block<W>(packed, first * columns, min_of(num_columns, last * columns), size, num_rows,
                          {rows, tiles.height, tiles.count, 0, row_columns, totals}, epilogue);
        });
        return;
    }
    const int64_t blocks = ceil_div(num_columns, columns);
    const int64_t most_tiles = max_of(1, min_of(most_rows, activations_cache / W::depth(size)) / tiles.height);
    const int64_t row_blocks = ceil_div(tiles.count, most_tiles);
    for_chunks(worker, row_blocks * blocks, [&](int64_t chunk) {
        const int64_t row_block = chunk / blocks, n0 = chunk % blocks * columns;
        const int64_t first = tiles.count * row_block / row_blocks, last = tiles.count * (row_block + 1) / row_blocks;
        alignas(64) float totals[most_rows * columns];
        tile_block<W>(packed, n0, min_of(num_columns, n0 + columns), size, num_rows,
                      {rows, tiles.height, last - first, first * tiles.height, columns, totals}, epilogue);
    });
}

// Quantizes x and multiplies. All workers call it; results are complete after the next barrier.
template <class W, class Input, class Epilogue>
inline void quantized_matmul(Worker& worker, const Input* x, int64_t stride, const uint8_t* packed, int64_t num_rows,
                             int64_t num_columns, int64_t size, uint8_t* scratch, Epilogue&& epilogue) {
    if (num_rows == 1) prefetch_share(worker, packed, num_columns, columns, W::panel_bytes(size));
    quantize_activations<W>(worker, x, stride, num_rows, size, scratch);
    quantized_product<W>(worker, packed, num_rows, num_columns, size, scratch, epilogue);
}

IRC_END
