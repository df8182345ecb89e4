// y[m, n] = sum over k of x[m, k] w[n, k] for integer weights (4 or 8 bits with a scale a group or a row) and
// activations that are quantized to signed bytes a row (quantize.h). The integer sums of a group are exact; a group's
// sum is scaled in f32, groups are added in f32 in ascending order, and the row's scale comes last.
//
// Packed weights: panels of 16 rows; a panel is its groups one after the other; a group is its lines (dot8.h), 16
// scales, and if asymmetric 16 zero points (8 bits: plus 128).
//
// One token: panels are read once, four at a time, the sums stay in registers, memory sets the pace. 2 or more tokens: for each group
// of a panel all tiles of a block of tokens pass, so a group is read from memory once a block and the block's
// activations stay in the second-level cache.
//
// The epilogue is called as epilogue(m, n0, n1, values) for columns n0 to n1 of row m with n0 a multiple of 32 and
// n1 - n0 = 32 but for the last, each exactly once, from any worker.
#pragma once

#include "irc/heights.h"
#include "irc/quantize.h"
#include "irc/streams.h"

IRC_BEGIN

constexpr int64_t columns = 32;
constexpr int64_t row_columns = 16 * row_panels;
constexpr int64_t few_tokens = 16;
// Tokens whose sums are kept at a time, and the bytes that their activations may take: half of a second-level cache.
constexpr int64_t most_rows = 96, activations_cache = 256 * 1024;

// Bits 4 or 8; Group 0: the whole row; Scale: float or f16.
template <int Bits, int Group, bool Asymmetric, class Scale>
struct Weights {
    static_assert(Bits == 4 || Bits == 8, "weights have 4 or 8 bits");
    static_assert(Group % 8 == 0, "a line of 4-bit weights holds 8 neighbours");
    static constexpr int bits = Bits;
    static constexpr bool asymmetric = Asymmetric;
    static constexpr int64_t fixed_group = Group;
    static constexpr bool one_segment = Group > 0 && Group <= segment_size;
    static constexpr int64_t line_depth = Bits == 4 ? 8 : 4;
#if defined(IRC_AVX2)
    static constexpr Seeds seeds = Bits == 4 ? Seeds::pairs : Asymmetric ? Seeds::whole : Seeds::none;
#else
    static constexpr Seeds seeds = Bits == 4 || Asymmetric || byte_offset != 0 ? Seeds::whole : Seeds::none;
#endif
    static constexpr int32_t seed_factor = Asymmetric ? -1 : Bits == 4 ? -8 : -byte_offset;

    static int64_t depth(int64_t size) { return round_up(size, 8); }
    static int64_t group(int64_t size) { return Group ? Group : depth(size); }
    static int64_t groups(int64_t size) { return depth(size) / group(size); }
    static int64_t segments_of_group(int64_t size) { return ceil_div(group(size), segment_size); }
    static int64_t segments(int64_t size) { return groups(size) * segments_of_group(size); }
    static int64_t line_bytes(int64_t size) { return group(size) * 2 * Bits; }
    static int64_t group_bytes(int64_t size) {
        return line_bytes(size) + 16 * static_cast<int64_t>(sizeof(Scale)) + (Asymmetric ? 16 : 0);
    }
    static int64_t panel_bytes(int64_t size) { return groups(size) * group_bytes(size); }
    static f32x16 scales(const uint8_t* p) { return load(reinterpret_cast<const Scale*>(p)); }
};

// Integer sums of one group of a panel for the H rows of a tile.
template <class W, int H>
IRC_INLINE void group_sums(const uint8_t* lines, const uint8_t* zeros, int64_t group_at_run_time, const int8_t* values,
                           const int32_t* seeds, i32x16 (&sums)[H]) {
    const int64_t group = W::one_segment ? W::fixed_group : group_at_run_time;
    if constexpr (!W::one_segment || W::bits == 8) {
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) sums[m] = zero_i32();
    }
    if constexpr (W::bits == 4) {
        for (int64_t k = 0; k < group; k += segment_size) {
            NibbleSum part[H];
#pragma GCC unroll 16
            for (int m = 0; m < H; ++m) {
                if constexpr (W::asymmetric) part[m] = start(seeds[m], zeros);
                else part[m] = start(seeds[m]);
            }
            const int64_t length = min_of(segment_size, group - k);
#pragma GCC unroll 4
            for (int64_t i = 0; i < length; i += 8) {
                const bytes64 low = low_nibbles(load_line(lines));
#pragma GCC unroll 16
                for (int m = 0; m < H; ++m) dot(part[m], low, values + 4 * m);
                const bytes64 high = high_nibbles(load_line(lines));
#pragma GCC unroll 16
                for (int m = 0; m < H; ++m) dot(part[m], high, values + 4 * (H + m));
                lines += 64;
                values += 8 * H;
            }
#pragma GCC unroll 16
            for (int m = 0; m < H; ++m) {
                if constexpr (W::one_segment) sums[m] = finish(part[m]);
                else sums[m] = add(sums[m], finish(part[m]));
            }
            seeds += H;
        }
    } else {
#pragma GCC unroll 4
        for (int64_t k = 0; k < group; k += 4) {
            const ByteLine line = load_bytes(lines);
#pragma GCC unroll 16
            for (int m = 0; m < H; ++m) dot(sums[m], line, values + 4 * m);
            lines += 64;
            values += 4 * H;
        }
        if constexpr (W::seeds != Seeds::none) {
            i32x16 zero = set1_i32(1);
            if constexpr (W::asymmetric) zero = add(load_u8(zeros), set1_i32(byte_offset - 128));
            for (int64_t k = 0; k < group; k += segment_size) {
#pragma GCC unroll 16
                for (int m = 0; m < H; ++m) sums[m] = add(sums[m], mul(zero, set1_i32(seeds[m])));
                seeds += H;
            }
        }
    }
}

IRC_INLINE void add_scaled(float* total, i32x16 sums, f32x16 scales) {
    store(total, fma(to_float(sums), scales, load(total)));
}

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
                group_sums<W, 1>(block, block + group_bytes - 16, group, values, seeds, sums);
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
                    group_sums<W, 1>(block + done, block + group_bytes - 16, length, values + k,
                                     seeds + k / segment_size, part);
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

// One group of a panel against one tile: totals[row][16] += sums * scales.
template <class W, int H>
IRC_INLINE void group_times_tile(const uint8_t* lines, const uint8_t* zeros, int64_t group, f32x16 scales,
                                 const int8_t* values, const int32_t* seeds, float* totals, int64_t stride) {
    i32x16 sums[H];
    group_sums<W, H>(lines, zeros, group, values, seeds, sums);
#pragma GCC unroll 16
    for (int m = 0; m < H; ++m) add_scaled(totals + m * stride, sums[m], scales);
}

template <class W>
IRC_INLINE void group_times_tile(int64_t height, const uint8_t* lines, const uint8_t* zeros, int64_t group, f32x16 scales,
                             const int8_t* values, const int32_t* seeds, float* totals, int64_t stride) {
    with_height<tile_height>(height, [&](auto h) __attribute__((always_inline)) {
        group_times_tile<W, decltype(h)::value>(lines, zeros, group, scales, values, seeds, totals, stride);
    });
}

// Where one tile of a block lies, worked out once for all panels.
struct TilePlace {
    int64_t height;
    const int8_t* values;
    const int32_t* seeds;
    float* totals;
};

// The tiles [first, last) as a block whose sums lie in totals [rows][stride].
struct TileBlock {
    TilePlace places[most_rows];
    int64_t count = 0, num_rows = 0, first_row = 0, stride;
    float* totals;

    TileBlock(const Tiles& tiles, int64_t first, int64_t last, const QuantizedRows& rows, int64_t depth, int64_t segments,
              float* sums, int64_t sums_stride)
        : stride(sums_stride), totals(sums) {
        first_row = tiles.first(first);
        num_rows = tiles.first(last) - first_row;
        for (int64_t tile = first; tile < last; ++tile) {
            const int64_t row = tiles.first(tile);
            places[count++] = {tiles.height(tile), rows.values + row * depth, rows.seeds + row * segments,
                               totals + (row - first_row) * stride};
        }
    }
};

// A block of tiles against `panels` neighbouring panels, in turn for each group: sets the block's totals. Not inlined:
// called from two places, its parts would otherwise become calls themselves, which cost a quarter of the speed.
template <class W>
__attribute__((noinline)) void panels_times_tiles(const uint8_t* panel, int64_t panels, int64_t size, const TileBlock& block) {
    const int64_t group = W::group(size), groups = W::groups(size), segments = W::segments_of_group(size);
    const int64_t line_bytes = W::line_bytes(size), group_bytes = W::group_bytes(size), panel_bytes = W::panel_bytes(size);
    for (int64_t m = 0; m < block.num_rows; ++m)
        for (int64_t p = 0; p < panels; ++p) store(block.totals + m * block.stride + 16 * p, zero());
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t next = stream_ahead(panels, g * group_bytes, row_ahead, panel_bytes);
        for (int64_t p = 0; p < panels; ++p) {
            const uint8_t* lines = panel + p * panel_bytes;
            for (int64_t i = 0; i < min_of(group_bytes, row_ahead); i += 64) prefetch(lines + next + i);
            const f32x16 scales = W::scales(lines + line_bytes);
            for (int64_t t = 0; t < block.count; ++t) {
                const TilePlace& tile = block.places[t];
                group_times_tile<W>(tile.height, lines, lines + group_bytes - 16, group, scales,
                                    tile.values + g * group * tile.height, tile.seeds + g * segments * tile.height,
                                    tile.totals + 16 * p, block.stride);
            }
        }
        panel += group_bytes;
    }
}

template <class W>
inline int64_t scratch_bytes(int64_t num_rows, int64_t size, int workers) {
    return QuantizedRows::bytes(num_rows, W::depth(size), W::segments(size)) * (num_rows == 1 ? workers : 1);
}

// Where the quantized rows of this worker lie: with one token each worker has its own copy, which saves a barrier.
template <class W>
inline QuantizedRows quantized_rows(const Worker& worker, uint8_t* scratch, int64_t num_rows, int64_t size) {
    const int64_t depth = W::depth(size), segments = W::segments(size);
    if (num_rows == 1) scratch += worker.index * QuantizedRows::bytes(1, depth, segments);
    return QuantizedRows(scratch, num_rows, depth, segments);
}

// x [num_rows, size], rows `stride` apart, into scratch. Ends with a barrier where workers share the work.
template <class W, class Input>
inline void quantize_activations(Worker& worker, const Input* x, int64_t stride, int64_t num_rows, int64_t size,
                                 uint8_t* scratch) {
    const QuantizedRows rows = quantized_rows<W>(worker, scratch, num_rows, size);
    const Tiles tiles(num_rows);
    const int64_t depth = W::depth(size), segments = W::segments(size), group = W::group(size);
    const auto quantize = [&](int64_t tile) {
        const int64_t first = tiles.first(tile), height = tiles.height(tile);
        for (int64_t m = 0; m < height; ++m)
            rows.scales[first + m] = quantize_row<W::seeds>(x + (first + m) * stride, size, depth, group,
                                                            W::seed_factor, height, rows.values + first * depth + 4 * m,
                                                            rows.seeds + first * segments + m);
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

// Columns n0 to n1 of a block of tokens.
template <class W, class Epilogue>
inline void tile_block(const uint8_t* packed, int64_t n0, int64_t n1, int64_t size, const QuantizedRows& rows,
                       const TileBlock& block, Epilogue& epilogue) {
    panels_times_tiles<W>(packed + n0 / 16 * W::panel_bytes(size), ceil_div(n1 - n0, 16), size, block);
    for (int64_t m = 0; m < block.num_rows; ++m) {
        float* values = block.totals + m * block.stride;
        const f32x16 scale = set1(rows.scales[block.first_row + m]);
        for (int64_t n = 0; n < n1 - n0; n += 16) store(values + n, mul(scale, load(values + n)));
        for (int64_t n = n0; n < n1; n += columns)
            epilogue(block.first_row + m, n, min_of(n1, n + columns), static_cast<const float*>(values + n - n0));
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
    const Tiles tiles(num_rows);
    const int64_t depth = W::depth(size), segments = W::segments(size);
    // Few tokens: memory sets the pace, so as many streams as for one. Many: totals that stay in the first-level cache.
    if (num_rows <= few_tokens) {
        for_blocks(worker, ceil_div(num_columns, columns), row_columns / columns, [&](int64_t first, int64_t last) {
            alignas(64) float totals[few_tokens * row_columns];
            const TileBlock place(tiles, 0, tiles.count, rows, depth, segments, totals, row_columns);
            tile_block<W>(packed, first * columns, min_of(num_columns, last * columns), size, rows, place, epilogue);
        });
        return;
    }
    const int64_t blocks = ceil_div(num_columns, columns);
    const int64_t most_tiles = max_of(1, min_of(most_rows, activations_cache / depth) / tile_height);
    const int64_t row_blocks = ceil_div(tiles.count, most_tiles);
    for_chunks(worker, row_blocks * blocks, [&](int64_t chunk) {
        const int64_t row_block = chunk / blocks, n0 = chunk % blocks * columns;
        const int64_t first = tiles.count * row_block / row_blocks, last = tiles.count * (row_block + 1) / row_blocks;
        alignas(64) float totals[most_rows * columns];
        const TileBlock place(tiles, first, last, rows, depth, segments, totals, columns);
        tile_block<W>(packed, n0, min_of(num_columns, n0 + columns), size, rows, place, epilogue);
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
