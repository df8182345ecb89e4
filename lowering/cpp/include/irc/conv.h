// Convolution over two axes, channels last: out[b, y, x, o] = sum over i, j, c of
// in[b, y stride - padding + i dilation, x …, c] w[o, c, i, j], as a matrix product that gathers its rows.
//
// Rows are the pixels of all images, columns the output channels, the depth is (i, j, c) with c fastest: what lies under
// one row of the window is contiguous in memory (without groups and dilation), so a block of 96 rows and 256 places is
// gathered by plain copies, with zeros outside the image, and then read by all output channels of the block. Activations
// are widened to the type that is multiplied while they are copied.
//
// Packed weights: for each group the panels of fmatmul.h. Where every channel is a group of its own (depthwise):
// f32 [places][channels padded to 16].
//
// Sums run in ascending order of places: error at most (places + 4) 2^-24 sum |in w|.
//
// The epilogue is called as epilogue(m, n0, n1, values): channels n0 to n1 (at most 128) of pixel m.
#pragma once

#include "irc/fmatmul.h"

IRC_BEGIN

constexpr int64_t conv_columns = 256, conv_stride = gemm_depth + 16;

struct ConvShape {
    int64_t batch, channels, height, width, out_channels, out_height, out_width, groups;
    int64_t kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;

    int64_t group_channels() const { return channels / groups; }
    int64_t group_outputs() const { return out_channels / groups; }
    int64_t places() const { return group_channels() * kernel_y * kernel_x; }
    int64_t pixels() const { return batch * out_height * out_width; }
    bool depthwise() const { return groups == channels && groups == out_channels; }
    // Whether a pixel's inputs are one pixel, and pixels follow one another in memory.
    bool plain() const {
        return kernel_y * kernel_x * groups * stride_y * stride_x == 1 && padding_y == 0 && padding_x == 0;
    }
};

// Inputs as they are multiplied. `readable`: elements that may be read at `from`; what is written behind `count`, up to
// 15 numbers, is of no account.
struct FloatInputs {
    using Row = float;
    float outside() const { return 0.0f; }
    template <class Input>
    void copy(float* to, const Input* from, int64_t count, int64_t readable) const {
        if (readable >= count + 15)
            for (int64_t k = 0; k < count; k += 16) store(to + k, load(from + k));
        else
            for (int64_t k = 0; k < count; k += 16) store(to + k, load_part(from + k, count - k));
    }
};

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
template <class Inputs, class Input>
inline void gather_window(const ConvShape& shape, const Inputs& inputs, const Input* image, const Input* end,
                          RunStart start, int64_t y, int64_t x, int64_t length, typename Inputs::Row* to) {
    const int64_t width = shape.group_channels(), run = start.run;
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

// Rows [m0, m1) of the matrix, places [place, place + length): to [rows][conv_stride].
template <class Inputs, class Input>
inline void gather_rows(const ConvShape& shape, const Inputs& inputs, const Input* input, int64_t group, int64_t m0,
                        int64_t m1, int64_t place, int64_t length, typename Inputs::Row* to) {
    const int64_t image_size = shape.height * shape.width * shape.channels;
    const Input* end = input + shape.batch * image_size;
    if (shape.plain()) {
        for (int64_t m = m0; m < m1; ++m, to += conv_stride) {
            const Input* from = input + m * shape.channels + place;
            inputs.copy(to, from, length, end - from);
        }
        return;
    }
    const RunStart start(shape, place);
    int64_t x = m0 % shape.out_width, y = m0 / shape.out_width % shape.out_height;
    int64_t b = m0 / shape.out_width / shape.out_height;
    for (int64_t m = m0; m < m1; ++m, to += conv_stride) {
        const Input* image = input + b * image_size + group * shape.group_channels();
        gather_window(shape, inputs, image, end, start, y * shape.stride_y - shape.padding_y,
                      x * shape.stride_x - shape.padding_x, length, to);
        if (++x == shape.out_width) {
            x = 0;
            if (++y == shape.out_height) {
                y = 0;
                ++b;
            }
        }
    }
}

// Weights that are read soon, into the second-level cache. Reading ahead of the last ones is harmless.
inline void fetch_later(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// How f32 rows meet the panels of fmatmul.h.
template <class Stored>
struct FloatProduct {
    using Panel = FloatPanel<Stored>;
    using Sum = float;
    FloatInputs inputs;

    static int64_t group_bytes(const ConvShape& shape) {
        return ceil_div(shape.group_outputs(), 16) * Panel::bytes(shape.places());
    }
    static int64_t depth(int64_t length) { return length; }
    // Rows [rows][conv_stride] times the panels of columns [n0, n1) of a group, places from `place`: added to totals.
    void add(const float* rows, int64_t count, const uint8_t* packed, int64_t places, int64_t n0, int64_t n1,
             int64_t place, int64_t length, float* totals) const {
        const int64_t panel_bytes = Panel::bytes(places), tiles = ceil_div(count, gemm_height);
        for (int64_t n = n0; n < n1;) {
            const int64_t panels = n + 16 < n1 ? gemm_panels : 1;
            const uint8_t* panel = Panel::at(packed + n / 16 * panel_bytes, place);
            const int64_t ahead = panels * panel_bytes, block = panels * Panel::bytes(length) / tiles;
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t first = count * tile / tiles, height = count * (tile + 1) / tiles - first;
                fetch_later(panel + ahead + tile * block, block);
                float* sums = totals + first * gemm_columns + n - n0;
                if (panels == 1)
                    gemm_tile<Panel, 1>(height, rows + first * conv_stride, conv_stride, panel, panel_bytes, length, sums);
                else
                    gemm_tile<Panel, gemm_panels>(height, rows + first * conv_stride, conv_stride, panel, panel_bytes,
                                                  length, sums);
            }
            n += 16 * panels;
        }
    }
    // Sums of channels n0 on (of all groups) as the epilogue gets them.
    const float* finish(const float* sums, int64_t, int64_t, float*) const { return sums; }
};

// Rows [m0, m1), columns [n0, n1) of one group.
template <class Product, class Input, class Epilogue>
inline void conv_block(const ConvShape& shape, const Product& product, const Input* input, const uint8_t* packed,
                       int64_t group, int64_t m0, int64_t m1, int64_t n0, int64_t n1, Epilogue& epilogue) {
    using Row = typename std::decay_t<decltype(product.inputs)>::Row;
    using Sum = typename Product::Sum;
    alignas(64) Row rows[gemm_rows * conv_stride];
    alignas(64) Sum totals[conv_columns / gemm_columns][gemm_rows * gemm_columns];
    const int64_t places = shape.places(), count = m1 - m0;
    for (int64_t n = n0; n < n1; n += gemm_columns)
        for (int64_t m = 0; m < count; ++m)
            std::memset(totals[(n - n0) / gemm_columns] + m * gemm_columns, 0,
                        round_up(min_of(gemm_columns, n1 - n), 16) * sizeof(Sum));
    for (int64_t place = 0; place < places; place += gemm_depth) {
        const int64_t length = min_of(gemm_depth, places - place);
        gather_rows(shape, product.inputs, input, group, m0, m1, place, length, rows);
        for (int64_t m = 0; m < count; ++m)
            for (int64_t k = length; k < Product::depth(length); ++k) rows[m * conv_stride + k] = 0;
        for (int64_t n = n0; n < n1; n += gemm_columns)
            product.add(rows, count, packed, places, n, min_of(n1, n + gemm_columns), place, length,
                        totals[(n - n0) / gemm_columns]);
    }
    const int64_t outputs = group * shape.group_outputs();
    alignas(64) float values[gemm_columns];
    for (int64_t m = 0; m < count; ++m)
        for (int64_t n = n0; n < n1; n += gemm_columns) {
            const int64_t last = min_of(n1, n + gemm_columns);
            epilogue(m0 + m, outputs + n, outputs + last,
                     product.finish(totals[(n - n0) / gemm_columns] + m * gemm_columns, outputs + n, outputs + last, values));
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
    const int64_t column_blocks = ceil_div(outputs, width), group_bytes = Product::group_bytes(shape);
    for_chunks(worker, shape.groups * row_blocks * column_blocks, [&](int64_t chunk) {
        const int64_t column_block = chunk % column_blocks, row_block = chunk / column_blocks % row_blocks;
        const int64_t group = chunk / column_blocks / row_blocks, n0 = column_block * width;
        conv_block(shape, product, input, packed + group * group_bytes, group, pixels * row_block / row_blocks,
                   pixels * (row_block + 1) / row_blocks, n0, min_of(outputs, n0 + width), epilogue);
    });
}

// Every channel for itself: one row of the output at a time, up to 64 channels together.
template <class Input, class Epilogue>
inline void conv_depthwise(Worker& worker, const ConvShape& shape, const Input* input, const float* weights,
                           Epilogue& epilogue) {
    constexpr int64_t vectors = 4;
    const int64_t padded_channels = round_up(shape.channels, 16);
    for_chunks(worker, shape.batch * shape.out_height, [&](int64_t line) {
        const int64_t b = line / shape.out_height, y = line % shape.out_height * shape.stride_y - shape.padding_y;
        for (int64_t out_x = 0; out_x < shape.out_width; ++out_x) {
            const int64_t x = out_x * shape.stride_x - shape.padding_x;
            for (int64_t c = 0; c < shape.channels; c += 16 * vectors) {
                const int64_t count = min_of(16 * vectors, shape.channels - c);
                f32x16 sums[vectors] = {zero(), zero(), zero(), zero()};
                for (int64_t i = 0; i < shape.kernel_y; ++i) {
                    const int64_t top = y + i * shape.dilation_y;
                    if (top < 0 || top >= shape.height) continue;
                    for (int64_t j = 0; j < shape.kernel_x; ++j) {
                        const int64_t left = x + j * shape.dilation_x;
                        if (left < 0 || left >= shape.width) continue;
                        const Input* from = input + ((b * shape.height + top) * shape.width + left) * shape.channels + c;
                        const float* taps = weights + (i * shape.kernel_x + j) * padded_channels + c;
                        if (count == 16 * vectors) {
                            for (int64_t v = 0; v < vectors; ++v)
                                sums[v] = fma(load(from + 16 * v), load(taps + 16 * v), sums[v]);
                        } else {
                            for (int64_t v = 0; 16 * v < count; ++v)
                                sums[v] = fma(load_part(from + 16 * v, count - 16 * v), load(taps + 16 * v), sums[v]);
                        }
                    }
                }
                alignas(64) float values[16 * vectors];
                for (int64_t v = 0; v < vectors; ++v) store(values + 16 * v, sums[v]);
                epilogue(line * shape.out_width + out_x, c, c + count, static_cast<const float*>(values));
            }
        }
    });
}

// Stored: type of the packed weights.
template <class Stored, class Input, class Epilogue>
inline void conv2d(Worker& worker, const ConvShape& shape, const Input* input, const uint8_t* packed,
                   Epilogue&& epilogue) {
    if (shape.depthwise())
        conv_depthwise(worker, shape, input, reinterpret_cast<const float*>(packed), epilogue);
    else
        conv_rows(worker, shape, FloatProduct<Stored>{}, input, packed, epilogue);
}

IRC_END
