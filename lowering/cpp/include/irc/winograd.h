// Convolutions of 3 x 3 with stride 1 by Winograd's minimal filtering F(2 x 2, 3 x 3): four outputs from 16 products
// instead of 36. With a tile d of 4 x 4 inputs and weights g of 3 x 3, for each channel,
//
//     out = At [ sum over channels of (G g Gt) . (Bt d B) ] A,        . by element
//
//     Bt = 1  0 -1  0     G = 1    0    0      At = 1  1  1  0
//          0  1  1  0         1/2  1/2  1/2         0  1 -1 -1
//          0 -1  1  0         1/2 -1/2  1/2
//          0  1  0 -1         0    0    1
//
// (Lavin and Gray, 2015.) The 16 sums over channels are matrix products of the tiles' rows with the tiles of conv_rows.h.
//
// Inputs in halves are widened as they are read. Packed weights, f32: for each 64 output channels (the last ones padded) and each of the 16 places four panels
// [channels][16] of G g Gt.
//
// All of Bt d B and At m A are sums of numbers times 1 or -1: error at most (channels + 12) 2^-24 times the same formula over
// absolute values, |At| [ sum (|G| |g| |Gt|) . (|Bt| |d| |B|) ] |A|. That holds products of a tile's inputs with weights that
// they do not meet, which cancel: where inputs lie together that differ by orders of magnitude, small outputs lose digits
// that plain sums keep; an infinity or a NaN reaches the whole tile.
//
// The epilogue is called as epilogue(m, n0, n1, values): channels n0 to n1 (at most 64) of pixel m.
#pragma once

#include "irc/conv.h"

IRC_BEGIN

constexpr int64_t winograd_rows = 48, winograd_places = 16, winograd_group = 64;

// Rows of one place for up to `block` channels, as the tiles of conv_rows.h read them.
constexpr int64_t winograd_stride = gemm_depth + 16;
using SpreadRows = DenseRows<float, winograd_stride>;

// Scratch memory of a worker: spread inputs [blocks of channels][places][rows][stride], then sums
// [places][rows][conv_group].
struct WinogradScratch {
    float *inputs, *sums;

    static int64_t input_floats(int64_t channels) {
        return ceil_div(channels, gemm_depth) * winograd_places * winograd_rows * winograd_stride;
    }
    static int64_t bytes(int64_t channels) {
        return (input_floats(channels) + winograd_places * winograd_rows * conv_group) * 4;
    }
    WinogradScratch(uint8_t* scratch, int64_t channels)
        : inputs(reinterpret_cast<float*>(scratch)), sums(inputs + input_floats(channels)) {}
    float* row(int64_t block, int64_t place, int64_t row) const {
        return inputs + ((block * winograd_places + place) * winograd_rows + row) * winograd_stride;
    }
    float* sum(int64_t place, int64_t row) const { return sums + (place * winograd_rows + row) * conv_group; }
};

// A tile of 2 x 2 outputs: its image and its upper left pixel.
struct OutputTile {
    int64_t b, y, x;

    OutputTile(const ConvShape& shape, int64_t tile) {
        const int64_t wide = ceil_div(shape.out_width, 2), high = ceil_div(shape.out_height, 2);
        b = tile / (wide * high);
        y = tile / wide % high * 2;
        x = tile % wide * 2;
    }
};

// Bt d B of one tile, all channels.
template <class Input>
inline void spread_inputs(const ConvShape& shape, const Input* input, int64_t tile, const WinogradScratch& scratch,
                          int64_t row) {
    const OutputTile at(shape, tile);
    const Input* from[4][4];
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const int64_t y = at.y - shape.padding_y + i, x = at.x - shape.padding_x + j;
            const bool inside = y >= 0 && y < shape.height && x >= 0 && x < shape.width;
            from[i][j] = inside ? input + ((at.b * shape.height + y) * shape.width + x) * shape.channels : nullptr;
        }
    for (int64_t c = 0; c < shape.channels; c += 16) {
        f32x16 half[4][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            f32x16 d[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) d[i] = from[i][j] ? load(from[i][j] + c) : zero();
            half[0][j] = sub(d[0], d[2]);
            half[1][j] = add(d[1], d[2]);
            half[2][j] = sub(d[2], d[1]);
            half[3][j] = sub(d[1], d[3]);
        }
        float* to = scratch.row(c / gemm_depth, 0, row) + c % gemm_depth;
        constexpr int64_t step = winograd_rows * winograd_stride;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            store(to + (4 * i + 0) * step, sub(half[i][0], half[i][2]));
            store(to + (4 * i + 1) * step, add(half[i][1], half[i][2]));
            store(to + (4 * i + 2) * step, sub(half[i][2], half[i][1]));
            store(to + (4 * i + 3) * step, sub(half[i][1], half[i][3]));
        }
    }
}

// At m A of one tile's sums for channels [n0, n1), handed to the epilogue.
template <class Epilogue>
inline void gather_outputs(const ConvShape& shape, const WinogradScratch& scratch, int64_t tile, int64_t row, int64_t n0,
                           int64_t n1, Epilogue& epilogue) {
    alignas(64) float values[2][2][winograd_group];
    for (int64_t n = 0; n < n1 - n0; n += 16) {
        f32x16 half[2][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            f32x16 m[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) m[i] = load(scratch.sum(4 * i + j, row) + n);
            half[0][j] = add(add(m[0], m[1]), m[2]);
            half[1][j] = sub(sub(m[1], m[2]), m[3]);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            store(values[i][0] + n, add(add(half[i][0], half[i][1]), half[i][2]));
            store(values[i][1] + n, sub(sub(half[i][1], half[i][2]), half[i][3]));
        }
    }
    const OutputTile at(shape, tile);
    for (int64_t i = 0; i < min_of(2, shape.out_height - at.y); ++i)
        for (int64_t j = 0; j < min_of(2, shape.out_width - at.x); ++j)
            epilogue((at.b * shape.out_height + at.y + i) * shape.out_width + at.x + j, n0, n1,
                     static_cast<const float*>(values[i][j]));
}

// Output tiles [t0, t1), channels [n0, n1).
template <class Input, class Epilogue>
inline void winograd_block(const ConvShape& shape, const Input* input, const uint8_t* packed,
                           const WinogradScratch& scratch, int64_t t0, int64_t t1, int64_t n0, int64_t n1,
                           Epilogue& epilogue) {
    const FloatProduct<float> product{};
    const int64_t panel_bytes = product.panel_bytes(shape.channels), count = t1 - t0;
    const auto nothing = [](int64_t, int64_t) {};
    for (int64_t t = t0; t < t1; ++t) spread_inputs(shape, input, t, scratch, t - t0);
    for (int64_t n = n0; n < n1; n += winograd_group) {
        for (int64_t place = 0; place < winograd_places; ++place)
            for (int64_t c = 0; c < shape.channels; c += gemm_depth) {
                const SpreadRows rows{scratch.row(c / gemm_depth, place, 0), min_of(gemm_depth, shape.channels - c)};
                const uint8_t* panel = packed + (n / 16 * winograd_places + 4 * place) * panel_bytes + product.panel_bytes(c);
                for (int64_t p = 0; p < winograd_group / 16; p += gemm_panels)
                    conv_panels<gemm_panels>(product, rows, count, panel + p * panel_bytes, panel_bytes, rows.piece,
                                             {scratch.sum(place, 0) + 16 * p, c == 0, 0, n + 16 * p, n1}, KeepSums(),
                                             nothing);
            }
        for (int64_t t = t0; t < t1; ++t)
            gather_outputs(shape, scratch, t, t - t0, n, min_of(n + winograd_group, n1), epilogue);
    }
}

// channels: a multiple of 16. scratch: WinogradScratch::bytes(channels) for each worker. All workers call it; results are
// complete after the next barrier.
template <class Input, class Epilogue>
inline void winograd_conv2d(Worker& worker, const ConvShape& shape, const Input* input, const uint8_t* packed,
                            uint8_t* scratch, Epilogue&& epilogue) {
    const int64_t tiles = shape.batch * ceil_div(shape.out_height, 2) * ceil_div(shape.out_width, 2);
    const int64_t row_blocks = ceil_div(tiles, winograd_rows);
    // Channels are shared where there are few tiles: spreading the inputs again costs little.
    int64_t width = round_up(shape.out_channels, winograd_group);
    while (width > winograd_group && row_blocks * ceil_div(shape.out_channels, width) < 2 * worker.count && worker.count > 1)
        width = round_up(width / 2, winograd_group);
    const int64_t column_blocks = ceil_div(shape.out_channels, width);
    const WinogradScratch own(scratch + worker.index * WinogradScratch::bytes(shape.channels), shape.channels);
    for_chunks(worker, row_blocks * column_blocks, [&](int64_t chunk) {
        const int64_t row_block = chunk / column_blocks, n0 = chunk % column_blocks * width;
        winograd_block(shape, input, packed, own, tiles * row_block / row_blocks, tiles * (row_block + 1) / row_blocks, n0,
                       min_of(shape.out_channels, n0 + width), epilogue);
    });
}

IRC_END
