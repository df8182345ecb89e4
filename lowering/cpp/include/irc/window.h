// Largest value under a window, channels last: out[b, y, x, c] = max over i, j of in[b, y stride - padding + i dilation, …, c],
// places outside the image left out; a NaN under the window is the result, as in PyTorch.
//
// The epilogue is called as epilogue(m, n0, n1, values): channels n0 to n1 (at most 64) of pixel m of all images.
#pragma once

#include "irc/conv.h"

IRC_BEGIN

constexpr int64_t window_channels = 64;

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
    for_chunks(worker, shape.batch * shape.out_height, [&](int64_t line) {
        const int64_t b = line / shape.out_height, y = line % shape.out_height * shape.stride_y - shape.padding_y;
        for (int64_t out_x = 0; out_x < shape.out_width; ++out_x) {
            const int64_t x = out_x * shape.stride_x - shape.padding_x;
            for (int64_t c = 0; c < shape.channels; c += window_channels) {
                const int64_t count = min_of(window_channels, shape.channels - c);
                alignas(64) float largest[window_channels];
                for (float& one : largest) one = -__builtin_inff();
                for (int64_t i = 0; i < shape.kernel_y; ++i) {
                    const int64_t top = y + i * shape.dilation_y;
                    if (top < 0 || top >= shape.height) continue;
                    for (int64_t j = 0; j < shape.kernel_x; ++j) {
                        const int64_t left = x + j * shape.dilation_x;
                        if (left < 0 || left >= shape.width) continue;
                        const int64_t place = (b * shape.height + top) * shape.width + left;
                        take_larger(input + place * shape.channels + c, count, largest);
                    }
                }
                epilogue(line * shape.out_width + out_x, c, c + count, static_cast<const float*>(largest));
            }
        }
    });
}

IRC_END
