// Linear layers over 8-bit floats (f8e4m3, f8e5m2) with a scale a group of neighbours along k, a row, or the tensor, summed
// in f32.
//
// Packed weights: panels of 16 rows, group by group: 16 scales in f32, then [group / 4][16][4] bytes, the last ones zeros.
// A row is one group.
//
// A byte's bits, moved to where f32 has sign, exponent and fraction, are the number times a power of two (`unit`). Up to
// 16 rows of x are multiplied by half of what is missing, and a panel's sums over up to 64 neighbours of a group get the rest
// with the group's scale; so activations beyond 2^64 overflow. For more rows, a panel is scaled and widened to f32 for all
// rows of a block. Error at most (depth + 4) 2^-24 sum |x w|.
//
// Activations in halves are widened first, those of a few rows in scratch (fmatmul.h). The epilogue gets up to 128 columns.
#pragma once

#include "irc/linear_rows.h"

IRC_BEGIN

// Rows of a tile that meets bytes as they lie, and the most rows that do.
constexpr int scaled_height = 4;
constexpr int64_t scaled_few = most_few;

// Where a byte's bits go: its exponent and fraction right below the sign's copies, of which one stays.
template <class Stored>
struct ByteFloat {
    static constexpr bool wide = std::is_same_v<Stored, f8e5m2>;
    static constexpr int shift = wide ? 3 : 4;
    static constexpr uint32_t mask = wide ? 0x8fe00000u : 0x87f00000u;
    // What a number becomes by that; half of its exponent, and the other half.
    static constexpr float unit = wide ? 0x1p-112f : 0x1p-120f, half = wide ? 0x1p56f : 0x1p60f;
};

#if defined(IRC_AVX512)
template <class Stored>
IRC_INLINE void raw_columns(const uint8_t* line, f32x16 (&columns)[4]) {
    using Bits = ByteFloat<Stored>;
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(Bits::mask)), bytes = _mm512_loadu_si512(line);
    const __m512i odd = _mm512_srai_epi16(bytes, Bits::shift);
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), Bits::shift);
    columns[0] = {_mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32(even, 16), mask))};
    columns[1] = {_mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32(odd, 16), mask))};
    columns[2] = {_mm512_castsi512_ps(_mm512_and_si512(even, mask))};
    columns[3] = {_mm512_castsi512_ps(_mm512_and_si512(odd, mask))};
}
#elif defined(IRC_AVX2)
template <class Stored>
IRC_INLINE void raw_columns(const uint8_t* line, f32x16 (&columns)[4]) {
    using Bits = ByteFloat<Stored>;
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(Bits::mask));
    const auto half = [&](const uint8_t* from, auto place) __attribute__((always_inline)) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m256i odd = _mm256_srai_epi16(bytes, Bits::shift);
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), Bits::shift);
        columns[0].*place = _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(even, 16), mask));
        columns[1].*place = _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(odd, 16), mask));
        columns[2].*place = _mm256_castsi256_ps(_mm256_and_si256(even, mask));
        columns[3].*place = _mm256_castsi256_ps(_mm256_and_si256(odd, mask));
    };
    half(line, &f32x16::a);
    half(line + 32, &f32x16::b);
}
#else
template <class Stored>
IRC_INLINE void raw_columns(const uint8_t* line, f32x16 (&columns)[4]) {
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 4; ++k) columns[k].v[i] = to_float(Stored{line[4 * i + k]}) * ByteFloat<Stored>::unit;
}
#endif

// How the panels of a weight lie: `size` numbers a row, in groups.
template <class Stored>
struct ScaledPanels {
    int64_t size, group;

    int64_t group_bytes() const { return 64 + 16 * round_up(group, 4); }
    // Of `count` neighbours along k.
    int64_t bytes(int64_t count) const { return count / group * group_bytes() + 16 * (count % group); }

    // `length` neighbours of a panel from k on, as f32 [length][16].
    void widen(const uint8_t* panel, int64_t k, int64_t length, float* to) const {
        const f32x16 unit = set1(1.0f / ByteFloat<Stored>::unit);
        for (const int64_t end = k + length; k < end;) {
            const uint8_t* place = panel + k / group * group_bytes();
            const f32x16 scale = load(reinterpret_cast<const float*>(place));
            const int64_t first = k % group, last = min_of(group, first + end - k);
            place += 64 + 16 * (first / 4 * 4);
            for (int64_t i = first / 4 * 4; i < last; i += 4, place += 64) {
                f32x16 columns[4];
                raw_columns<Stored>(place, columns);
                for (int64_t j = max_of(0, first - i); j < min_of(4, last - i); ++j, to += 16)
                    store(to, mul(mul(columns[j], unit), scale));
            }
            k += last - first;
        }
    }
};

// H rows against P neighbouring panels, as many streams of memory: results [H][gemm_columns].
template <int H, int P, class Stored>
inline void panels_times_rows(const ScaledPanels<Stored>& panels, const float* x, int64_t stride, const uint8_t* panel,
                              float* results) {
    constexpr int chains = H == 1 ? 2 : 1;  // enough sums at a time that none waits for the one before
    const int64_t panel_bytes = panels.bytes(panels.size), piece = min_of(few_depth, panels.group);
    const f32x16 half = set1(ByteFloat<Stored>::half);
    for (int m = 0; m < H; ++m)
        for (int p = 0; p < P; ++p) store(results + m * gemm_columns + 16 * p, zero());
    for (int64_t g = 0, done = 0; g < panels.size; g += panels.group, done += panels.group_bytes()) {
        for (int64_t k = 0; k < panels.group; k += piece) {
            const int64_t length = min_of(piece, panels.group - k), at = done + 64 + 16 * k;
            const int64_t next = stream_ahead(P, at, 2 * row_ahead, panel_bytes);
            alignas(64) float from[H][few_depth];
            for (int m = 0; m < H; ++m)
                for (int64_t i = 0; i < length; i += 16)
                    store(from[m] + i, mul(load_part(x + m * stride + g + k + i, length - i), half));
            for (int p = 0; p < P; ++p) {
                const uint8_t* place = panel + p * panel_bytes + at;
                f32x16 sums[H][chains];
#pragma GCC unroll 4
                for (int m = 0; m < H; ++m)
                    for (int c = 0; c < chains; ++c) sums[m][c] = zero();
                for (int64_t i = 0; i < length; i += 4, place += 64) {
                    f32x16 columns[4];
                    prefetch(place + next);
                    raw_columns<Stored>(place, columns);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
                        for (int m = 0; m < H; ++m)
                            sums[m][j % chains] = fma(set1(from[m][i + j]), columns[j], sums[m][j % chains]);
                }
                const f32x16 scale = load(reinterpret_cast<const float*>(panel + p * panel_bytes + done));
#pragma GCC unroll 4
                for (int m = 0; m < H; ++m) {
                    float* to = results + m * gemm_columns + 16 * p;
                    const f32x16 sum = chains == 2 ? add(sums[m][0], sums[m][chains - 1]) : sums[m][0];
                    store(to, fma(mul(sum, half), scale, load(to)));
                }
            }
        }
    }
}

// The product of many rows (linear_rows.h): one panel at a time is widened.
template <class Stored>
struct ScaledProduct : FloatProduct<float> {
    static constexpr int panels = 1;
    struct Ready {
        alignas(64) float panel[16 * gemm_depth];
    };
    ScaledPanels<Stored> weights;

    explicit ScaledProduct(const ScaledPanels<Stored>& of) : FloatProduct<float>{}, weights(of) {}
    int64_t panel_bytes(int64_t count) const { return weights.bytes(count); }
    const uint8_t* ready_at(const uint8_t* panel, int64_t k, int64_t length, Ready& ready) const {
        weights.widen(panel, k, length, ready.panel);
        return reinterpret_cast<const uint8_t*>(ready.panel);
    }
};

template <class Stored, class Epilogue>
inline void few_scaled(Worker& worker, const ScaledPanels<Stored>& panels, const float* x, int64_t stride,
                       const uint8_t* packed, int64_t num_rows, int64_t num_columns, Epilogue& epilogue) {
    constexpr int64_t width = 16 * row_panels;
    const int64_t panel_bytes = panels.bytes(panels.size), tiles = ceil_div(num_rows, scaled_height);
    for_blocks(worker, ceil_div(num_columns, gemm_piece), width / gemm_piece, [&](int64_t first, int64_t last) {
        alignas(64) float totals[scaled_few * gemm_columns];
        const int64_t n0 = first * gemm_piece, n1 = min_of(num_columns, last * gemm_piece), count = ceil_div(n1 - n0, 16);
        const uint8_t* panel = packed + n0 / 16 * panel_bytes;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t m = num_rows * tile / tiles;
            with_height<scaled_height>(num_rows * (tile + 1) / tiles - m, [&](auto h) {
                constexpr int H = decltype(h)::value;
                const float* rows = x + m * stride;
                float* to = totals + m * gemm_columns;
                if (count == row_panels) return panels_times_rows<H, row_panels>(panels, rows, stride, panel, to);
                for (int64_t p = 0; p < count; ++p)
                    panels_times_rows<H, 1>(panels, rows, stride, panel + p * panel_bytes, to + 16 * p);
            });
        }
        for (int64_t m = 0; m < num_rows; ++m)
            epilogue(m, n0, n1, static_cast<const float*>(totals + m * gemm_columns));
    });
}

// group: neighbours along k that share a scale; `size` where a row has one. All workers call it; results are complete
// after the next barrier.
template <class Stored, class Input, class Epilogue>
inline void scaled_linear(Worker& worker, const Input* x, int64_t stride, const uint8_t* packed, int64_t num_rows,
                          int64_t num_columns, int64_t size, int64_t group, uint8_t* scratch, Epilogue&& epilogue) {
    const ScaledPanels<Stored> panels{size, group};
    if (num_rows > scaled_few) {
        linear_rows_product(worker, ScaledProduct<Stored>(panels), x, stride, packed, num_rows, num_columns, size, epilogue);
    } else if constexpr (sizeof(Input) == 4) {
        (void)scratch;
        few_scaled(worker, panels, x, stride, packed, num_rows, num_columns, epilogue);
    } else {
        const float* rows = widen_rows(worker, x, stride, num_rows, size, scratch);
        few_scaled(worker, panels, rows, size, packed, num_rows, num_columns, epilogue);
    }
}

IRC_END
