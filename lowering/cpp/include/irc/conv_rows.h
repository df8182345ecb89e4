// The matrix product of a convolution, channels last: out[b, y, x, o] = sum over i, j, c of
// in[b, y stride - padding + i dilation, x …, c] w[o, c, i, j].
//
// Rows are the pixels of all images, columns the output channels, the depth is (i, j, c) with c fastest. A block is up to
// 96 rows, 256 columns and Product::block places, whose weights (16 columns) stay in the first-level cache while all
// tiles of rows pass. Its rows are read where they lie, pixel under the window by pixel, where integers and channels allow
// it; else they are gathered: what lies under one row of the window is contiguous in memory (without groups and
// dilation), so these are a few plain copies, with the number for outside around the image.
//
// A product says how rows meet the packed weights:
//
//     Row, Sum, Sums         types of a row's numbers, of a finished sum, of 16 sums in registers
//     height, panels         of a tile: rows, and panels of 16 columns
//     step, block            places that are multiplied at a time (1 to 8), and in a block
//     inputs                 how inputs become rows: outside(), copy(…), in_place<Input>()
//     panel_bytes(places)    of 16 columns; places before a multiple of `step` lie in front of those behind
//     ready(panel, …)        the panel as tiles read it
//     start(n)               what the sums of channels n to n + 16 start with
//     multiply(…)            H rows × P panels × `length` places, a multiple of `step`
//     finish(…)              what the epilogue gets
//
// The epilogue is called as epilogue(m, n0, n1, values): channels n0 to n1 (at most 128) of pixel m, soon after their last
// tile, so that what it reads and writes overlaps with the arithmetic of the next. One that has `takes_sums` gets them
// from the registers instead: take(m, n, sums) gets channels n to n + 16 P of pixel m as sums[P], take_last(m, n, count,
// sums) the last `count` of its channels, at most 16.
#pragma once

#include "irc/conv_inputs.h"

IRC_BEGIN

constexpr int64_t conv_columns = 256, conv_group = 128;

// Whether an epilogue takes sums from the registers.
template <class Epilogue, class = void>
constexpr bool takes_sums = false;
template <class Epilogue>
constexpr bool takes_sums<Epilogue, std::void_t<decltype(Epilogue::takes_sums)>> = true;

// Where the sums of a tile come from and go to: channels from `channel` (of all groups) to `end`, row 0 is pixel `pixel`.
template <class Product>
struct TileSums {
    typename Product::Sum* totals;  // [rows][conv_group]
    bool first;                     // no block of places before
    int64_t pixel, channel, end;
};

// Rows [row, row + H) times P panels: totals [H][conv_group] += product, or = product; or finished sums to the epilogue.
template <class Product, int H, int P, class Rows, class Epilogue>
IRC_INLINE void conv_tile(const Product& product, const Rows& rows, int64_t row, const uint8_t* panel,
                          int64_t panel_bytes, const TileSums<Product>& at, const Epilogue& epilogue) {
    typename Product::Sums sums[H][P];
    typename Product::Sum* totals = at.totals + row * conv_group;
#pragma GCC unroll 16
    for (int m = 0; m < H; ++m)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p)
            sums[m][p] = at.first ? product.start(at.channel + 16 * p) : Product::load_sums(totals + m * conv_group + 16 * p);
    for (int64_t piece = 0; piece < rows.pieces; ++piece) {
        const auto tile = rows.template tile<H>(piece, row);
        const int64_t length = rows.length(piece);
        product.template multiply<H, P>(tile, length, panel, panel_bytes, sums);
        panel += length / Product::step * Product::step_bytes;
    }
    if constexpr (takes_sums<Epilogue>) {
        const int64_t left = at.end - at.channel - 16 * (P - 1);
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) {
            if (__builtin_expect(left >= 16, 1)) {
                epilogue.take(at.pixel + row + m, at.channel, sums[m]);
            } else {
                for (int p = 0; p < P - 1; ++p) epilogue.take_last(at.pixel + row + m, at.channel + 16 * p, 16, sums[m][p]);
                epilogue.take_last(at.pixel + row + m, at.channel + 16 * (P - 1), left, sums[m][P - 1]);
            }
        }
    } else {
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m)
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) store(totals + m * conv_group + 16 * p, sums[m][p]);
    }
}

// Sums stay in memory.
struct KeepSums {};

// Weights that are read soon, into the second-level cache. Reading ahead of the last ones is harmless.
inline void fetch_later(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Tiles of H rows from `begin` to `end` times P panels; after each tile done(first row, end). Tiles fetch `ahead` bytes each
// from `next` on, which moves on.
//
// What all tiles need is copied: what lies elsewhere would have to be read again after each store of bytes. A tile of few
// places takes half of its time between the products, so all of it is here, without calls.
template <int H, int P, class Product, class Rows, class Epilogue, class Done>
__attribute__((noinline)) void conv_tiles(const Product& given_product, const Rows& given_rows, int64_t begin, int64_t end,
                                          const uint8_t* weights, int64_t panel_bytes, const TileSums<Product>& given_at,
                                          const Epilogue& given_epilogue, const Done& done, const uint8_t*& next,
                                          int64_t ahead) {
    const Product product = given_product;
    const Epilogue epilogue = given_epilogue;
    const TileSums<Product> at = given_at;
    const auto rows = given_rows.view();
    const uint8_t* fetched = next;
    for (int64_t row = begin; row < end; row += H) {
        fetch_later(fetched, ahead);
        fetched += ahead;
        conv_tile<Product, H, P>(product, rows, row, weights, panel_bytes, at, epilogue);
        done(row, row + H);
    }
    next = fetched;
}

// All rows of a block times P panels of weights.
template <int P, class Product, class Rows, class Epilogue, class Done>
inline void conv_panels(const Product& product, const Rows& rows, int64_t count, const uint8_t* panel,
                        int64_t panel_bytes, int64_t length, const TileSums<Product>& at, const Epilogue& epilogue,
                        const Done& done) {
    typename Product::Ready ready;
    const uint8_t* weights = product.ready(panel, length, ready);
    const int64_t tiles = ceil_div(count, Product::height), ahead = P * Product::panel_bytes(length) / tiles;
    const int64_t least = count / tiles, higher = count % tiles * (least + 1);
    const uint8_t* next = panel + P * panel_bytes;
    const auto run = [&](int64_t begin, int64_t end, int64_t height) {
        with_height<Product::height>(height, [&](auto h) {
            conv_tiles<decltype(h)::value, P>(product, rows, begin, end, weights, panel_bytes, at, epilogue, done, next,
                                              ahead);
        });
    };
    if (higher > 0) run(0, higher, least + 1);
    run(higher, count, least);
}

// What a block needs in memory: its rows, and the sums of all its columns, or of as many as the epilogue gets at once.
template <class Rows, class Product>
struct ConvMemory {
    Rows rows;
    alignas(64) typename Product::Sum totals[conv_columns / conv_group][gemm_rows * conv_group];
    alignas(64) float values[conv_group];

    ConvMemory(const ConvShape& shape, const Product& product) : rows(shape, product) {}
};

// Rows [m0, m1), columns [n0, n1) of one group.
template <class Rows, class Product, class Input, class Epilogue>
inline void conv_block(const Worker& worker, const ConvShape& shape, const Product& product, const Input* input,
                       const uint8_t* packed, int64_t group, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                       Epilogue& epilogue) {
    auto& memory = in_worker_memory<ConvMemory<Rows, Product>>(worker, shape, product);
    Rows& rows = memory.rows;
    const int64_t places = shape.places(), count = m1 - m0, outputs = group * shape.group_outputs();
    const int64_t panel_bytes = Product::panel_bytes(places);
    for (int64_t place = 0, length; place < places; place += length) {
        length = Rows::length_of(shape, place);
        rows.fill(shape, product, input, group, m0, m1, place, length);
        const bool last = place + length == places;
        for (int64_t g = n0; g < n1; g += conv_group) {
            const int64_t end = min_of(n1, g + conv_group);
            // Sums that no later block adds to need no place of their own.
            auto* sums = memory.totals[last && place == 0 ? 0 : (g - n0) / conv_group];
            for (int64_t n = g, panels; n < end; n += 16 * panels) {
                panels = n + 16 < end ? Product::panels : 1;
                const uint8_t* panel = packed + n / 16 * panel_bytes + Product::panel_bytes(place);
                const TileSums<Product> at{sums + n - g, place == 0, m0, outputs + n, outputs + end};
                const auto pass = [&](const auto& sink, const auto& done) {
                    if (panels == 1)
                        conv_panels<1>(product, rows, count, panel, panel_bytes, length, at, sink, done);
                    else
                        conv_panels<Product::panels>(product, rows, count, panel, panel_bytes, length, at, sink, done);
                };
                if constexpr (takes_sums<std::remove_const_t<Epilogue>>) {
                    if (last)
                        pass(epilogue, [](int64_t, int64_t) {});
                    else
                        pass(KeepSums(), [](int64_t, int64_t) {});
                } else if (last && n + 16 * panels >= end) {
                    pass(KeepSums(), [&](int64_t begin_row, int64_t end_row) {
                        for (int64_t m = begin_row; m < end_row; ++m)
                            epilogue(m0 + m, outputs + g, outputs + end,
                                     product.finish(sums + m * conv_group, outputs + g, outputs + end, memory.values));
                    });
                } else {
                    pass(KeepSums(), [](int64_t, int64_t) {});
                }
            }
        }
    }
}

// All workers call it; results are complete after the next barrier.
template <class Product, class Input, class Epilogue>
inline void conv_rows(Worker& worker, const ConvShape& shape, const Product& product, const Input* input,
                      const uint8_t* packed, Epilogue& epilogue) {
    const int64_t pixels = shape.pixels(), outputs = shape.group_outputs();
    const int64_t row_blocks = ceil_div(pixels, gemm_rows);
    // Narrower blocks where whole ones cannot be shared evenly.
    int64_t width = conv_columns;
    const auto uneven = [&] {
        const int64_t blocks = ceil_div(outputs, width) * row_blocks * shape.groups;
        return blocks < 4 * worker.count && blocks % worker.count != 0;
    };
    while (width > 64 && uneven()) width /= 2;
    const int64_t column_blocks = ceil_div(outputs, width);
    const int64_t group_bytes = ceil_div(outputs, 16) * Product::panel_bytes(shape.places());
    for_chunks(worker, shape.groups * row_blocks * column_blocks, [&](int64_t chunk) {
        const int64_t column_block = chunk % column_blocks, row_block = chunk / column_blocks % row_blocks;
        const int64_t group = chunk / column_blocks / row_blocks, n0 = column_block * width;
        const int64_t m0 = pixels * row_block / row_blocks, m1 = pixels * (row_block + 1) / row_blocks;
        const int64_t n1 = min_of(outputs, n0 + width);
        const uint8_t* weights = packed + group * group_bytes;
        if constexpr (std::is_same_v<Input, typename Product::Row> && reads_in_place) {
            if (PixelRows<Product>::fits(shape, product)) {
                conv_block<PixelRows<Product>>(worker, shape, product, input, weights, group, m0, m1, n0, n1,
                                               epilogue);
                return;
            }
            if (RowsInPlace<Product>::fits(shape, product)) {
                conv_block<RowsInPlace<Product>>(worker, shape, product, input, weights, group, m0, m1, n0, n1,
                                               epilogue);
                return;
            }
        }
        conv_block<GatheredRows<Product, Input>>(worker, shape, product, input, weights, group, m0, m1, n0, n1,
                                                 epilogue);
    });
}

IRC_END
