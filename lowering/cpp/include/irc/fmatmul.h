// y[m, n] = sum over k of x[m, k] w[n, k] for weights stored as floats (f32, bf16, f16), summed in f32.
//
// Packed weights: panels of 16 rows, [depth][16]; bf16 in pairs along k, [depth / 2][16][2], the operand order of
// AVX-512's dot product.
//
// Sums run in ascending order of k. Error at most (depth + 4) 2^-24 sum |x w|. With bf16 activations and bf16 weights AVX-512 sums pairs by vdpbf16ps,
// whose products are exact and whose subnormals are zero.
//
// Activations that are not f32 are first widened to f32 in scratch (but for that last case).
//
// The epilogue is the same as in qmatmul.h: epilogue(m, n0, n1, values), n0 a multiple of 32, n1 - n0 at most 32.
#pragma once

#include "irc/gemm_tile.h"
#include "irc/streams.h"

IRC_BEGIN

// Up to most_few rows read their weights once from memory, at its pace: few_depth neighbours of a panel at a time, and two
// panels together where the sums of few_height rows leave registers for them.
constexpr int64_t most_few = 16, few_depth = 64;
constexpr int few_panels = 2, few_height = gemm_panels == 2 ? gemm_height : 2;

// Rows of a block for a range of k, close together: rows a power of two apart would share a few sets of the caches.
template <class Input, int64_t most, int64_t depth>
struct RowBlock {
    static constexpr int64_t stride = depth + 16;
    alignas(64) Input rows[most * stride];

    void fill(const Input* x, int64_t x_stride, int64_t count, int64_t length) {
        for (int64_t m = 0; m < count; ++m) std::memcpy(rows + m * stride, x + m * x_stride, length * sizeof(Input));
    }
};

// A block, and its sums.
template <class Input>
struct GemmMemory {
    RowBlock<Input, gemm_rows, gemm_depth> block;
    alignas(64) float totals[gemm_rows * gemm_columns];
};

// Rows [m0, m1) times the panels of columns [n0, n1), into memory.totals [rows][gemm_columns].
template <class Panel, class Input>
inline void gemm_block(GemmMemory<Input>& memory, const Input* x, int64_t stride, const uint8_t* packed, int64_t m0,
                       int64_t m1, int64_t n0, int64_t n1, int64_t size) {
    auto& block = memory.block;
    float* const totals = memory.totals;
    const int64_t rows = m1 - m0, panel_bytes = Panel::bytes(size), tiles = ceil_div(rows, gemm_height);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < round_up(n1 - n0, 16); n += 16) store(totals + m * gemm_columns + n, zero());
    for (int64_t k = 0; k < size; k += gemm_depth) {
        const int64_t length = min_of(size - k, gemm_depth);
        block.fill(x + m0 * stride + k, stride, rows, length);
        for (int64_t n = n0; n < n1;) {
            const int64_t panels = n + 16 < n1 ? gemm_panels : 1;
            const uint8_t* panel = Panel::at(packed + n / 16 * panel_bytes, k);
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t first = rows * tile / tiles, height = rows * (tile + 1) / tiles - first;
                const Input* tile_rows = block.rows + first * block.stride;
                float* sums = totals + first * gemm_columns + n - n0;
                if (panels == 1)
                    gemm_tile<Panel, 1>(height, tile_rows, block.stride, panel, panel_bytes, length, sums);
                else
                    gemm_tile<Panel, gemm_panels>(height, tile_rows, block.stride, panel, panel_bytes, length, sums);
            }
            n += 16 * panels;
        }
    }
}

// Rows [0, rows), at most most_few, against up to `row_panels` panels: a short piece of k of each panel in turn, while the
// piece behind it is on its way, so that there are as many streams of memory as with one row.
template <class Panel, class Input>
inline void few_rows_block(const Input* x, int64_t stride, const uint8_t* panel, int64_t rows, int64_t panels, int64_t size,
                           float* totals) {
    RowBlock<Input, most_few, few_depth> block;
    const int64_t panel_bytes = Panel::bytes(size), tiles = ceil_div(rows, gemm_height);
    const int64_t ahead = Panel::at(panel, few_depth) - panel;
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t p = 0; p < panels; ++p) store(totals + m * gemm_columns + 16 * p, zero());
    for (int64_t k = 0; k < size; k += few_depth) {
        const int64_t length = min_of(size - k, few_depth), done = Panel::at(panel, k) - panel;
        block.fill(x + k, stride, rows, length);
        const FetchAhead fetch{stream_ahead(row_panels, done, ahead, panel_bytes)};
        const auto passes = [&](auto wide, int64_t p) {
            constexpr int count = decltype(wide)::value, most = count == few_panels ? few_height : gemm_height;
            const uint8_t* place = panel + done + p * panel_bytes;
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t first = rows * tile / tiles, height = rows * (tile + 1) / tiles - first;
                const Input* tile_rows = block.rows + first * block.stride;
                float* sums = totals + first * gemm_columns + 16 * p;
                if (tile == 0)
                    gemm_tile<Panel, count, most>(height, tile_rows, block.stride, place, panel_bytes, length, sums, fetch);
                else
                    gemm_tile<Panel, count, most>(height, tile_rows, block.stride, place, panel_bytes, length, sums);
            }
        };
        int64_t p = 0;
        if (ceil_div(rows, tiles) <= few_height)
            for (; p + few_panels <= panels; p += few_panels) passes(std::integral_constant<int, few_panels>(), p);
        for (; p < panels; ++p) passes(std::integral_constant<int, 1>(), p);
    }
}

// One row against P neighbouring panels, as many streams of memory.
template <class Panel, int P>
inline void panels_times_floats(const float* x, const uint8_t* panel, int64_t size, float* results) {
    constexpr int64_t step = Panel::step;
    const int64_t panel_bytes = Panel::bytes(size);
    f32x16 sums[P];
    for (int p = 0; p < P; ++p) sums[p] = zero();
    const int64_t whole = size / step * step;
    for (int64_t k = 0; k < whole; k += step) {
        const int64_t next = stream_ahead(P, Panel::at(panel, k) - panel, 2 * row_ahead, panel_bytes);
        for (int p = 0; p < P; ++p) {
            const uint8_t* place = Panel::at(panel, k) + p * panel_bytes;
            prefetch(place + next);
            sums[p] = fma(set1(x[k]), Panel::template columns<0>(place), sums[p]);
            if constexpr (step == 2) sums[p] = fma(set1(x[k + 1]), Panel::template columns<1>(place), sums[p]);
        }
    }
    if (whole < size)
        for (int p = 0; p < P; ++p)
            sums[p] = fma(set1(x[whole]), Panel::template columns<0>(Panel::at(panel, whole) + p * panel_bytes), sums[p]);
    for (int p = 0; p < P; ++p) store(results + 16 * p, sums[p]);
}

template <class Panel, class Input, class Epilogue>
inline void float_rows(Worker& worker, const Input* x, int64_t stride, const uint8_t* packed, int64_t num_rows,
                       int64_t num_columns, int64_t size, Epilogue& epilogue) {
    const int64_t panel_bytes = Panel::bytes(size);
    const auto finish = [&](int64_t m, int64_t n0, int64_t n1, const float* values) {
        epilogue(m, n0, n1, values);
    };
    if constexpr (sizeof(Input) == 4) {
        if (num_rows == 1) {
            constexpr int64_t width = 16 * row_panels, units = width / gemm_piece;
            for_blocks(worker, ceil_div(num_columns, gemm_piece), units, [&](int64_t first, int64_t last) {
                alignas(64) float values[width];
                const int64_t n0 = first * gemm_piece, n1 = min_of(num_columns, last * gemm_piece);
                const uint8_t* panel = packed + n0 / 16 * panel_bytes;
                if (n1 - n0 > width - 16)
                    panels_times_floats<Panel, row_panels>(x, panel, size, values);
                else if (n1 - n0 > 16 && n1 - n0 <= 32)
                    panels_times_floats<Panel, 2>(x, panel, size, values);
                else
                    for (int64_t n = 0; n < n1 - n0; n += 16)
                        panels_times_floats<Panel, 1>(x, panel + n / 16 * panel_bytes, size, values + n);
                for (int64_t n = n0; n < n1; n += gemm_piece) finish(0, n, min_of(n1, n + gemm_piece), values + n - n0);
            });
            return;
        }
    }
    if (num_rows <= most_few) {
        constexpr int64_t units = 16 * row_panels / gemm_piece;
        for_blocks(worker, ceil_div(num_columns, gemm_piece), units, [&](int64_t first, int64_t last) {
            alignas(64) float totals[most_few * gemm_columns];
            const int64_t n0 = first * gemm_piece, n1 = min_of(num_columns, last * gemm_piece);
            few_rows_block<Panel>(x, stride, packed + n0 / 16 * panel_bytes, num_rows, ceil_div(n1 - n0, 16), size, totals);
            for (int64_t m = 0; m < num_rows; ++m)
                for (int64_t n = n0; n < n1; n += gemm_piece)
                    finish(m, n, min_of(n1, n + gemm_piece), totals + m * gemm_columns + n - n0);
        });
        return;
    }
    const int64_t width = gemm_columns;
    const int64_t row_blocks = ceil_div(num_rows, gemm_rows), column_blocks = ceil_div(num_columns, width);
    for_chunks(worker, row_blocks * column_blocks, [&](int64_t chunk) {
        const int64_t row_block = chunk / column_blocks, n0 = chunk % column_blocks * width;
        const int64_t m0 = num_rows * row_block / row_blocks, m1 = num_rows * (row_block + 1) / row_blocks;
        const int64_t n1 = min_of(num_columns, n0 + width);
        GemmMemory<Input>& memory = in_worker_memory<GemmMemory<Input>>(worker);
        float* const totals = memory.totals;
        gemm_block<Panel>(memory, x, stride, packed, m0, m1, n0, n1, size);
        for (int64_t m = m0; m < m1; ++m)
            for (int64_t n = n0; n < n1; n += gemm_piece)
                finish(m, n, min_of(n1, n + gemm_piece), totals + (m - m0) * gemm_columns + n - n0);
    });
}

// Floats of the activations in scratch: with one token a copy for each worker, which saves a barrier.
template <class Input>
inline const float* widen_rows(Worker& worker, const Input* x, int64_t stride, int64_t num_rows, int64_t size,
                               uint8_t* scratch) {
    float* rows = reinterpret_cast<float*>(scratch);
    const auto widen = [&](int64_t m) {
        for (int64_t k = 0; k < size; k += 16)
            store_part(rows + m * size + k, load_part(x + m * stride + k, size - k), min_of(16, size - k));
    };
    if (num_rows == 1) {
        rows += worker.index * round_up(size, 16);
        widen(0);
        return rows;
    }
    for_chunks(worker, num_rows, widen);
    worker.barrier();
    return rows;
}

// All workers call it; results are complete after the next barrier. Stored: type of the weights.
template <class Stored, class Input, class Epilogue>
inline void float_matmul(Worker& worker, const Input* x, int64_t stride, const uint8_t* packed, int64_t num_rows,
                         int64_t num_columns, int64_t size, uint8_t* scratch, Epilogue&& epilogue) {
    using Panel = FloatPanel<Stored>;
    if constexpr (sizeof(Input) == 4) {
        (void)scratch;
        float_rows<Panel>(worker, x, stride, packed, num_rows, num_columns, size, epilogue);
    } else {
#if defined(IRC_AVX512)
        if constexpr (std::is_same_v<Input, bf16> && std::is_same_v<Stored, bf16>) {
            float_rows<Panel>(worker, x, stride, packed, num_rows, num_columns, size, epilogue);
            return;
        }
#endif
        const float* rows = widen_rows(worker, x, stride, num_rows, size, scratch);
        float_rows<Panel>(worker, rows, size, packed, num_rows, num_columns, size, epilogue);
    }
}

IRC_END
