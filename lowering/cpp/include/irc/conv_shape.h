// Windows over images, channels last: what convolutions and pooling share.
#pragma once

#include "irc/f32x16.h"
#include "irc/pool.h"

IRC_BEGIN

struct ConvShape {
    int64_t batch, channels, height, width, out_channels, out_height, out_width, groups;
    int64_t kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;

    int64_t group_channels() const { return channels / groups; }
    int64_t group_outputs() const { return out_channels / groups; }
    int64_t places() const { return group_channels() * kernel_y * kernel_x; }
    int64_t pixels() const { return batch * out_height * out_width; }
    bool depthwise() const { return groups == channels && groups == out_channels; }
};

// An output pixel: which one of all images, its image, and the corner of its window.
struct OutputPixel {
    int64_t pixel, b, y, x;

    OutputPixel(const ConvShape& shape, int64_t pixel)
        : pixel(pixel), b(pixel / (shape.out_height * shape.out_width)),
          y(pixel / shape.out_width % shape.out_height * shape.stride_y - shape.padding_y),
          x(pixel % shape.out_width * shape.stride_x - shape.padding_x) {}
    // The one behind it.
    void next(const ConvShape& shape) {
        ++pixel;
        x += shape.stride_x;
        if (x + shape.padding_x < shape.out_width * shape.stride_x) return;
        x = -shape.padding_x;
        y += shape.stride_y;
        if (y + shape.padding_y < shape.out_height * shape.stride_y) return;
        y = -shape.padding_y;
        ++b;
    }
    // Number of the pixel of all images under place (i, j) of the window, or -1 outside the image.
    int64_t under(const ConvShape& shape, int64_t i, int64_t j) const {
        const int64_t top = y + i * shape.dilation_y, left = x + j * shape.dilation_x;
        const bool inside = top >= 0 && top < shape.height && left >= 0 && left < shape.width;
        return inside ? (b * shape.height + top) * shape.width + left : -1;
    }
};

constexpr int64_t window_channels = 64;

// Layers whose channels do not meet: body(at, c, count, values) computes `count` (at most 64) channels from c of output
// pixel `at`; the epilogue gets them. Calls for_chunks.
template <class Body, class Epilogue>
inline void for_windows(Worker& worker, const ConvShape& shape, Epilogue& epilogue, const Body& body) {
    for_chunks(worker, shape.batch * shape.out_height, [&](int64_t line) {
        for (int64_t x = 0; x < shape.out_width; ++x) {
            const OutputPixel at(shape, line * shape.out_width + x);
            for (int64_t c = 0; c < shape.channels; c += window_channels) {
                const int64_t count = min_of(window_channels, shape.channels - c);
                alignas(64) float values[window_channels];
                body(at, c, count, values);
                epilogue(at.pixel, c, c + count, static_cast<const float*>(values));
            }
        }
    });
}

// Calls f(i, j, pixel) for the places of a window that lie inside the image.
template <class F>
IRC_INLINE void for_inside(const ConvShape& shape, const OutputPixel& at, const F& f) {
    for (int64_t i = 0; i < shape.kernel_y; ++i)
        for (int64_t j = 0; j < shape.kernel_x; ++j) {
            const int64_t pixel = at.under(shape, i, j);
            if (pixel >= 0) f(i, j, pixel);
        }
}

IRC_END
