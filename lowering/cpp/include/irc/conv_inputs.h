// How the rows of a convolution's matrix product (conv_rows.h) are read: gathered block by block, or where they lie, as
// pixels under the window or, where that is one pixel, as the image itself. A row of pieces is what tiles read:
//
//     length_of(shape, place)      places of the block from `place` on
//     fill(…)                      for rows [m0, m1) of a group
//     view()                       what tiles copy: pieces, length(piece), tile<H>(piece, row).at(m, place)
#pragma once

#include <type_traits>

#include "irc/conv_shape.h"
#include "irc/fmatmul.h"

IRC_BEGIN

constexpr int64_t conv_pieces = 16;
#if defined(IRC_AVX512)
constexpr bool reads_in_place = false;  // fourteen rows would need as many pointers
#else
constexpr bool reads_in_place = true;
#endif

// Where a block of places starts in the runs of the window. A run is contiguous in memory: one row of the window, or
// one pixel of it.
struct RunStart {
    int64_t run, runs_a_row, row, column, at;

    RunStart(const ConvShape& shape, int64_t place) {
        const bool whole = shape.groups == 1 && shape.dilation_x == 1;
        run = shape.group_channels() * (whole ? shape.kernel_x : 1);
        runs_a_row = whole ? 1 : shape.kernel_x;
        const int64_t index = place / run;
        row = index / runs_a_row;
        column = index % runs_a_row;
        at = place % run;
    }
};

// `length` places under the window at (y, x) of an image whose group starts at `image`; the input ends at `end`.
template <class Inputs, class Input, class Row>
inline void gather_window(const ConvShape& shape, const Inputs& inputs, const Input* image, const Input* end,
                          RunStart start, int64_t y, int64_t x, int64_t length, Row* to) {
    const int64_t width = shape.group_channels(), run = start.run;
    const bool all = start.runs_a_row == 1 && length == run * shape.kernel_y;
    if (all && y >= 0 && x >= 0 && x + shape.kernel_x <= shape.width &&
        y + (shape.kernel_y - 1) * shape.dilation_y < shape.height) {
        const Input* from = image + (y * shape.width + x) * shape.channels;
        for (int64_t i = 0; i < shape.kernel_y; ++i, to += run, from += shape.dilation_y * shape.width * shape.channels)
            inputs.copy(to, from, run, end - from);
        return;
    }
    for (int64_t done = 0; done < length;) {
        const int64_t at = start.at, count = min_of(run - at, length - done);
        const int64_t top = y + start.row * shape.dilation_y, left = x + start.column * shape.dilation_x;
        // The part [first, last) of the run that lies inside the image.
        int64_t first = left < 0 ? min_of(run, -left * width) : 0;
        int64_t last = max_of(0, min_of(run, (shape.width - left) * width));
        if (top < 0 || top >= shape.height) first = last = 0;
        first = min_of(max_of(first, at), at + count);
        last = min_of(max_of(last, first), at + count);
        for (int64_t k = at; k < first; ++k) to[done + k - at] = inputs.outside();
        if (last > first) {
            const Input* from = image + (top * shape.width + left) * shape.channels + first;
            inputs.copy(to + done + first - at, from, last - first, end - from);
        }
        for (int64_t k = last; k < at + count; ++k) to[done + k - at] = inputs.outside();
        done += count;
        start.at = 0;
        if (++start.column == start.runs_a_row) {
            start.column = 0;
            ++start.row;
        }
    }
}

// Rows of `piece` places, each `distance` behind the one before, as tiles read them.
template <class Row, int64_t distance>
struct DenseRows {
    static constexpr int64_t pieces = 1;
    const Row* first_row;
    int64_t piece;

    DenseRows view() const { return *this; }
    int64_t length(int64_t) const { return piece; }
    template <int H>
    struct Tile {
        const Row* x;
        IRC_INLINE const Row* at(int m, int64_t k) const { return x + m * distance + k; }
    };
    template <int H>
    Tile<H> tile(int64_t, int64_t row) const {
        return {first_row + row * distance};
    }
};

// Rows of a block over `length` places from `place`, gathered: [rows][stride], up to a multiple of `step`.
template <class Product, class Input>
struct GatheredRows : DenseRows<typename Product::Row, Product::block + 16> {
    using Row = typename Product::Row;
    static constexpr int64_t stride = Product::block + 16;
    alignas(64) Row rows[gemm_rows * stride];

    GatheredRows(const ConvShape&, const Product&) { this->first_row = rows; }
    static int64_t length_of(const ConvShape& shape, int64_t place) {
        return min_of(Product::block, shape.places() - place);
    }
    void fill(const ConvShape& shape, const Product& product, const Input* input, int64_t group, int64_t m0, int64_t m1,
              int64_t place, int64_t length) {
        const int64_t image_size = shape.height * shape.width * shape.channels;
        const Input* end = input + shape.batch * image_size;
        const RunStart start(shape, place);
        this->piece = round_up(length, Product::step);
        Row* to = rows;
        OutputPixel at(shape, m0);
        for (int64_t m = m0; m < m1; ++m, at.next(shape), to += stride) {
            const Input* image = input + at.b * image_size + group * shape.group_channels();
            gather_window(shape, product.inputs, image, end, start, at.y, at.x, length, to);
            // Weights of 0 make anything finite 0.
            if constexpr (!std::is_integral_v<Row>)
                for (int64_t k = length; k < this->piece; ++k) to[k] = 0;
        }
    }
};

// H rows, each in its place.
template <class Row, int H>
struct RowPointers {
    const Row* x[H];
    IRC_INLINE const Row* at(int m, int64_t k) const { return x[m] + k; }
};

// Rows that are pixels as they lie, `distance` apart: of windows of one pixel without stride and padding.
template <class Product>
struct PixelRows {
    using Row = typename Product::Row;
    static constexpr int64_t pieces = 1;
    const Row* first_row = nullptr;
    int64_t distance, piece = 0;

    PixelRows(const ConvShape& shape, const Product&) : distance(shape.channels) {}
    static bool fits(const ConvShape& shape, const Product& product) {
        const bool one = shape.kernel_y * shape.kernel_x * shape.stride_y * shape.stride_x == 1;
        return product.inputs.in_place() && one && shape.padding_y + shape.padding_x == 0 &&
               shape.group_channels() % Product::step == 0;
    }
    static int64_t length_of(const ConvShape& shape, int64_t place) {
        return min_of(Product::block, shape.places() - place);
    }
    void fill(const ConvShape& shape, const Product&, const Row* input, int64_t group, int64_t m0, int64_t, int64_t place,
              int64_t length) {
        first_row = input + m0 * distance + group * shape.group_channels() + place;
        piece = length;
    }
    PixelRows view() const { return *this; }
    int64_t length(int64_t) const { return piece; }
    template <int H>
    IRC_INLINE RowPointers<Row, H> tile(int64_t, int64_t row) const {
        RowPointers<Row, H> result;
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) result.x[m] = first_row + (row + m) * distance;
        return result;
    }
};

// Rows in pieces of `piece` places, as tiles read them: rows[piece][row].
template <class Row>
struct RowPieces {
    const Row* const (*rows)[gemm_rows];
    int64_t pieces, piece;

    int64_t length(int64_t) const { return piece; }
    template <int H>
    IRC_INLINE RowPointers<Row, H> tile(int64_t p, int64_t first) const {
        RowPointers<Row, H> result;
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) result.x[m] = rows[p][first + m];
        return result;
    }
};

// The same where they lie: a piece is a pixel under the window, or a part of it. `outside` stands for all pixels
// outside the image.
template <class Product>
struct RowsInPlace {
    using Row = typename Product::Row;
    const Row* rows[conv_pieces][gemm_rows];
    int64_t pieces, piece;
    alignas(64) Row outside[Product::block];

    RowsInPlace(const ConvShape& shape, const Product& product) : pieces(0), piece(piece_of(shape)) {
        for (int64_t k = 0; k < piece; ++k) outside[k] = product.inputs.outside();
    }
    // Channels that lie together: all of a pixel, or the largest even part that is a whole number of steps.
    static int64_t piece_of(const ConvShape& shape) {
        const int64_t channels = shape.group_channels(), parts = ceil_div(channels, Product::block);
        return channels % (parts * Product::step) == 0 ? channels / parts : 0;
    }
    static bool fits(const ConvShape& shape, const Product& product) {
        static_assert(Product::block <= conv_pieces * 32 * Product::step, "a block of pieces fits `rows`");
        // Short pieces cost more than copies: a tile starts anew with each.
        const int64_t steps = shape.kernel_y * shape.kernel_x == 1 ? 8 : 32;
        return product.inputs.in_place() && piece_of(shape) >= steps * Product::step;
    }
    static int64_t length_of(const ConvShape& shape, int64_t place) {
        const int64_t piece = piece_of(shape), all = shape.places() / piece;
        const int64_t blocks = ceil_div(all, Product::block / piece), done = place / piece;
        // Block b ends at piece all (b + 1) / blocks.
        int64_t b = done * blocks / all;
        while (all * (b + 1) / blocks <= done) ++b;
        return (all * (b + 1) / blocks - done) * piece;
    }
    void fill(const ConvShape& shape, const Product&, const Row* input, int64_t group, int64_t m0, int64_t m1,
              int64_t place, int64_t length) {
        const int64_t parts = shape.group_channels() / piece, first = place / piece;
        const Row* from = input + group * shape.group_channels();
        pieces = length / piece;
        OutputPixel at(shape, m0);
        for (int64_t m = m0; m < m1; ++m, at.next(shape)) {
            int64_t part = first % parts, j = first / parts % shape.kernel_x, i = first / parts / shape.kernel_x;
            for (int64_t p = 0; p < pieces; ++p) {
                const int64_t pixel = at.under(shape, i, j);
                rows[p][m - m0] = pixel < 0 ? outside : from + pixel * shape.channels + part * piece;
                if (++part < parts) continue;
                part = 0;
                if (++j == shape.kernel_x) {
                    j = 0;
                    ++i;
                }
            }
        }
    }
    RowPieces<Row> view() const { return {rows, pieces, piece}; }
};

IRC_END
