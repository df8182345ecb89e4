// Convolutions and linear layers of 8-bit integers with static scales:
// out[m, o] = scale[o] sum over places of (in[m, place] - zero) w[o, place], the product of conv_rows.h.
//
// Weights are signed bytes, four neighbours along the depth together: [places / 4][16][4] a panel. Two ways to multiply,
// both exact:
//
// - bytes: unsigned activations as they are (signed ones plus 128), zero points around the image, and zero times the sum
//   of a channel's weights taken off the sum. AVX-512 has vpdpbusd for it. AVX2 sums pairs in 16 bits (vpmaddubsw), which
//   holds 2 * 255 * 64: it is taken where no weight is beyond 64, as weights of seven bits are. Two such sums are added
//   before they are widened (three of four instructions that multiply are left) where the four weights of each lane
//   allow it: positive ones sum up to at most 128 and negative ones to at least -128. They nearly always do; the places
//   where they do not are marked when weights are packed.
// - shorts: activations lose their zero point and become 16 bits while they are gathered, weights a block at a time; pairs
//   are summed in 32 bits (vpmaddwd). For all other weights on AVX2, at three quarters of the speed.
//
// Sums are exact for up to 65792 places. What the epilogue gets is the sum, rounded to f32 (exact below 2^24), times an
// f32 scale: error 2^-23 relative.
#pragma once

#include "irc/conv_rows.h"
#include "irc/dot8.h"

IRC_BEGIN

#if defined(IRC_AVX512)
IRC_INLINE i32x16 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
IRC_INLINE void dot_bytes(i32x16& sum, const uint8_t* weights, const uint8_t* four) {
    int32_t x;
    std::memcpy(&x, four, 4);
    sum.v = _mm512_dpbusd_epi32(sum.v, _mm512_set1_epi32(x), _mm512_loadu_si512(weights));
}
#elif defined(IRC_AVX2)
IRC_INLINE i32x16 load_i32(const int32_t* p) {
    const __m256i* raw = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(raw), _mm256_loadu_si256(raw + 1)};
}
// Written as instructions: from intrinsics compilers load the weights into registers, which twelve sums leave none for.
IRC_INLINE __m256i dot_bytes(__m256i sum, const uint8_t* weights, __m256i x) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i products;
    __asm__("vpmaddubsw %3, %2, %0\n\tvpmaddwd %4, %0, %0\n\tvpaddd %0, %1, %1"
            : "=&x"(products), "+x"(sum)
            : "x"(x), "m"(*reinterpret_cast<const __m256i_u*>(weights)), "x"(ones));
    return sum;
}
// Eight neighbours, four of them at `near` and four at `far`, whose products are summed in 16 bits.
IRC_INLINE __m256i dot_bytes(__m256i sum, const uint8_t* near, const uint8_t* far, __m256i x_near, __m256i x_far) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i products, others;
    __asm__("vpmaddubsw %3, %5, %0\n\tvpmaddubsw %4, %6, %1\n\tvpaddw %1, %0, %0\n\tvpmaddwd %7, %0, %0\n\t"
            "vpaddd %0, %2, %2"
            : "=&x"(products), "=&x"(others), "+x"(sum)
            : "m"(*reinterpret_cast<const __m256i_u*>(near)), "m"(*reinterpret_cast<const __m256i_u*>(far)),
              "x"(x_near), "x"(x_far), "x"(ones));
    return sum;
}
IRC_INLINE __m256i dot_shorts(__m256i sum, const uint8_t* weights, __m256i x) {
    __m256i products;
    __asm__("vpmaddwd %3, %2, %0\n\tvpaddd %0, %1, %1"
            : "=&x"(products), "+x"(sum)
            : "x"(x), "m"(*reinterpret_cast<const __m256i_u*>(weights)));
    return sum;
}
IRC_INLINE __m256i four_bytes(const uint8_t* from) {
    int32_t bytes;
    std::memcpy(&bytes, from, 4);
    return _mm256_set1_epi32(bytes);
}
IRC_INLINE void dot_bytes(i32x16& sum, const uint8_t* weights, const uint8_t* four) {
    const __m256i x = four_bytes(four);
    sum = {dot_bytes(sum.a, weights, x), dot_bytes(sum.b, weights + 32, x)};
}
IRC_INLINE void dot_shorts(i32x16& sum, const uint8_t* weights, const int16_t* two) {
    int32_t pair;
    std::memcpy(&pair, two, 4);
    const __m256i x = _mm256_set1_epi32(pair);
    sum = {dot_shorts(sum.a, weights, x), dot_shorts(sum.b, weights + 32, x)};
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
IRC_INLINE void dot_bytes(i32x16& sum, const uint8_t* weights, const uint8_t* four) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 4; ++j) sum.v[i] += static_cast<int8_t>(weights[4 * i + j]) * four[j];
}
#endif

// What both ways share. scales and corrections: [channels of all groups], readable for 16 more.
struct IntegerProduct {
    using Sum = int32_t;
    using Sums = i32x16;
    static constexpr int64_t block = 3 * gemm_depth;
    const float* scales;
    const int32_t* corrections;

    static int64_t panel_bytes(int64_t places) { return round_up(places, 8) * 16; }
    static i32x16 load_sums(const int32_t* from) { return load_i32(from); }
};

// Bytes as unsigned ones: signed ones with their first bit turned.
struct ByteInputs {
    uint8_t flip, zero;

    uint8_t outside() const { return zero; }
    bool in_place() const { return flip == 0; }
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

struct ByteProduct : IntegerProduct {
    using Row = uint8_t;
    struct Ready {};
#if defined(IRC_AVX2)
    // Two rows by 32 columns read less than 6 by 16, of which no registers were left for.
    static constexpr int height = 2, panels = 2;
    static constexpr int64_t step = 8;
#else
    static constexpr int height = gemm_height, panels = gemm_panels;
    static constexpr int64_t step = reads_in_place ? 8 : 4;
#endif
    static constexpr int64_t step_bytes = 16 * step;
    ByteInputs inputs;
    const uint8_t *packed, *heavy;

    static const uint8_t* ready(const uint8_t* panel, int64_t, Ready&) { return panel; }
    i32x16 start(int64_t n) const { return load_i32(corrections + n); }
    template <int H, int P, class Tile>
    IRC_INLINE void multiply(const Tile& tile, int64_t length, const uint8_t* panel, int64_t panel_bytes,
                             i32x16 (&sums)[H][P]) const {
#if defined(IRC_AVX2)
        const uint8_t* heavy_step = heavy + static_cast<uint64_t>(panel - packed) / step_bytes;
        for (int64_t k = 0; k < length; k += step, panel += step_bytes, ++heavy_step) {
            if (__builtin_expect(*heavy_step == 0, 1))
                multiply_step(tile, k, panel, panel_bytes, sums);
            else
                multiply_lines(tile, k, panel, panel_bytes, sums);
        }
#else
#pragma GCC unroll 4
        for (int64_t k = 0; k < length; k += step, panel += step_bytes)
            multiply_lines(tile, k, panel, panel_bytes, sums);
#endif
    }
#if defined(IRC_AVX2)
    template <int H, int P, class Tile>
    static IRC_INLINE void multiply_step(const Tile& tile, int64_t k, const uint8_t* panel, int64_t panel_bytes,
                                         i32x16 (&sums)[H][P]) {
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) {
            const __m256i near = four_bytes(tile.at(m, k)), far = four_bytes(tile.at(m, k + 4));
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) {
                const uint8_t* at = panel + p * panel_bytes;
                sums[m][p].a = dot_bytes(sums[m][p].a, at, at + 64, near, far);
                sums[m][p].b = dot_bytes(sums[m][p].b, at + 32, at + 96, near, far);
            }
        }
    }
#endif
    template <int H, int P, class Tile>
    static IRC_INLINE void multiply_lines(const Tile& tile, int64_t k, const uint8_t* panel, int64_t panel_bytes,
                                          i32x16 (&sums)[H][P]) {
#pragma GCC unroll 2
        for (int64_t line = 0; line < step / 4; ++line)
#pragma GCC unroll 16
            for (int m = 0; m < H; ++m)
#pragma GCC unroll 2
                for (int p = 0; p < P; ++p)
                    dot_bytes(sums[m][p], panel + p * panel_bytes + 64 * line, tile.at(m, k + 4 * line));
    }
    const float* finish(const int32_t* sums, int64_t n0, int64_t n1, float* values) const {
        for (int64_t n = n0; n < n1; n += 16)
            store(values + n - n0, mul(to_float(load_i32(sums + n - n0)), load(scales + n)));
        return values;
    }
};

#if defined(IRC_AVX2)
// Bytes without their zero point, in 16 bits.
struct ShortInputs {
    int16_t zero;

    int16_t outside() const { return 0; }
    bool in_place() const { return false; }
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

struct ShortProduct : IntegerProduct {
    using Row = int16_t;
    struct Ready {
        alignas(64) int16_t panel[16 * block];
    };
    static constexpr int height = gemm_height, panels = gemm_panels;
    static constexpr int64_t step = 4, step_bytes = 128;
    ShortInputs inputs;

    static i32x16 start(int64_t) { return zero_i32(); }
    static const uint8_t* ready(const uint8_t* panel, int64_t length, Ready& ready) {
        for (int64_t k = 0; k < length; k += 4) widen_line(panel + 16 * k, ready.panel + 16 * k);
        return reinterpret_cast<const uint8_t*>(ready.panel);
    }
    template <int H, int P, class Tile>
    static IRC_INLINE void multiply(const Tile& tile, int64_t length, const uint8_t* panel, int64_t,
                                    i32x16 (&sums)[H][P]) {
        static_assert(P == 1, "one panel is widened at a time");
#pragma GCC unroll 8
        for (int64_t k = 0; k < length; k += 2, panel += 64)
#pragma GCC unroll 16
            for (int m = 0; m < H; ++m) dot_shorts(sums[m][0], panel, tile.at(m, k));
    }
    const float* finish(const int32_t* sums, int64_t n0, int64_t n1, float* values) const {
        for (int64_t n = n0; n < n1; n += 16)
            store(values + n - n0, mul(to_float(load_i32(sums + n - n0)), load(scales + n)));
        return values;
    }
};
#endif

// packed: panels of the groups, then (at `scales_at`) f32 scales and i32 corrections, each
// [out_channels padded to 16, and 16 more], then for each 128 bytes of a panel (8 places; of the two panels that are
// multiplied together) whether lanes of 16 bits hold less than the products of all of them.
// narrow: no weight is beyond 64. Input: uint8_t or int8_t. All workers call it; results are complete after the next
// barrier.
template <class Input, class Epilogue>
inline void conv2d_bytes(Worker& worker, const ConvShape& shape, const Input* input, int zero, const uint8_t* packed,
                         int64_t scales_at, bool narrow, Epilogue&& epilogue) {
    const uint8_t* const behind = packed + scales_at;
    const int64_t size = (round_up(shape.out_channels, 16) + 16) * 4;
    const IntegerProduct common{reinterpret_cast<const float*>(behind), reinterpret_cast<const int32_t*>(behind + size)};
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
    conv_rows(worker, shape, ByteProduct{common, inputs, packed, behind + 2 * size}, input, packed, epilogue);
}

IRC_END
