// Largest value under a window, channels last: out[b, y, x, c] = max over i, j of in[b, y stride - padding + i dilation, …, c],
// places outside the image left out; a NaN under the window is the result, as in PyTorch.
//
// The epilogue is called as epilogue(m, n0, n1, values): channels n0 to n1 (at most 64) of pixel m of all images.
#pragma once

#include "irc/conv_shape.h"

IRC_BEGIN

// The larger of two; NaN where either is.
IRC_INLINE float larger(float a, float b) { return (b > a) | (b != b) ? b : a; }
IRC_INLINE uint8_t larger(uint8_t a, uint8_t b) { return b > a ? b : a; }
IRC_INLINE int8_t larger(int8_t a, int8_t b) { return b > a ? b : a; }

// How numbers are compared, and what is not larger than any: bytes stay bytes.
template <class Input>
struct Largest {
    using Type = float;
    static Type least() { return -__builtin_inff(); }
    static Type of(Input x) { return to_float(x); }
};
template <>
struct Largest<uint8_t> {
    using Type = uint8_t;
    static Type least() { return 0; }
    static Type of(uint8_t x) { return x; }
};
template <>
struct Largest<int8_t> {
    using Type = int8_t;
    static Type least() { return -128; }
    static Type of(int8_t x) { return x; }
};

// Uses of `shape`: channels, sizes and window. All workers call it; results are complete after the next barrier.
template <class Input, class Epilogue>
inline void max_pool2d(Worker& worker, const ConvShape& shape, const Input* input, Epilogue&& epilogue) {
    using Number = typename Largest<Input>::Type;
    for_windows(worker, shape, epilogue, [&](const OutputPixel& at, int64_t c, int64_t count, float* values) {
        Number largest[window_channels];
        for (int64_t k = 0; k < window_channels; ++k) largest[k] = Largest<Input>::least();
        for_inside(shape, at, [&](int64_t, int64_t, int64_t pixel) {
            const Input* from = input + pixel * shape.channels + c;
            if (count == window_channels)
                for (int64_t k = 0; k < window_channels; ++k) largest[k] = larger(largest[k], Largest<Input>::of(from[k]));
            else
                for (int64_t k = 0; k < count; ++k) largest[k] = larger(largest[k], Largest<Input>::of(from[k]));
        });
        for (int64_t k = 0; k < window_channels; ++k) values[k] = static_cast<float>(largest[k]);
    });
}

IRC_END
