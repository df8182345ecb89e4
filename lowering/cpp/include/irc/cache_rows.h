// Rows of keys and values as attention reads them: contiguous or in pages, in f32, 16-bit floats, or bytes with a scale.
#pragma once

#include "irc/f32x16.h"

IRC_BEGIN

constexpr int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

// A row of `width` numbers as f32, padded with zeros to whole vectors.
template <int64_t width, class Stored>
IRC_INLINE void copy_row(float* to, const Stored* from, float scale) {
    for (int64_t d = 0; d < width; d += 16) {
        const f32x16 part = width - d >= 16 ? load(from + d) : load_part(from + d, width - d);
        store(to + d, scale == 1.0f ? part : mul(part, set1(scale)));
    }
}

// Two 4-bit numbers from -8 to 7, stored with 8 added, the one of the even index in the low half.
struct nibbles {
    uint8_t pair;
};

template <int64_t width>
IRC_INLINE void copy_row(float* to, const nibbles* from, float scale) {
    static_assert(width % 2 == 0, "4-bit numbers are stored in pairs");
    for (int64_t d = 0; d < padded(width); d += 16) {
        uint8_t pairs[8] = {0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88};
        std::memcpy(pairs, from + d / 2, min_of(width - d, 16) / 2);
        alignas(16) int8_t numbers[16];
#if defined(IRC_PLAIN)
        for (int i = 0; i < 8; ++i) {
            numbers[2 * i] = static_cast<int8_t>((pairs[i] & 15) - 8);
            numbers[2 * i + 1] = static_cast<int8_t>((pairs[i] >> 4) - 8);
        }
#else
        const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pairs)), mask = _mm_set1_epi8(15);
        const __m128i found = _mm_unpacklo_epi8(_mm_and_si128(both, mask), _mm_and_si128(_mm_srli_epi16(both, 4), mask));
        _mm_store_si128(reinterpret_cast<__m128i*>(numbers), _mm_sub_epi8(found, _mm_set1_epi8(8)));
#endif
        store(to + d, mul(load(numbers), set1(scale)));
    }
}

// The scale of each row of a quantized cache, with strides of its own; none: base is nullptr.
struct RowScales {
    const float* base = nullptr;
    int64_t stride_batch = 0, stride_head = 0, stride_row = 0;
};

// Rows [batch, key-value head, t] of keys or values. With a block table (paged), t lies in page t / page_size of its
// sequence: block table[sequence][t / page_size], and stride_batch is from block to block.
template <class Stored>
struct CacheRows {
    const Stored* base;
    int64_t stride_batch, stride_head, stride_row;
    const int64_t* table = nullptr;
    int64_t table_stride = 0, page_size = 1;
    RowScales scales = {};

    // The row in memory may be read as it is.
    template <int64_t width>
    static constexpr bool whole = sizeof(Stored) == 4 && width % 16 == 0;

    const Stored* row(int64_t sequence, int64_t head, int64_t t) const {
        find(sequence, t);
        return base + sequence * stride_batch + head * stride_head + t * stride_row;
    }

    // A row as f32, padded with zeros to whole vectors.
    template <int64_t width>
    IRC_INLINE void copy(float* to, int64_t sequence, int64_t head, int64_t t) const {
        find(sequence, t);
        const float* scale = scales.base;
        if (scale != nullptr) scale += sequence * scales.stride_batch + head * scales.stride_head + t * scales.stride_row;
        copy_row<width>(to, base + sequence * stride_batch + head * stride_head + t * stride_row,
                        scale == nullptr ? 1.0f : *scale);
    }

   private:
    // From a sequence and a place in it to where they lie: a block and a place in it, if there are pages.
    IRC_INLINE void find(int64_t& sequence, int64_t& t) const {
        if (table == nullptr) return;
        sequence = table[sequence * table_stride + t / page_size];
        t %= page_size;
    }
};

// Calls visit(t, row) for the rows [start, start + count): t counts from 0. Pages are looked up once each.
template <class Stored, class Visit>
IRC_INLINE void each_row(const CacheRows<Stored>& cache, int64_t sequence, int64_t head, int64_t start, int64_t count,
                         const Visit& visit) {
    for (int64_t t = 0; t < count;) {
        const Stored* row = cache.row(sequence, head, start + t);
        int64_t end = count;
        if (cache.table != nullptr) end = min_of(count, t + cache.page_size - (start + t) % cache.page_size);
        for (; t < end; ++t, row += cache.stride_row) visit(t, row);
    }
}

// Where rows [start, start + count) lie.
template <class Stored>
inline void find_rows(const CacheRows<Stored>& cache, int64_t sequence, int64_t head, int64_t start, int64_t count,
                      const Stored** rows) {
    each_row(cache, sequence, head, start, count, [&](int64_t t, const Stored* row) { rows[t] = row; });
}

// Rows [start, start + count) as f32, padded with zeros to whole vectors, to `buffer` [count][padded(width)].
template <int64_t width, class Stored>
inline void copy_rows(const CacheRows<Stored>& cache, int64_t sequence, int64_t head, int64_t start, int64_t count,
                      float* buffer) {
    if (cache.scales.base == nullptr) {
        each_row(cache, sequence, head, start, count,
                 [&](int64_t t, const Stored* row) { copy_row<width>(buffer + t * padded(width), row, 1.0f); });
        return;
    }
    for (int64_t t = 0; t < count; ++t) cache.template copy<width>(buffer + t * padded(width), sequence, head, start + t);
}

// Where rows [start, start + count) lie as f32 with whole vectors: in memory, or in `buffer` [count][padded(width)].
template <int64_t width, class Stored>
inline void gather_rows(const CacheRows<Stored>& cache, int64_t sequence, int64_t head, int64_t start, int64_t count,
                        float* buffer, const float** rows) {
    if constexpr (CacheRows<Stored>::template whole<width>) {
        find_rows(cache, sequence, head, start, count, rows);
    } else {
        copy_rows<width>(cache, sequence, head, start, count, buffer);
        for (int64_t t = 0; t < count; ++t) rows[t] = buffer + t * padded(width);
    }
}

IRC_END
