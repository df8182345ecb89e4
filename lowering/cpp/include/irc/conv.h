// Convolution over two axes, channels last, with weights stored as floats: the product of conv_rows.h, summed in f32.
// Activations are widened to f32 while they are gathered.
//
// Packed weights: for each group the panels of fmatmul.h. Where every channel is a group of its own (depthwise):
// f32 [places][channels padded to 16].
//
// Sums run in ascending order of places: error at most (places + 4) 2^-24 sum |in w|.
//
// The epilogue is called as epilogue(m, n0, n1, values): channels n0 to n1 (at most 128) of pixel m.
#pragma once

#include "irc/conv_rows.h"

IRC_BEGIN

// Inputs as they are multiplied. `readable`: elements that may be read at `from`; what is written behind `count`, up to
// 15 numbers, is of no account.
struct FloatInputs {
    float outside() const { return 0.0f; }
    bool in_place() const { return true; }
    template <class Input>
    void copy(float* to, const Input* from, int64_t count, int64_t readable) const {
        if (readable >= count + 15)
            for (int64_t k = 0; k < count; k += 16) store(to + k, load(from + k));
        else
            for (int64_t k = 0; k < count; k += 16) store(to + k, load_part(from + k, count - k));
    }
};

// How f32 rows meet the panels of fmatmul.h. Narrower weights are widened once for all tiles of a block where one panel
// is multiplied at a time: a tile has few rows there, and would widen as often as it multiplies.
template <class Stored>
struct FloatProduct {
    using Panel = FloatPanel<Stored>;
    using Row = float;
    using Sum = float;
    using Sums = f32x16;
    static constexpr int height = gemm_height, panels = gemm_panels;
    static constexpr bool widens = sizeof(Stored) < 4 && panels == 1;
    static constexpr int64_t step = Panel::step, block = gemm_depth;
    static constexpr int64_t step_bytes = step * 16 * static_cast<int64_t>(widens ? 4 : sizeof(Stored));
    struct Ready {
        alignas(64) float panel[widens ? 16 * block : 1];
    };
    FloatInputs inputs;

    static int64_t panel_bytes(int64_t places) { return Panel::bytes(places); }
    static f32x16 start(int64_t) { return zero(); }
    static f32x16 load_sums(const float* from) { return load(from); }
    static const uint8_t* ready(const uint8_t* panel, int64_t length, Ready& ready) {
        if constexpr (!widens) return panel;
        for (int64_t k = 0; k < length; k += step) {
            store(ready.panel + 16 * k, Panel::template columns<0>(Panel::at(panel, k)));
            if constexpr (step == 2) store(ready.panel + 16 * k + 16, Panel::template columns<1>(Panel::at(panel, k)));
        }
        return reinterpret_cast<const uint8_t*>(ready.panel);
    }
    // The same of a panel's neighbours from k on.
    static const uint8_t* ready_at(const uint8_t* panel, int64_t k, int64_t length, Ready& memory) {
        return ready(panel + Panel::bytes(k), length, memory);
    }
    template <int which>
    static IRC_INLINE f32x16 columns_of(const uint8_t* panel) {
        if constexpr (widens) return load(reinterpret_cast<const float*>(panel) + 16 * which);
        return Panel::template columns<which>(panel);
    }
    template <int which, int H, int P, class Tile>
    static IRC_INLINE void multiply_one(const Tile& tile, int64_t k, const uint8_t* panel, int64_t panel_bytes,
                                        f32x16 (&sums)[H][P]) {
        f32x16 columns[P];
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) columns[p] = columns_of<which>(panel + p * panel_bytes);
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) {
            const f32x16 row = set1(*tile.at(m, k + which));
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) sums[m][p] = fma(row, columns[p], sums[m][p]);
        }
    }
    template <int H, int P, class Tile>
    static IRC_INLINE void multiply(const Tile& tile, int64_t length, const uint8_t* panel, int64_t panel_bytes,
                                    f32x16 (&sums)[H][P]) {
#pragma GCC unroll 4
        for (int64_t k = 0; k < length; k += step) {
            multiply_one<0>(tile, k, panel, panel_bytes, sums);
            if constexpr (step == 2) multiply_one<1>(tile, k, panel, panel_bytes, sums);
            panel += step_bytes;
        }
    }
    // Sums of channels n0 on (of all groups) as the epilogue gets them.
    static const float* finish(const float* sums, int64_t, int64_t, float*) { return sums; }
};

// Every channel for itself.
template <class Input, class Epilogue>
inline void conv_depthwise(Worker& worker, const ConvShape& shape, const Input* input, const float* weights,
                           Epilogue& epilogue) {
    constexpr int64_t vectors = window_channels / 16;
    const int64_t padded_channels = round_up(shape.channels, 16);
    for_windows(worker, shape, epilogue, [&](const OutputPixel& at, int64_t c, int64_t count, float* values) {
        f32x16 sums[vectors] = {zero(), zero(), zero(), zero()};
        for_inside(shape, at, [&](int64_t i, int64_t j, int64_t pixel) {
            const Input* from = input + pixel * shape.channels + c;
            const float* taps = weights + (i * shape.kernel_x + j) * padded_channels + c;
            if (count == window_channels) {
                for (int64_t v = 0; v < vectors; ++v) sums[v] = fma(load(from + 16 * v), load(taps + 16 * v), sums[v]);
            } else {
                for (int64_t v = 0; 16 * v < count; ++v)
                    sums[v] = fma(load_part(from + 16 * v, count - 16 * v), load(taps + 16 * v), sums[v]);
            }
        });
        for (int64_t v = 0; v < vectors; ++v) store(values + 16 * v, sums[v]);
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
