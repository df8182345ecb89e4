// Convolutions in groups of 4 or 8 channels that give as many: lanes are the output channels of two or four groups, and each
// meets the inputs of its own group.
//
// Four neighbouring pixels of a row pass together, 16 channels at a time. What lies under their windows is widened to f32
// and laid together, with zeros around the image, so that a weight is read once for four products.
//
// Packed weights: f32 [channels / 16][places][group's inputs][16 outputs]. Sums run in ascending order of places: error at
// most (places + 4) 2^-24 sum |in w|. The epilogue is called as epilogue(m, n0, n1, values) for up to 64 channels of pixel m.
#pragma once

#include <utility>

#include "irc/conv_shape.h"
#include "irc/f32x16.h"

IRC_BEGIN

constexpr int64_t group_pixels = 4, group_window = 7, group_stride = 2;

// Number c of each lane's group of Width, of 16 numbers.
template <int Width, int c>
IRC_INLINE f32x16 of_group(const float* x) {
    static_assert(Width == 4 || Width == 8, "groups that a shuffle or two broadcasts serve");
#if defined(IRC_AVX512)
    if constexpr (Width == 4) {
        const __m512 all = _mm512_loadu_ps(x);
        return {_mm512_shuffle_ps(all, all, c * 0x55)};
    }
    const __m512i low = _mm512_castps_si512(_mm512_set1_ps(x[c]));
    const __m256i high = _mm256_castps_si256(_mm256_broadcast_ss(x + 8 + c));
    return {_mm512_castsi512_ps(_mm512_inserti64x4(low, high, 1))};
#elif defined(IRC_AVX2)
    if constexpr (Width == 4)
        return {_mm256_permute_ps(_mm256_loadu_ps(x), c * 0x55), _mm256_permute_ps(_mm256_loadu_ps(x + 8), c * 0x55)};
    return {_mm256_broadcast_ss(x + c), _mm256_broadcast_ss(x + 8 + c)};
#else
    f32x16 result;
    for (int i = 0; i < 16; ++i) result.v[i] = x[i / Width * Width + c];
    return result;
#endif
}

// What lies under four windows of a row of pixels: [window's rows][columns][16].
struct GroupInputs {
    alignas(64) float at[group_window * ((group_pixels - 1) * group_stride + group_window) * 16];
    int64_t columns;

    template <class Input>
    void fill(const ConvShape& shape, const Input* image, int64_t y, int64_t x) {
        columns = (group_pixels - 1) * shape.stride_x + shape.kernel_x;
        float* to = at;
        for (int64_t i = 0; i < shape.kernel_y; ++i) {
            const bool inside = y + i >= 0 && y + i < shape.height;
            const Input* row = image + (y + i) * shape.width * shape.channels;
            for (int64_t k = x; k < x + columns; ++k, to += 16)
                store(to, inside && k >= 0 && k < shape.width ? load(row + k * shape.channels) : zero());
        }
    }
};

template <int Width, int... c>
IRC_INLINE void add_group(const float* const (&x)[group_pixels], const float* weights, f32x16 (&sums)[group_pixels],
                          std::integer_sequence<int, c...>) {
    const auto one = [&](auto number) __attribute__((always_inline)) {
        const f32x16 weight = load(weights + 16 * number.value);
#pragma GCC unroll 4
        for (int64_t p = 0; p < group_pixels; ++p)
            sums[p] = fma(of_group<Width, decltype(number)::value>(x[p]), weight, sums[p]);
    };
    (one(std::integral_constant<int, c>()), ...);
}

// Sums of 16 channels of four pixels.
template <int Width>
inline void group_sums_of(const ConvShape& shape, const GroupInputs& inputs, const float* weights,
                          f32x16 (&sums)[group_pixels]) {
    for (f32x16& sum : sums) sum = zero();
    for (int64_t i = 0; i < shape.kernel_y; ++i)
        for (int64_t j = 0; j < shape.kernel_x; ++j, weights += 16 * Width) {
            const float* x[group_pixels];
            for (int64_t p = 0; p < group_pixels; ++p) x[p] = inputs.at + (i * inputs.columns + j + p * shape.stride_x) * 16;
            add_group<Width>(x, weights, sums, std::make_integer_sequence<int, Width>());
        }
}

// Groups of Width channels; windows of up to 7 x 7 places, strides up to 2, no dilation. All workers call it; results are
// complete after the next barrier.
template <int Width, class Input, class Epilogue>
inline void conv2d_groups(Worker& worker, const ConvShape& shape, const Input* input, const uint8_t* packed,
                          Epilogue&& epilogue) {
    // Channels whose weights stay in the first-level cache for a row.
    constexpr int64_t together = 256 / Width;
    const int64_t blocks = ceil_div(shape.channels, together), vector_floats = shape.places() * 16;
    const float* const weights = reinterpret_cast<const float*>(packed);
    for_chunks(worker, shape.batch * shape.out_height * blocks, [&](int64_t chunk) {
        const int64_t n0 = chunk % blocks * together, n1 = min_of(shape.channels, n0 + together);
        const int64_t row = chunk / blocks, b = row / shape.out_height, y = row % shape.out_height;
        const Input* image = input + b * shape.height * shape.width * shape.channels;
        alignas(64) float values[group_pixels][together];
        GroupInputs inputs;
        for (int64_t x = 0; x < shape.out_width; x += group_pixels) {
            for (int64_t n = n0; n < n1; n += 16) {
                f32x16 sums[group_pixels];
                inputs.fill(shape, image + n, y * shape.stride_y - shape.padding_y, x * shape.stride_x - shape.padding_x);
                group_sums_of<Width>(shape, inputs, weights + n / 16 * vector_floats, sums);
                for (int64_t p = 0; p < group_pixels; ++p) store(values[p] + n - n0, sums[p]);
            }
            for (int64_t p = 0; p < min_of(group_pixels, shape.out_width - x); ++p)
                epilogue(row * shape.out_width + x + p, n0, n1, static_cast<const float*>(values[p]));
        }
    });
}

IRC_END
