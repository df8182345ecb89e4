// Convolutions and linear layers of 8-bit integers with static scales:
// out[m, o] = scale[o] sum over places of (in[m, place] - zero) w[o, place], with the rows of conv.h.
//
// Weights are signed bytes, four neighbours along the depth together: [places / 4][16][4] a panel. Two ways to multiply,
// both exact:
//
// - bytes: unsigned activations as they are (signed ones plus 128), zero points around the image, and zero times the sum
//   of a channel's weights taken off the sum. AVX-512 has vpdpbusd for it. AVX2 sums pairs in 16 bits (vpmaddubsw), which
//   holds 2 * 255 * 64: it is taken where no weight is beyond 64, as weights of seven bits are.
// - shorts: activations lose their zero point and become 16 bits while they are gathered, weights a block at a time; pairs
//   are summed in 32 bits (vpmaddwd). For all other weights on AVX2, at three quarters of the speed.
//
// Sums are exact for up to 65792 places. What the epilogue gets is the sum, rounded to f32 (exact below 2^24), times an
// f32 scale: error 2^-23 relative.
#pragma once

#include "irc/conv.h"
#include "irc/dot8.h"

IRC_BEGIN

#if defined(IRC_AVX512)
IRC_INLINE i32x16 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
IRC_INLINE void dot_bytes(i32x16& sum, bytes64 weights, int32_t four) {
    sum.v = _mm512_dpbusd_epi32(sum.v, _mm512_set1_epi32(four), weights.v);
}
#elif defined(IRC_AVX2)
IRC_INLINE i32x16 load_i32(const int32_t* p) {
    const __m256i* raw = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(raw), _mm256_loadu_si256(raw + 1)};
}
IRC_INLINE void dot_bytes(i32x16& sum, bytes64 weights, int32_t four) {
    const __m256i x = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
    sum.a = in_order(_mm256_add_epi32(sum.a, _mm256_madd_epi16(_mm256_maddubs_epi16(x, weights.a), ones)));
    sum.b = in_order(_mm256_add_epi32(sum.b, _mm256_madd_epi16(_mm256_maddubs_epi16(x, weights.b), ones)));
}
IRC_INLINE void dot_shorts(i32x16& sum, bytes64 weights, int32_t pair) {
    const __m256i x = _mm256_set1_epi32(pair);
    sum.a = in_order(_mm256_add_epi32(sum.a, _mm256_madd_epi16(weights.a, x)));
    sum.b = in_order(_mm256_add_epi32(sum.b, _mm256_madd_epi16(weights.b, x)));
}
// A line of bytes as two of shorts: neighbours 0, 1 and 2, 3 of each column.
IRC_INLINE void widen_line(const uint8_t* line, int16_t* pairs) {
    const __m256i low_half = _mm256_set1_epi32(0xffff);
    for (int half = 0; half < 2; ++half) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line) + half);
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), odd = _mm256_srai_epi16(bytes, 8);
        const __m256i first = _mm256_or_si256(_mm256_and_si256(even, low_half), _mm256_slli_epi32(odd, 16));
        const __m256i second = _mm256_or_si256(_mm256_srli_epi32(even, 16), _mm256_andnot_si256(low_half, odd));
        _mm256_store_si256(reinterpret_cast<__m256i*>(pairs) + half, first);
        _mm256_store_si256(reinterpret_cast<__m256i*>(pairs + 32) + half, second);
    }
}
#else
IRC_INLINE i32x16 load_i32(const int32_t* p) {
    i32x16 sum;
    std::memcpy(sum.v, p, 64);
    return sum;
}
IRC_INLINE void dot_bytes(i32x16& sum, bytes64 weights, int32_t four) {
    uint8_t x[4];
    std::memcpy(x, &four, 4);
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 4; ++j) sum.v[i] += static_cast<int8_t>(weights.v[4 * i + j]) * x[j];
}
#endif

// Bytes as unsigned ones: signed ones with their first bit turned.
struct ByteInputs {
    using Row = uint8_t;
    uint8_t flip, zero;

    uint8_t outside() const { return zero; }
    template <class Input>
    void copy(uint8_t* to, const Input* from, int64_t count, int64_t readable) const {
        const uint8_t turned = flip;
        if (readable >= count + 15) {
            for (int64_t k = 0; k < count; k += 16)
                for (int64_t i = 0; i < 16; ++i) to[k + i] = static_cast<uint8_t>(from[k + i]) ^ turned;
        } else {
            for (int64_t k = 0; k < count; ++k) to[k] = static_cast<uint8_t>(from[k]) ^ turned;
        }
    }
};

// H rows times one panel over `length` neighbours (a multiple of 4): totals [H][gemm_columns] += product.
struct ByteTile {
    using Row = uint8_t;
    static constexpr int64_t step = 4;  // neighbours in a line of weights
    template <int H>
    static void add(const uint8_t* x, const uint8_t* panel, int64_t length, int32_t* totals) {
        i32x16 sums[H];
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) sums[m] = load_i32(totals + m * gemm_columns);
        for (int64_t k = 0; k < length; k += 4) {
            const bytes64 weights = load_line(panel + 16 * k);
#pragma GCC unroll 16
            for (int m = 0; m < H; ++m) {
                int32_t four;
                std::memcpy(&four, x + m * conv_stride + k, 4);
                dot_bytes(sums[m], weights, four);
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) store(totals + m * gemm_columns, sums[m]);
    }
};

template <class Tile>
inline void tiles_of(int64_t count, const typename Tile::Row* rows, const uint8_t* panel, int64_t length,
                     int32_t* totals) {
    const int64_t tiles = ceil_div(count, gemm_height);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = count * tile / tiles, height = count * (tile + 1) / tiles - first;
        with_height<gemm_height>(height, [&](auto h) {
            Tile::template add<decltype(h)::value>(rows + first * conv_stride, panel, length, totals + first * gemm_columns);
        });
    }
}

// What both ways share. scales and corrections: [channels of all groups], readable for 16 more.
struct IntegerProduct {
    using Sum = int32_t;
    const float* scales;
    const int32_t* corrections;

    static int64_t depth(int64_t length) { return round_up(length, 4); }
    static int64_t panel_bytes(int64_t places) { return depth(places) * 16; }
    static int64_t group_bytes(const ConvShape& shape) {
        return ceil_div(shape.group_outputs(), 16) * panel_bytes(shape.places());
    }
};

struct ByteProduct : IntegerProduct {
    ByteInputs inputs;

    void add(const uint8_t* rows, int64_t count, const uint8_t* packed, int64_t places, int64_t n0, int64_t n1,
             int64_t place, int64_t length, int32_t* totals) const {
        for (int64_t n = n0; n < n1; n += 16)
            tiles_of<ByteTile>(count, rows, packed + n / 16 * panel_bytes(places) + place * 16, depth(length),
                               totals + n - n0);
    }
    const float* finish(const int32_t* sums, int64_t n0, int64_t n1, float* values) const {
        for (int64_t n = n0; n < n1; n += 16) {
            const i32x16 sum = irc::add(load_i32(sums + n - n0), load_i32(corrections + n));
            store(values + n - n0, mul(to_float(sum), load(scales + n)));
        }
        return values;
    }
};

#if defined(IRC_AVX2)
// Bytes without their zero point, in 16 bits.
struct ShortInputs {
    using Row = int16_t;
    int16_t zero;

    int16_t outside() const { return 0; }
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

// The same in 16 bits: panel [length / 2][16][2].
struct ShortTile {
    using Row = int16_t;
    template <int H>
    static void add(const int16_t* x, const uint8_t* panel, int64_t length, int32_t* totals) {
        i32x16 sums[H];
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) sums[m] = load_i32(totals + m * gemm_columns);
        for (int64_t k = 0; k < length; k += 2) {
            const bytes64 weights = load_line(panel + 32 * k);
#pragma GCC unroll 16
            for (int m = 0; m < H; ++m) {
                int32_t pair;
                std::memcpy(&pair, x + m * conv_stride + k, 4);
                dot_shorts(sums[m], weights, pair);
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) store(totals + m * gemm_columns, sums[m]);
    }
};

struct ShortProduct : IntegerProduct {
    ShortInputs inputs;

    void add(const int16_t* rows, int64_t count, const uint8_t* packed, int64_t places, int64_t n0, int64_t n1,
             int64_t place, int64_t length, int32_t* totals) const {
        alignas(64) int16_t panel[16 * gemm_depth];
        const int64_t whole = depth(length);
        for (int64_t n = n0; n < n1; n += 16) {
            const uint8_t* stored = packed + n / 16 * panel_bytes(places) + place * 16;
            for (int64_t k = 0; k < whole; k += 4) widen_line(stored + 16 * k, panel + 16 * k);
            tiles_of<ShortTile>(count, rows, reinterpret_cast<const uint8_t*>(panel), whole, totals + n - n0);
        }
    }
    const float* finish(const int32_t* sums, int64_t n0, int64_t n1, float* values) const {
        for (int64_t n = n0; n < n1; n += 16)
            store(values + n - n0, mul(to_float(load_i32(sums + n - n0)), load(scales + n)));
        return values;
    }
};
#endif

// packed: panels of the groups, then (at `scales_at`) f32 scales and i32 corrections, each
// [out_channels padded to 16, and 16 more].
// narrow: no weight is beyond 64. Input: uint8_t or int8_t. All workers call it; results are complete after the next
// barrier.
template <class Input, class Epilogue>
inline void conv2d_bytes(Worker& worker, const ConvShape& shape, const Input* input, int zero, const uint8_t* packed,
                         int64_t scales_at, bool narrow, Epilogue&& epilogue) {
    const IntegerProduct common{
        reinterpret_cast<const float*>(packed + scales_at),
        reinterpret_cast<const int32_t*>(packed + scales_at + (round_up(shape.out_channels, 16) + 16) * 4)};
#if defined(IRC_AVX2)
    if (!narrow) {
        conv_rows(worker, shape, ShortProduct{common, {static_cast<int16_t>(zero)}}, input, packed, epilogue);
        return;
    }
#else
    (void)narrow;
#endif
    const uint8_t flip = std::is_same_v<Input, int8_t> ? 128 : 0;
    const ByteInputs inputs{flip, static_cast<uint8_t>(static_cast<uint8_t>(zero) ^ flip)};
    conv_rows(worker, shape, ByteProduct{common, inputs}, input, packed, epilogue);
}

IRC_END
