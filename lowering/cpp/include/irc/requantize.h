// The epilogue of a layer of 8-bit integers whose result is 8-bit integers, too, on sums that are still in registers:
//
//     out[m, n] = clamp(round(x) + zero),   x = relu(sum factor[n] + offset[n] + added[m, n] added_factor)
//
// Factors hold all scales: those of input, weights and result; offsets the bias in steps of the result and what a zero
// point of `added` takes away. So one multiplication a number is left of a scale, a bias, a residual sum and a division.
//
// Error against the same in exact arithmetic, before rounding to integers: at most 2^-22 (|sum factor| + |offset| +
// |added added_factor|). So where x is not that close to the middle between two integers, the result is exact; else it may
// be the other of the two.
#pragma once

#include "irc/dot8.h"

IRC_BEGIN

// x rounded to whole numbers, ties to even, plus `zero`, which fit a byte.
template <class Out>
IRC_INLINE void store_bytes(Out* to, f32x16 x, int zero) {
#if defined(IRC_AVX512)
    const __m512i wide = _mm512_add_epi32(_mm512_cvtps_epi32(x.v), _mm512_set1_epi32(zero));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(wide));
#elif defined(IRC_AVX2)
    const __m256i halves = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));  // 0-3, 8-11, 4-7, 12-15
    const __m256i moved = _mm256_add_epi16(halves, _mm256_set1_epi16(static_cast<int16_t>(zero)));
    const __m128i low = _mm256_castsi256_si128(moved), high = _mm256_extracti128_si256(moved, 1);
    const __m128i bytes = std::is_same_v<Out, uint8_t> ? _mm_packus_epi16(low, high) : _mm_packs_epi16(low, high);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi32(bytes, 0xd8));
#else
    for (int i = 0; i < 16; ++i) to[i] = static_cast<Out>(static_cast<int>(std::nearbyint(x.v[i])) + zero);
#endif
}

// The same of 32.
template <class Out>
IRC_INLINE void store_bytes(Out* to, f32x16 first, f32x16 second, int zero) {
#if defined(IRC_AVX2)
    const __m256i moved = _mm256_set1_epi16(static_cast<int16_t>(zero));
    const auto shorts = [&](f32x16 x) __attribute__((always_inline)) {
        return _mm256_add_epi16(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), moved);
    };
    const __m256i low = shorts(first), high = shorts(second);  // 0-3, 8-11, 4-7, 12-15 each
    const __m256i bytes = std::is_same_v<Out, uint8_t> ? _mm256_packus_epi16(low, high) : _mm256_packs_epi16(low, high);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes, order));
#else
    store_bytes(to, first, zero);
    store_bytes(to + 16, second, zero);
#endif
}

// The first `count` of 16, fewer than all.
template <class Out>
IRC_INLINE void store_bytes_part(Out* to, f32x16 x, int zero, int64_t count) {
    uint64_t all[2];
    store_bytes(reinterpret_cast<Out*>(all), x, zero);
    uint64_t rest = all[0];
    if (count & 8) {
        std::memcpy(to, all, 8);
        to += 8;
        rest = all[1];
    }
    if (count & 4) {
        std::memcpy(to, &rest, 4);
        to += 4;
        rest >>= 32;
    }
    if (count & 2) {
        std::memcpy(to, &rest, 2);
        to += 2;
        rest >>= 16;
    }
    if (count & 1) std::memcpy(to, &rest, 1);
}

// What is added, of the first `count` of 16.
IRC_INLINE uint64_t few_bytes(const void* from, int64_t count) {
    const uint8_t* at = static_cast<const uint8_t*>(from);
    uint64_t bytes = 0;
    int64_t have = 0;
    for (int64_t size = 4; size > 0; size /= 2) {
        if (!(count & size)) continue;
        uint32_t part = 0;
        std::memcpy(&part, at + have, static_cast<size_t>(size));
        bytes |= static_cast<uint64_t>(part) << (8 * have);
        have += size;
    }
    return bytes;
}
template <class Added>
IRC_INLINE f32x16 load_added_part(const Added* from, int64_t count) {
    if constexpr (sizeof(Added) > 1) {
        return load_part(from, count);
    } else {
        uint64_t all[2] = {0, 0};
        if (count & 8) std::memcpy(all, from, 8);
        all[count >> 3 & 1] = few_bytes(from + (count & 8), count);
        return load(reinterpret_cast<const Added*>(all));
    }
}

// What nothing is added for.
struct Nothing {};

// Out: uint8_t or int8_t. Added: Nothing, float, uint8_t or int8_t. Rows of `out` and `added` are `channels` apart;
// factors and offsets are readable for 16 more.
template <class Out, class Added>
struct Requantize {
    static constexpr bool takes_sums = true;
    static constexpr int64_t rows_ahead = 6;  // that are fetched
    Out* out;
    const Added* added;
    const float *factors, *offsets;
    float added_factor, least, most;  // bounds of whole numbers, before `zero` is added; at least 0 behind a ReLU
    int64_t channels;
    int zero;

    // Channels n to n + 16 P of pixel m.
    template <int P>
    IRC_INLINE void take(int64_t m, int64_t n, const i32x16 (&sums)[P]) const {
        const int64_t at = m * channels + n;
        __builtin_prefetch(out + at + rows_ahead * channels, 1);
        if constexpr (!std::is_same_v<Added, Nothing>) __builtin_prefetch(added + at + rows_ahead * channels);
        f32x16 x[P];
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
            x[p] = scaled(n + 16 * p, sums[p]);
            if constexpr (!std::is_same_v<Added, Nothing>)
                x[p] = fma(load(added + at + 16 * p), set1(added_factor), x[p]);
            x[p] = bounded(x[p]);
        }
        if constexpr (P == 2)
            store_bytes(out + at, x[0], x[1], zero);
        else
            store_bytes(out + at, x[0], zero);
    }
    // The last `count` channels, at most 16, from n on.
    IRC_INLINE void take_last(int64_t m, int64_t n, int64_t count, i32x16 sums) const {
        if (count == 16) {
            take(m, n, {sums});
            return;
        }
        const int64_t at = m * channels + n;
        f32x16 x = scaled(n, sums);
        if constexpr (!std::is_same_v<Added, Nothing>) x = fma(load_added_part(added + at, count), set1(added_factor), x);
        store_bytes_part(out + at, bounded(x), zero, count);
    }

private:
    IRC_INLINE f32x16 scaled(int64_t n, i32x16 sums) const {
        return fma(to_float(sums), load(factors + n), load(offsets + n));
    }
    IRC_INLINE f32x16 bounded(f32x16 x) const { return min(max(x, set1(least)), set1(most)); }
};

IRC_END
