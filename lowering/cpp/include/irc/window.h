// Largest value under a window, channels last: out[b, y, x, c] = max over i, j of in[b, y stride - padding + i dilation, …, c],
// places outside the image left out; a NaN under the window is the result, as in PyTorch.
//
// The epilogue is called as epilogue(m, n0, n1, values): channels n0 to n1 (at most 64) of pixel m of all images.
#pragma once

#include "irc/conv_shape.h"

IRC_BEGIN

// The larger of `largest` and `count` numbers at `from`.
template <class Input>
inline void take_larger(const Input* from, int64_t count, float* largest) {
    if (count == window_channels) {
        for (int64_t c = 0; c < window_channels; ++c) {
            const float value = to_float(from[c]);
            largest[c] = (value > largest[c]) | (value != value) ? value : largest[c];
        }
        return;
    }
    for (int64_t c = 0; c < count; ++c) {
        const float value = to_float(from[c]);
        largest[c] = (value > largest[c]) | (value != value) ? value : largest[c];
    }
}

// Uses of `shape`: channels, sizes and window. All workers call it; results are complete after the next barrier.
template <class Input, class Epilogue>
inline void max_pool2d(Worker& worker, const ConvShape& shape, const Input* input, Epilogue&& epilogue) {
    for_windows(worker, shape, epilogue, [&](const OutputPixel& at, int64_t c, int64_t count, float* largest) {
        for (int64_t k = 0; k < window_channels; ++k) largest[k] = -__builtin_inff();
        for_inside(shape, at, [&](int64_t, int64_t, int64_t pixel) {
            take_larger(input + pixel * shape.channels + c, count, largest);
        });
    });
}

IRC_END
