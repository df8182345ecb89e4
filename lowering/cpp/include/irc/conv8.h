// Convolutions and linear layers of 8-bit integers with static scales:
// out[m, o] = scale[o] sum over places of (in[m, place] - zero) w[o, place], with the rows of conv.h.
//
// Activations are widened to 16 bits and lose their zero point while a block is gathered: padding is 0 then, and no
// correction is needed behind. Weights are signed bytes in pairs along the depth, [places / 2][16][2] a panel, widened a
// block at a time and read by all rows of it. Products of pairs are summed in 32 bits (vpmaddwd, vpdpwssd): as
// |in - zero| <= 255 and |w| <= 128, nothing saturates, and sums are exact for up to 65792 places.
//
// What the epilogue gets is the exact sum, rounded to f32 (exact below 2^24), times an f32 scale: error 2^-23 relative.
#pragma once

#include "irc/conv.h"
#include "irc/dot8.h"

IRC_BEGIN

// Pairs of 16 columns.
#if defined(IRC_AVX512)
struct shorts32 {
    __m512i v;
};
IRC_INLINE shorts32 load_pairs(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
IRC_INLINE void dot(i32x16& sum, shorts32 weights, int32_t pair) {
    sum.v = _mm512_dpwssd_epi32(sum.v, weights.v, _mm512_set1_epi32(pair));
}
IRC_INLINE i32x16 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
#elif defined(IRC_AVX2)
struct shorts32 {
    __m256i a, b;
};
IRC_INLINE shorts32 load_pairs(const int16_t* p) {
    const __m256i* raw = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(raw), _mm256_loadu_si256(raw + 1)};
}
IRC_INLINE void dot(i32x16& sum, shorts32 weights, int32_t pair) {
    const __m256i x = _mm256_set1_epi32(pair);
    sum.a = in_order(_mm256_add_epi32(sum.a, _mm256_madd_epi16(weights.a, x)));
    sum.b = in_order(_mm256_add_epi32(sum.b, _mm256_madd_epi16(weights.b, x)));
}
IRC_INLINE i32x16 load_i32(const int32_t* p) {
    const __m256i* raw = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(raw), _mm256_loadu_si256(raw + 1)};
}
#else
struct shorts32 {
    int16_t v[32];
};
IRC_INLINE shorts32 load_pairs(const int16_t* p) {
    shorts32 pairs;
    std::memcpy(pairs.v, p, 64);
    return pairs;
}
IRC_INLINE void dot(i32x16& sum, shorts32 weights, int32_t pair) {
    int16_t x[2];
    std::memcpy(x, &pair, 4);
    for (int i = 0; i < 16; ++i) sum.v[i] += weights.v[2 * i] * x[0] + weights.v[2 * i + 1] * x[1];
}
IRC_INLINE i32x16 load_i32(const int32_t* p) {
    i32x16 sum;
    std::memcpy(sum.v, p, 64);
    return sum;
}
#endif

// Bytes without their zero point, in 16 bits.
struct ShortInputs {
    using Row = int16_t;
    int16_t zero;
    template <class Input>
    void copy(int16_t* to, const Input* from, int64_t count, int64_t readable) const {
        const int16_t offset = zero;
        if (readable >= count + 15) {
            for (int64_t k = 0; k < count; k += 16)
                for (int64_t i = 0; i < 16; ++i) to[k + i] = static_cast<int16_t>(from[k + i] - offset);
        } else {
            for (int64_t k = 0; k < count; ++k) to[k] = static_cast<int16_t>(from[k] - offset);
        }
    }
};

// H rows times one panel over `length` neighbours (even): totals [H][gemm_columns] += product.
template <int H>
inline void short_tile(const int16_t* x, const int16_t* panel, int64_t length, int32_t* totals) {
    i32x16 sums[H];
#pragma GCC unroll 16
    for (int m = 0; m < H; ++m) sums[m] = load_i32(totals + m * gemm_columns);
    for (int64_t k = 0; k < length; k += 2) {
        const shorts32 weights = load_pairs(panel + 16 * k);
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) {
            int32_t pair;
            std::memcpy(&pair, x + m * conv_stride + k, 4);
            dot(sums[m], weights, pair);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < H; ++m) store(totals + m * gemm_columns, sums[m]);
}

inline void short_tile(int64_t height, const int16_t* x, const int16_t* panel, int64_t length, int32_t* totals) {
    switch (height) {
#define IRC_HEIGHT(H) \
    case H: short_tile<H>(x, panel, length, totals); break
        IRC_HEIGHT(1);
        IRC_HEIGHT(2);
        IRC_HEIGHT(3);
        IRC_HEIGHT(4);
#if !defined(IRC_PLAIN)
        IRC_HEIGHT(5);
        IRC_HEIGHT(6);
#endif
#if defined(IRC_AVX512)
        IRC_HEIGHT(7);
        IRC_HEIGHT(8);
        IRC_HEIGHT(9);
        IRC_HEIGHT(10);
        IRC_HEIGHT(11);
        IRC_HEIGHT(12);
        IRC_HEIGHT(13);
        IRC_HEIGHT(14);
#endif
#undef IRC_HEIGHT
    }
}

struct ByteProduct {
    using Sum = int32_t;
    ShortInputs inputs;
    const float* scales;  // [channels of all groups, padded to 16]

    static int64_t depth(int64_t length) { return round_up(length, 2); }
    static int64_t panel_bytes(int64_t places) { return depth(places) * 16; }
    static int64_t group_bytes(const ConvShape& shape) {
        return ceil_div(shape.group_outputs(), 16) * panel_bytes(shape.places());
    }
    void add(const int16_t* rows, int64_t count, const uint8_t* packed, int64_t places, int64_t n0, int64_t n1,
             int64_t place, int64_t length, int32_t* totals) const {
        alignas(64) int16_t panel[16 * gemm_depth];
        const int64_t tiles = ceil_div(count, gemm_height), whole = depth(length);
        for (int64_t n = n0; n < n1; n += 16) {
            const int8_t* stored = reinterpret_cast<const int8_t*>(packed + n / 16 * panel_bytes(places)) + place * 16;
            for (int64_t i = 0; i < whole * 16; ++i) panel[i] = stored[i];
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t first = count * tile / tiles, height = count * (tile + 1) / tiles - first;
                short_tile(height, rows + first * conv_stride, panel, whole, totals + first * gemm_columns + n - n0);
            }
        }
    }
    const float* finish(const int32_t* sums, int64_t n0, int64_t n1, float* values) const {
        for (int64_t n = n0; n < n1; n += 16) {
            const f32x16 scale = load_part(scales + n, n1 - n);
            store(values + n - n0, mul(to_float(load_i32(sums + n - n0)), scale));
        }
        return values;
    }
};

// packed: panels of the groups, then (at `scales_at`) f32 scales [out_channels]. Input: uint8_t or int8_t. All workers
// call it; results are complete after the next barrier.
template <class Input, class Epilogue>
inline void conv2d_bytes(Worker& worker, const ConvShape& shape, const Input* input, int zero, const uint8_t* packed,
                         int64_t scales_at, Epilogue&& epilogue) {
    const ByteProduct product{{static_cast<int16_t>(zero)}, reinterpret_cast<const float*>(packed + scales_at)};
    conv_rows(worker, shape, product, input, packed, epilogue);
}

IRC_END
