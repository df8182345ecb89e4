// Sixteen floats, the unit that every kernel here is written in: one AVX-512 register, two AVX2 registers, or an array
// that the compiler vectorizes as it can. Loads and stores need no alignment.
#pragma once

#include "irc/isa.h"

IRC_BEGIN

#if defined(IRC_AVX512)

struct f32x16 {
    __m512 v;
};

IRC_INLINE f32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
IRC_INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
IRC_INLINE void store(float* p, f32x16 x) { _mm512_storeu_ps(p, x.v); }
IRC_INLINE f32x16 add(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
IRC_INLINE f32x16 sub(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
IRC_INLINE f32x16 mul(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
IRC_INLINE f32x16 div(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
IRC_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
IRC_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
IRC_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
IRC_INLINE f32x16 abs(f32x16 a) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)))};
}
IRC_INLINE f32x16 round(f32x16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
IRC_INLINE f32x16 power_of_two(f32x16 n) {  // 2^n for whole n from -126 to 127
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
IRC_INLINE f32x16 load(const bf16* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
IRC_INLINE f32x16 load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

#elif defined(IRC_AVX2)

struct f32x16 {
    __m256 a, b;
};

IRC_INLINE f32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
IRC_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
IRC_INLINE void store(float* p, f32x16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
IRC_INLINE f32x16 add(f32x16 x, f32x16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
IRC_INLINE f32x16 sub(f32x16 x, f32x16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
IRC_INLINE f32x16 mul(f32x16 x, f32x16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
IRC_INLINE f32x16 div(f32x16 x, f32x16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
IRC_INLINE f32x16 max(f32x16 x, f32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
IRC_INLINE f32x16 min(f32x16 x, f32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
IRC_INLINE f32x16 fma(f32x16 x, f32x16 y, f32x16 z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
IRC_INLINE f32x16 abs(f32x16 x) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
IRC_INLINE f32x16 round(f32x16 x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}
IRC_INLINE __m256 power_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
IRC_INLINE f32x16 power_of_two(f32x16 n) { return {power_of_two(n.a), power_of_two(n.b)}; }
IRC_INLINE f32x16 load(const bf16* p) {
    const __m128i* raw = reinterpret_cast<const __m128i*>(p);
    const auto widen = [](__m128i half) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    };
    return {widen(_mm_loadu_si128(raw)), widen(_mm_loadu_si128(raw + 1))};
}
IRC_INLINE f32x16 load(const f16* p) {
    const __m128i* raw = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(raw)), _mm256_cvtph_ps(_mm_loadu_si128(raw + 1))};
}

#else

struct f32x16 {
    float v[16];
};

#define IRC_EACH(expression) \
    f32x16 result; \
    for (int i = 0; i < 16; ++i) result.v[i] = (expression); \
    return result

IRC_INLINE f32x16 set1(float x) { IRC_EACH(x); }
IRC_INLINE f32x16 load(const float* p) { IRC_EACH(p[i]); }
IRC_INLINE void store(float* p, f32x16 x) { std::memcpy(p, x.v, sizeof(x.v)); }
IRC_INLINE f32x16 add(f32x16 a, f32x16 b) { IRC_EACH(a.v[i] + b.v[i]); }
IRC_INLINE f32x16 sub(f32x16 a, f32x16 b) { IRC_EACH(a.v[i] - b.v[i]); }
IRC_INLINE f32x16 mul(f32x16 a, f32x16 b) { IRC_EACH(a.v[i] * b.v[i]); }
IRC_INLINE f32x16 div(f32x16 a, f32x16 b) { IRC_EACH(a.v[i] / b.v[i]); }
IRC_INLINE f32x16 max(f32x16 a, f32x16 b) { IRC_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
IRC_INLINE f32x16 min(f32x16 a, f32x16 b) { IRC_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
IRC_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { IRC_EACH(a.v[i] * b.v[i] + c.v[i]); }
IRC_INLINE f32x16 abs(f32x16 a) { IRC_EACH(std::fabs(a.v[i])); }
IRC_INLINE f32x16 round(f32x16 a) { IRC_EACH(std::nearbyint(a.v[i])); }
IRC_INLINE f32x16 power_of_two(f32x16 n) {
    IRC_EACH(from_bits(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23));
}
IRC_INLINE f32x16 load(const bf16* p) { IRC_EACH(to_float(p[i])); }
IRC_INLINE f32x16 load(const f16* p) { IRC_EACH(to_float(p[i])); }

#undef IRC_EACH

#endif

IRC_INLINE f32x16 load(const int8_t* p) {
#if defined(IRC_AVX512)
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
#elif defined(IRC_AVX2)
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(raw, 8)))};
#else
    f32x16 result;
    for (int i = 0; i < 16; ++i) result.v[i] = static_cast<float>(p[i]);
    return result;
#endif
}
IRC_INLINE f32x16 load(const uint8_t* p) {
#if defined(IRC_AVX512)
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
#elif defined(IRC_AVX2)
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(raw)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(raw, 8)))};
#else
    f32x16 result;
    for (int i = 0; i < 16; ++i) result.v[i] = static_cast<float>(p[i]);
    return result;
#endif
}

IRC_INLINE f32x16 zero() { return set1(0.0f); }

// The first `count` (0 to 16) entries; the rest are 0.
template <class Stored>
IRC_INLINE f32x16 load_part(const Stored* p, int64_t count) {
    if (count >= 16) return load(p);
    Stored whole[16] = {};
    for (int64_t i = 0; i < count; ++i) whole[i] = p[i];
    return load(whole);
}

IRC_INLINE void store_part(float* p, f32x16 x, int64_t count) {
    if (count >= 16) {
        store(p, x);
        return;
    }
    float whole[16];
    store(whole, x);
    for (int64_t i = 0; i < count; ++i) p[i] = whole[i];
}

#if defined(IRC_AVX2)
template <class Combine>
IRC_INLINE float reduce(__m256 x, const Combine& combine) {
    const __m128 four = combine(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = combine(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(combine(two, _mm_movehdup_ps(two)));
}
#endif

IRC_INLINE float reduce_add(f32x16 x) {
#if defined(IRC_AVX2)
    return reduce(_mm256_add_ps(x.a, x.b), [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
#else
    float v[16];
    store(v, x);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) v[i] += v[i + width];
    return v[0];
#endif
}

// The largest entry, of a vector without NaN.
IRC_INLINE float reduce_max(f32x16 x) {
#if defined(IRC_AVX2)
    return reduce(_mm256_max_ps(x.a, x.b), [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
#else
    float v[16];
    store(v, x);
    float top = v[0];
    for (int i = 1; i < 16; ++i) top = v[i] > top ? v[i] : top;
    return top;
#endif
}

// y where x >= limit or x is NaN, else 0.
IRC_INLINE f32x16 keep_from(f32x16 x, float limit, f32x16 y) {
#if defined(IRC_AVX512)
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_NLT_UQ), y.v)};
#elif defined(IRC_AVX2)
    const __m256 bound = _mm256_set1_ps(limit);
    return {_mm256_and_ps(_mm256_cmp_ps(x.a, bound, _CMP_NLT_UQ), y.a),
            _mm256_and_ps(_mm256_cmp_ps(x.b, bound, _CMP_NLT_UQ), y.b)};
#else
    for (int i = 0; i < 16; ++i)
        if (x.v[i] < limit) y.v[i] = 0.0f;
    return y;
#endif
}

// e^x: x = n ln 2 + r, a polynomial of degree 6 for e^r on |r| <= ln 2 / 2, times 2^n. Relative error < 3e-7 for
// x from -87 to 88; 0 below (-infinity too), e^88 above. NaN stays NaN.
IRC_INLINE f32x16 exp(f32x16 wanted) {
    const f32x16 x = min(set1(88.0f), max(set1(-87.0f), wanted));  // the second operand survives where it is NaN
    const f32x16 n = round(mul(x, set1(1.44269504f)));
    f32x16 r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    f32x16 p = fma(r, set1(1.0f / 720), set1(1.0f / 120));
    p = fma(p, r, set1(1.0f / 24));
    p = fma(p, r, set1(1.0f / 6));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return keep_from(wanted, -87.0f, mul(p, power_of_two(n)));
}

// tanh x = 1 - 2 / (e^2x + 1): absolute error < 3e-7.
IRC_INLINE f32x16 tanh(f32x16 x) {
    return sub(set1(1.0f), div(set1(2.0f), add(exp(add(x, x)), set1(1.0f))));
}

// Sums of four vectors: of a and b to `first`, of c and d to `second`.
IRC_INLINE void reduce_add(f32x16 a, f32x16 b, f32x16 c, f32x16 d, float* first, float* second) {
#if defined(IRC_AVX2)
    const __m256 ab = _mm256_hadd_ps(_mm256_add_ps(a.a, a.b), _mm256_add_ps(b.a, b.b));
    const __m256 cd = _mm256_hadd_ps(_mm256_add_ps(c.a, c.b), _mm256_add_ps(d.a, d.b));
    const __m256 all = _mm256_hadd_ps(ab, cd);
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    _mm_storel_pi(reinterpret_cast<__m64*>(first), sums);
    _mm_storeh_pi(reinterpret_cast<__m64*>(second), sums);
#else
    first[0] = reduce_add(a);
    first[1] = reduce_add(b);
    second[0] = reduce_add(c);
    second[1] = reduce_add(d);
#endif
}

IRC_END
