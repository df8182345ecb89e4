// Activations [M, K] to signed bytes with one scale a row (token): scale = max |x| / 127, or 1 for a row of zeros;
// q = round half to even(x / scale). The integers are those of irc's `int8.row`. A row with NaN or infinity gets the
// scale NaN, so that it shows in the result.
//
// Rows lie the way the matrix product reads them: segments of up to 32 neighbours along k one after the other, in each
// the tiles one after the other, a tile as [length / 4][rows of the tile][4]. So a group of weights meets the activations
// of all tiles as one stream.
#pragma once

#include "irc/dot8.h"
#include "irc/pool.h"

IRC_BEGIN

// Rows cut into tiles of one height, at most `most`: fewer than one row a tile of zeros fills the last ones.
struct Tiles {
    int64_t height, count;
    Tiles(int64_t num_rows, int64_t most) : height(ceil_div(num_rows, ceil_div(num_rows, most))), count(ceil_div(num_rows, height)) {}
    int64_t rows() const { return count * height; }
};

IRC_INLINE void store_i8(int8_t* p, f32x16 x) {
#if defined(IRC_AVX512)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
#elif defined(IRC_AVX2)
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
#else
    for (int i = 0; i < 16; ++i) {
        const float v = std::nearbyint(x.v[i]);
        p[i] = static_cast<int8_t>(v >= -128.0f && v <= 127.0f ? v : v > 0 ? 127.0f : -128.0f);  // NaN: -128
    }
#endif
}

// Sums of 32 bytes at even and odd pairs of neighbours: (0, 1, 4, 5, …) and (2, 3, 6, 7, …).
struct PairSums {
    int32_t even, odd;
};

IRC_INLINE PairSums pair_sums(const int8_t* p) {
#if defined(IRC_PLAIN)
    PairSums sums{0, 0};
    for (int i = 0; i < 32; i += 4) {
        sums.even += p[i] + p[i + 1];
        sums.odd += p[i + 2] + p[i + 3];
    }
    return sums;
#else
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
    __m128i sum = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0xb1));
    const int32_t both = _mm_cvtsi128_si32(sum);
    return {static_cast<int16_t>(both), static_cast<int16_t>(both >> 16)};
#endif
}

// How sums of activations start an accumulator (see dot8.h).
enum class Seeds { none, whole, pairs };

template <Seeds kind>
IRC_INLINE int32_t make_seed(PairSums sums, int32_t factor) {
    if constexpr (kind == Seeds::pairs) {
        const uint32_t even = static_cast<uint16_t>(sums.even * factor), odd = static_cast<uint16_t>(sums.odd * factor);
        return static_cast<int32_t>(even | odd << 16);
    }
    return (sums.even + sums.odd) * factor;
}

// max |x| of a row, NaN where an entry is not finite.
template <class Input>
IRC_INLINE float largest(const Input* x, int64_t size) {
    f32x16 top = zero(), broken = zero(), top2 = zero(), broken2 = zero();
    int64_t k = 0;
    for (; k + 32 <= size; k += 32) {
        const f32x16 v = load(x + k), w = load(x + k + 16);
        top = max(top, abs(v));
        broken = fma(v, zero(), broken);
        top2 = max(top2, abs(w));
        broken2 = fma(w, zero(), broken2);
    }
    for (; k < size; k += 16) {
        const f32x16 v = load_part(x + k, size - k);
        top = max(top, abs(v));
        broken = fma(v, zero(), broken);
    }
    return reduce_max(max(top, top2)) + reduce_add(add(broken, broken2));
}

#if defined(IRC_AVX2)
template <class Input>
IRC_INLINE __m256i rounded_32(const Input* x, f32x16 divisor) {
    const f32x16 first = div(load(x), divisor), second = div(load(x + 16), divisor);
    const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(first.a), _mm256_cvtps_epi32(first.b));
    const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(second.a), _mm256_cvtps_epi32(second.b));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
}

// Of 8 vectors the sums over their 8 lanes, in 16 bits.
IRC_INLINE __m256i lane_sums(const __m256i (&v)[8]) {
    __m256i pairs[4], fours[2];
    for (int i = 0; i < 4; ++i)
        pairs[i] = _mm256_add_epi16(_mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]),
                                    _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 2; ++i)
        fours[i] = _mm256_add_epi16(_mm256_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                                    _mm256_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
    return _mm256_add_epi16(_mm256_permute2x128_si256(fours[0], fours[1], 0x20),
                            _mm256_permute2x128_si256(fours[0], fours[1], 0x31));
}
#endif

// Where one of `rows` quantized rows lies: row `index` of the tile that starts at row `first` and has `height` rows.
struct RowPlace {
    int64_t rows, first, height, index;
    int8_t* values;
    int32_t* seeds;

    // Four neighbours at k, of a segment of `length` that starts at `start`.
    int8_t* four(int64_t start, int64_t length, int64_t k) const {
        return values + start * rows + first * length + (k - start) * height + 4 * index;
    }
    int32_t& seed(int64_t segment) const { return seeds[segment * rows + first + index]; }
};

#if defined(IRC_AVX2)
// A row's segments as far as they come in eights; the number of segments done.
template <Seeds kind, class Input>
IRC_INLINE int64_t quantize_segments(const Input* x, int64_t size, f32x16 divisor, int32_t factor, const RowPlace& place) {
    const int64_t segments = size / segment_size / 8 * 8;
    for (int64_t s = 0; s < segments; s += 8) {
        __m256i sums[8];
        for (int i = 0; i < 8; ++i) {
            const int64_t start = (s + i) * segment_size;
            const __m256i bytes = rounded_32(x + start, divisor);
            int8_t* to = place.four(start, segment_size, start);
            if (place.height == 1) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
            } else {
                alignas(32) int32_t fours[8];
                _mm256_store_si256(reinterpret_cast<__m256i*>(fours), bytes);
                for (int j = 0; j < 8; ++j) std::memcpy(to + 4 * j * place.height, fours + j, 4);
            }
            if constexpr (kind != Seeds::none) sums[i] = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
        }
        if constexpr (kind == Seeds::none) continue;
        __m256i made = lane_sums(sums);
        if constexpr (kind == Seeds::pairs) {
            made = _mm256_mullo_epi16(made, _mm256_set1_epi16(static_cast<int16_t>(factor)));
        } else {
            made = _mm256_mullo_epi32(_mm256_madd_epi16(made, _mm256_set1_epi16(1)), _mm256_set1_epi32(factor));
        }
        alignas(32) int32_t eight[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(eight), made);
        for (int i = 0; i < 8; ++i) place.seed(s + i) = eight[i];
    }
    return segments;
}
#endif

// One row into its place; returns its scale. A segment's neighbours share a seed; `group` is the weights' group, which
// segments do not cross.
template <Seeds kind, class Input>
inline float quantize_row(const Input* x, int64_t size, int64_t depth, int64_t group, int32_t factor, const RowPlace& place) {
    const float top = largest(x, size);
    const float scale = top == 0.0f ? 1.0f : top / 127.0f;
    const f32x16 divisor = set1(scale);
    // Groups of whole segments need not be told apart.
    const int64_t step = group % segment_size == 0 ? segment_size : group;
    int64_t segment = 0;
#if defined(IRC_AVX2)
    if (step == segment_size) segment = quantize_segments<kind>(x, size, divisor, factor, place);
#endif
    for (int64_t start = segment * segment_size; start < depth; start += step) {
        for (int64_t k = start; k < start + step; k += segment_size) {
            const int64_t length = min_of(segment_size, start + step - k);
            alignas(32) int8_t bytes[32] = {};
            for (int64_t i = 0; i < length; i += 16) {
                const int64_t left = min_of(length - i, size - k - i);
                if (left > 0) store_i8(bytes + i, div(load_part(x + k + i, left), divisor));
            }
            for (int64_t i = 0; i < length; i += 4) std::memcpy(place.four(k, length, k + i), bytes + i, 4);
            if constexpr (kind != Seeds::none) place.seed(segment) = make_seed<kind>(pair_sums(bytes), factor);
            ++segment;
        }
    }
    return scale;
}

// A row of zeros: of a tile that has more rows than there are.
inline void fill_row(int64_t depth, int64_t group, const RowPlace& place) {
    const int64_t step = group % segment_size == 0 ? segment_size : group;
    int64_t segment = 0;
    for (int64_t start = 0; start < depth; start += step) {
        for (int64_t k = start; k < start + step; k += segment_size) {
            const int64_t length = min_of(segment_size, start + step - k);
            for (int64_t i = 0; i < length; i += 4) std::memset(place.four(k, length, k + i), 0, 4);
            place.seed(segment++) = 0;
        }
    }
}

// Where `count` quantized rows lie, those of zeros included: values [depth rows], seeds [segments][rows], scales [rows].
struct QuantizedRows {
    int64_t count;
    int8_t* values;
    int32_t* seeds;
    float* scales;

    static int64_t bytes(int64_t rows, int64_t depth, int64_t segments) {
        return round_up(rows * depth, 64) + round_up(rows * segments * 4, 64) + round_up(rows * 4, 64);
    }
    QuantizedRows(uint8_t* memory, int64_t rows, int64_t depth, int64_t segments)
        : count(rows),
          values(reinterpret_cast<int8_t*>(memory)),
          seeds(reinterpret_cast<int32_t*>(memory + round_up(rows * depth, 64))),
          scales(reinterpret_cast<float*>(memory + round_up(rows * depth, 64) + round_up(rows * segments * 4, 64))) {}
};

IRC_END
