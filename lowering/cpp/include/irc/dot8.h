// Dot products of 8-bit integers, 16 output rows at a time.
//
// Weights come in lines of 64 bytes: 16 rows, 4 neighbours along k a row. One line of 4-bit numbers holds 8 neighbours:
// k to k + 3 in the low nibbles, k + 4 to k + 7 in the high ones, so one load feeds two dot products. Activations are
// signed bytes; 4 of them are broadcast to all rows.
//
// AVX-512 sums in 32 bits with vpdpbusd. AVX2 has vpmaddubsw, which sums pairs in 16 bits: 4-bit weights against signed
// bytes give at most 15 * 128 * 2 a pair and 30720 over the 32 neighbours of one segment, so a segment is summed in 16
// bits without overflow (the zero point's part is the start value, see `seed`); 8-bit weights are widened each time.
#pragma once

#include "irc/f32x16.h"

IRC_BEGIN

// Neighbours along k that are summed before the sum is widened.
constexpr int64_t segment_size = 32;

#if defined(IRC_AVX512)

struct i32x16 {
    __m512i v;
};
struct bytes64 {
    __m512i v;
};

IRC_INLINE i32x16 zero_i32() { return {_mm512_setzero_si512()}; }
IRC_INLINE i32x16 set1_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
IRC_INLINE i32x16 add(i32x16 x, i32x16 y) { return {_mm512_add_epi32(x.v, y.v)}; }
IRC_INLINE i32x16 mul(i32x16 x, i32x16 y) { return {_mm512_mullo_epi32(x.v, y.v)}; }
IRC_INLINE f32x16 to_float(i32x16 x) { return {_mm512_cvtepi32_ps(x.v)}; }
IRC_INLINE i32x16 load_u8(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
IRC_INLINE void store(int32_t* p, i32x16 x) { _mm512_storeu_si512(p, x.v); }

IRC_INLINE bytes64 load_line(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
IRC_INLINE void store_line(uint8_t* p, bytes64 x) { _mm512_storeu_si512(p, x.v); }
IRC_INLINE bytes64 low_nibbles(bytes64 x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
IRC_INLINE bytes64 high_nibbles(bytes64 x) {
    return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))};
}

struct NibbleSum {
    __m512i v;
};
IRC_INLINE void dot(NibbleSum& sum, bytes64 weights, const int8_t* activations) {
    int32_t four;
    std::memcpy(&four, activations, 4);
    sum.v = _mm512_dpbusd_epi32(sum.v, weights.v, _mm512_set1_epi32(four));
}
IRC_INLINE NibbleSum start(int32_t seed) { return {_mm512_set1_epi32(seed)}; }
IRC_INLINE NibbleSum start(int32_t seed, const uint8_t* zeros) { return {mul(load_u8(zeros), set1_i32(seed)).v}; }
IRC_INLINE i32x16 finish(NibbleSum sum) { return {sum.v}; }

// Signed weights become unsigned by + 128; the activations' sum times 128 is taken off again by the seed.
struct ByteLine {
    __m512i v;
};
IRC_INLINE ByteLine load_bytes(const uint8_t* p) {
    return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))};
}
IRC_INLINE void dot(i32x16& sum, ByteLine weights, const int8_t* activations) {
    int32_t four;
    std::memcpy(&four, activations, 4);
    sum.v = _mm512_dpbusd_epi32(sum.v, weights.v, _mm512_set1_epi32(four));
}
constexpr int32_t byte_offset = 128;

#elif defined(IRC_AVX2)

// The compiler may not regroup sums: it would keep all products of an unrolled loop alive and spill them.
IRC_INLINE __m256i in_order(__m256i sum) {
    __asm__("" : "+x"(sum));
    return sum;
}

struct i32x16 {
    __m256i a, b;
};
struct bytes64 {
    __m256i a, b;
};

IRC_INLINE i32x16 zero_i32() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
IRC_INLINE i32x16 set1_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
IRC_INLINE i32x16 add(i32x16 x, i32x16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
IRC_INLINE i32x16 mul(i32x16 x, i32x16 y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
IRC_INLINE f32x16 to_float(i32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
IRC_INLINE i32x16 load_u8(const uint8_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(raw), _mm256_cvtepu8_epi32(_mm_srli_si128(raw, 8))};
}
IRC_INLINE void store(int32_t* p, i32x16 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}

IRC_INLINE bytes64 load_line(const uint8_t* p) {
    const __m256i* raw = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(raw), _mm256_loadu_si256(raw + 1)};
}
IRC_INLINE void store_line(uint8_t* p, bytes64 x) {
    __m256i* raw = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(raw, x.a);
    _mm256_storeu_si256(raw + 1, x.b);
}
IRC_INLINE bytes64 low_nibbles(bytes64 x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
IRC_INLINE bytes64 high_nibbles(bytes64 x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask)};
}

// Two 16-bit sums a row: neighbours 0, 1 and 2, 3 of each four.
struct NibbleSum {
    __m256i a, b;
};
IRC_INLINE void dot(NibbleSum& sum, bytes64 weights, const int8_t* activations) {
    int32_t four;
    std::memcpy(&four, activations, 4);
    const __m256i x = _mm256_set1_epi32(four);
    sum.a = in_order(_mm256_add_epi16(sum.a, _mm256_maddubs_epi16(weights.a, x)));
    sum.b = in_order(_mm256_add_epi16(sum.b, _mm256_maddubs_epi16(weights.b, x)));
}
IRC_INLINE NibbleSum start(int32_t seed) { return {_mm256_set1_epi32(seed), _mm256_set1_epi32(seed)}; }
IRC_INLINE NibbleSum start(int32_t seed, const uint8_t* zeros) {
    // Both 16-bit halves of a row are multiplied by the row's zero point.
    const i32x16 zero = load_u8(zeros);
    const __m256i pair = _mm256_set1_epi32(seed);
    return {_mm256_mullo_epi16(_mm256_or_si256(zero.a, _mm256_slli_epi32(zero.a, 16)), pair),
            _mm256_mullo_epi16(_mm256_or_si256(zero.b, _mm256_slli_epi32(zero.b, 16)), pair)};
}
IRC_INLINE i32x16 finish(NibbleSum sum) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(sum.a, ones), _mm256_madd_epi16(sum.b, ones)};
}

// |w| as unsigned bytes against activations that carry w's sign: pairs stay below 2 * 128 * 127, so activations must
// not be -128 (which the quantization here never gives).
struct ByteLine {
    __m256i a, b, abs_a, abs_b;
};
IRC_INLINE ByteLine load_bytes(const uint8_t* p) {
    const bytes64 raw = load_line(p);
    return {raw.a, raw.b, _mm256_abs_epi8(raw.a), _mm256_abs_epi8(raw.b)};
}
IRC_INLINE void dot(i32x16& sum, ByteLine weights, const int8_t* activations) {
    int32_t four;
    std::memcpy(&four, activations, 4);
    const __m256i x = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
    const __m256i a = _mm256_maddubs_epi16(weights.abs_a, _mm256_sign_epi8(x, weights.a));
    const __m256i b = _mm256_maddubs_epi16(weights.abs_b, _mm256_sign_epi8(x, weights.b));
    sum.a = in_order(_mm256_add_epi32(sum.a, _mm256_madd_epi16(a, ones)));
    sum.b = in_order(_mm256_add_epi32(sum.b, _mm256_madd_epi16(b, ones)));
}
constexpr int32_t byte_offset = 0;

#else

struct i32x16 {
    int32_t v[16];
};
struct bytes64 {
    uint8_t v[64];
};

#define IRC_EACH(expression) \
    i32x16 result; \
    for (int i = 0; i < 16; ++i) result.v[i] = (expression); \
    return result

IRC_INLINE i32x16 zero_i32() { IRC_EACH(0); }
IRC_INLINE i32x16 set1_i32(int32_t x) { IRC_EACH(x); }
IRC_INLINE i32x16 add(i32x16 x, i32x16 y) { IRC_EACH(x.v[i] + y.v[i]); }
IRC_INLINE i32x16 mul(i32x16 x, i32x16 y) { IRC_EACH(x.v[i] * y.v[i]); }
IRC_INLINE i32x16 load_u8(const uint8_t* p) { IRC_EACH(p[i]); }
IRC_INLINE void store(int32_t* p, i32x16 x) { std::memcpy(p, x.v, sizeof(x.v)); }
IRC_INLINE f32x16 to_float(i32x16 x) {
    f32x16 result;
    for (int i = 0; i < 16; ++i) result.v[i] = static_cast<float>(x.v[i]);
    return result;
}

IRC_INLINE bytes64 load_line(const uint8_t* p) {
    bytes64 line;
    std::memcpy(line.v, p, 64);
    return line;
}
IRC_INLINE void store_line(uint8_t* p, bytes64 x) { std::memcpy(p, x.v, 64); }
IRC_INLINE bytes64 low_nibbles(bytes64 x) {
    for (int i = 0; i < 64; ++i) x.v[i] &= 15;
    return x;
}
IRC_INLINE bytes64 high_nibbles(bytes64 x) {
    for (int i = 0; i < 64; ++i) x.v[i] >>= 4;
    return x;
}

struct NibbleSum {
    i32x16 sum;
};
IRC_INLINE void dot(NibbleSum& sum, bytes64 weights, const int8_t* activations) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 4; ++j) sum.sum.v[i] += weights.v[4 * i + j] * activations[j];
}
IRC_INLINE NibbleSum start(int32_t seed) { return {set1_i32(seed)}; }
IRC_INLINE NibbleSum start(int32_t seed, const uint8_t* zeros) { return {mul(load_u8(zeros), set1_i32(seed))}; }
IRC_INLINE i32x16 finish(NibbleSum sum) { return sum.sum; }

struct ByteLine {
    int8_t v[64];
};
IRC_INLINE ByteLine load_bytes(const uint8_t* p) {
    ByteLine line;
    std::memcpy(line.v, p, 64);
    return line;
}
IRC_INLINE void dot(i32x16& sum, ByteLine weights, const int8_t* activations) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 4; ++j) sum.v[i] += weights.v[4 * i + j] * activations[j];
}
constexpr int32_t byte_offset = 0;

#undef IRC_EACH

#endif

IRC_END
