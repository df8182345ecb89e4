// Convolution over two axes in f32, channels first: out[b, o, y, x] = sum over c, i, j of
// in[b, c, y stride - padding + i dilation, …] w[o, c, i, j], as an implicit matrix product.
//
// Rows are output channels, columns are pixels. For 128 pixels at a time the inputs under each of `conv_depth` places
// (c, i, j) are laid out as panels of 16 pixels, [places][16]; the weights' rows are broadcast (the tiles of fmatmul.h).
// Results lie along pixels, as channels-first tensors do, so epilogues read and write contiguous memory.
//
// Packed weights: for each group and block of 256 places [channels of the group][272], rows that far apart so that they
// do not share sets of the caches. Sums run in ascending order of places: error at most (places + 1) 2^-24 sum |in w|.
//
// The epilogue is called as epilogue(b, o, p0, p1, values) for pixels p0 to p1 (y out_width + x), at most 128, each once.
#pragma once

#include "irc/fmatmul.h"

IRC_BEGIN

constexpr int64_t conv_depth = gemm_depth, conv_stride = conv_depth + 16, conv_rows = 192, conv_pixels = gemm_columns;

struct ConvShape {
    int64_t batch, channels, height, width, out_channels, out_height, out_width, groups;
    int64_t kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;

    int64_t group_channels() const { return channels / groups; }
    int64_t group_outputs() const { return out_channels / groups; }
    int64_t places() const { return group_channels() * kernel_y * kernel_x; }
    int64_t pixels() const { return out_height * out_width; }
};

// 16 pixels from `pixel` on: where their windows start, and whether they lie in one row of the output.
struct PixelRun {
    int64_t y[16], x[16];
    int64_t count;
    bool one_row;

    PixelRun(const ConvShape& shape, int64_t pixel) : count(min_of(16, shape.pixels() - pixel)) {
        for (int64_t i = 0; i < 16; ++i) {
            const int64_t p = min_of(pixel + i, shape.pixels() - 1);
            y[i] = p / shape.out_width * shape.stride_y - shape.padding_y;
            x[i] = p % shape.out_width * shape.stride_x - shape.padding_x;
        }
        one_row = count == 16 && y[0] == y[15];
    }
};

// Inputs under place (c, i, j) for 16 pixels; outside the image (and past the last pixel): `outside`.
template <class Value>
inline void take_pixels(const ConvShape& shape, const Value* plane, const PixelRun& run, int64_t dy, int64_t dx,
                        Value outside, Value* to, int64_t to_step) {
    if (run.one_row) {
        const int64_t y = run.y[0] + dy, x = run.x[0] + dx;
        if (y < 0 || y >= shape.height) {
            for (int64_t i = 0; i < 16; ++i) to[i * to_step] = outside;
            return;
        }
        const Value* from = plane + y * shape.width + x;
        if (x >= 0 && x + 15 * shape.stride_x < shape.width) {
            if (shape.stride_x == 1)
                for (int64_t i = 0; i < 16; ++i) to[i * to_step] = from[i];
            else
                for (int64_t i = 0; i < 16; ++i) to[i * to_step] = from[i * shape.stride_x];
            return;
        }
    }
    for (int64_t i = 0; i < 16; ++i) {
        const int64_t y = run.y[i] + dy, x = run.x[i] + dx;
        const bool inside = i < run.count && y >= 0 && y < shape.height && x >= 0 && x < shape.width;
        to[i * to_step] = inside ? plane[y * shape.width + x] : outside;
    }
}

// Panels of up to 128 pixels for `length` places from `place` on: [pixels / 16][length][16].
inline void lay_out_pixels(const ConvShape& shape, const float* image, int64_t place, int64_t length, int64_t pixel,
                           int64_t pixels, float* panels) {
    const int64_t area = shape.kernel_y * shape.kernel_x;
    for (int64_t first = 0; first < pixels; first += 16) {
        const PixelRun run(shape, pixel + first);
        float* to = panels + first * length;
        int64_t c = place / area, i = place % area / shape.kernel_x, j = place % shape.kernel_x;
        for (int64_t k = 0; k < length; ++k) {
            take_pixels(shape, image + c * shape.height * shape.width, run, i * shape.dilation_y, j * shape.dilation_x,
                        0.0f, to + k * 16, 1);
            if (++j == shape.kernel_x) {
                j = 0;
                if (++i == shape.kernel_y) {
                    i = 0;
                    ++c;
                }
            }
        }
    }
}

// Output channels [first, first + rows) of one group for pixels [pixel, pixel + pixels).
template <class Epilogue>
inline void conv_block(const ConvShape& shape, const float* input, const float* packed, int64_t b, int64_t group,
                       int64_t first, int64_t rows, int64_t pixel, int64_t pixels, Epilogue& epilogue) {
    alignas(64) float panels[conv_depth * conv_pixels];
    alignas(64) float totals[conv_rows * gemm_columns];
    const int64_t places = shape.places(), outputs = shape.group_outputs(), tiles = ceil_div(rows, gemm_height);
    const float* image = input + (b * shape.channels + group * shape.group_channels()) * shape.height * shape.width;
    const float* weights = packed + group * ceil_div(places, conv_depth) * outputs * conv_stride + first * conv_stride;
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < pixels; n += 16) store(totals + m * gemm_columns + n, zero());
    for (int64_t place = 0; place < places; place += conv_depth) {
        const int64_t length = min_of(conv_depth, places - place), panel_bytes = length * 64;
        lay_out_pixels(shape, image, place, length, pixel, pixels, panels);
        for (int64_t n = 0; n < pixels;) {
            const int64_t count = n + 16 < pixels ? gemm_panels : 1;
            const uint8_t* panel = reinterpret_cast<const uint8_t*>(panels + n * length);
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t row = rows * tile / tiles, height = rows * (tile + 1) / tiles - row;
                const float* tile_weights = weights + row * conv_stride;
                float* sums = totals + row * gemm_columns + n;
                if (count == 1)
                    gemm_tile<FloatPanel<float>, 1>(height, tile_weights, conv_stride, panel, panel_bytes, length, sums);
                else
                    gemm_tile<FloatPanel<float>, gemm_panels>(height, tile_weights, conv_stride, panel, panel_bytes,
                                                              length, sums);
            }
            n += 16 * count;
        }
        weights += outputs * conv_stride;
    }
    for (int64_t m = 0; m < rows; ++m)
        epilogue(b, group * outputs + first + m, pixel, pixel + pixels,
                 static_cast<const float*>(totals + m * gemm_columns));
}

// All workers call it; results are complete after the next barrier.
template <class Epilogue>
inline void conv2d(Worker& worker, const ConvShape& shape, const float* input, const float* packed, Epilogue&& epilogue) {
    const int64_t outputs = shape.group_outputs(), row_blocks = ceil_div(outputs, conv_rows);
    const int64_t pixel_blocks = ceil_div(shape.pixels(), conv_pixels);
    for_chunks(worker, shape.batch * shape.groups * pixel_blocks * row_blocks, [&](int64_t chunk) {
        const int64_t row_block = chunk % row_blocks, pixel_block = chunk / row_blocks % pixel_blocks;
        const int64_t group = chunk / row_blocks / pixel_blocks % shape.groups;
        const int64_t b = chunk / row_blocks / pixel_blocks / shape.groups;
        const int64_t first = outputs * row_block / row_blocks, rows = outputs * (row_block + 1) / row_blocks - first;
        const int64_t pixel = pixel_block * conv_pixels, pixels = min_of(conv_pixels, shape.pixels() - pixel);
        conv_block(shape, input, packed, b, group, first, rows, pixel, pixels, epilogue);
    });
}

IRC_END
