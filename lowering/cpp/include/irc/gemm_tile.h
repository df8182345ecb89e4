// Tiles of a product in f32: a few rows times panels of 16 columns of weights stored as floats, sums in registers.
#pragma once

#include <type_traits>

#include "irc/f32x16.h"
#include "irc/heights.h"
#include "irc/pool.h"

IRC_BEGIN

#if defined(IRC_AVX512)
constexpr int gemm_height = 14, gemm_panels = 2;
#elif defined(IRC_AVX2)
constexpr int gemm_height = 6, gemm_panels = 1;
#else
constexpr int gemm_height = 4, gemm_panels = 1;
#endif

// Neighbours along k whose weights (16 columns) stay in the first-level cache while all rows of a block pass.
constexpr int64_t gemm_depth = 256;
constexpr int64_t gemm_rows = 96, gemm_columns = 128, gemm_piece = 32;

// How one panel is read: `step` neighbours at a time, each as 16 floats.
template <class Stored>
struct FloatPanel {
    static constexpr int64_t step = 1;
    static int64_t depth(int64_t size) { return size; }
    static int64_t bytes(int64_t size) { return size * 16 * static_cast<int64_t>(sizeof(Stored)); }
    static const uint8_t* at(const uint8_t* panel, int64_t k) { return panel + k * 16 * static_cast<int64_t>(sizeof(Stored)); }
    template <int which>
    static f32x16 columns(const uint8_t* p) {
        return load(reinterpret_cast<const Stored*>(p));
    }
};

template <>
struct FloatPanel<bf16> {
    static constexpr int64_t step = 2;
    static int64_t depth(int64_t size) { return round_up(size, 2); }
    static int64_t bytes(int64_t size) { return depth(size) * 32; }
    static const uint8_t* at(const uint8_t* panel, int64_t k) { return panel + k * 32; }
    template <int which>
    static f32x16 columns(const uint8_t* p) {
#if defined(IRC_AVX512)
        const __m512i raw = _mm512_loadu_si512(p);
        return {_mm512_castsi512_ps(which ? _mm512_and_si512(raw, _mm512_set1_epi32(-65536)) : _mm512_slli_epi32(raw, 16))};
#elif defined(IRC_AVX2)
        const auto half = [](const uint8_t* at) {
            const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
            return _mm256_castsi256_ps(which ? _mm256_and_si256(raw, _mm256_set1_epi32(-65536)) : _mm256_slli_epi32(raw, 16));
        };
        return {half(p), half(p + 32)};
#else
        f32x16 result;
        for (int i = 0; i < 16; ++i) {
            bf16 one;
            std::memcpy(&one, p + 4 * i + 2 * which, 2);
            result.v[i] = to_float(one);
        }
        return result;
#endif
    }
};

// What a tile asks for ahead of its turn: nothing, where the weights are in a cache already.
struct NoFetch {
    IRC_INLINE void operator()(const uint8_t*) const {}
};

// The place `ahead` bytes further on, at each step.
struct FetchAhead {
    int64_t ahead;
    IRC_INLINE void operator()(const uint8_t* place) const { prefetch(place + ahead); }
};

// Sums of H rows and P panels in registers: what is in memory ([H][gemm_columns]), changed by add(sums).
template <int H, int P, class Add>
IRC_INLINE void in_registers(float* totals, const Add& add) {
    f32x16 sums[H][P];
#pragma GCC unroll 16
    for (int m = 0; m < H; ++m)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) sums[m][p] = load(totals + m * gemm_columns + 16 * p);
    add(sums);
#pragma GCC unroll 16
    for (int m = 0; m < H; ++m)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) store(totals + m * gemm_columns + 16 * p, sums[m][p]);
}

// H rows x times P panels over `length` neighbours: totals [H][gemm_columns] += product.
template <class Panel, int H, int P, class Fetch>
inline void gemm_tile(const float* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes, int64_t length,
                      float* totals, const Fetch& fetch) {
    in_registers<H, P>(totals, [&](f32x16(&sums)[H][P]) __attribute__((always_inline)) {
        const auto step = [&](int64_t k, auto which) {
            f32x16 columns[P];
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) {
                const uint8_t* place = Panel::at(panel + p * panel_bytes, k - which.value);
                if constexpr (which.value == 0) fetch(place);
                columns[p] = Panel::template columns<which.value>(place);
            }
#pragma GCC unroll 16
            for (int m = 0; m < H; ++m) {
                const f32x16 row = set1(x[m * stride + k]);
#pragma GCC unroll 2
                for (int p = 0; p < P; ++p) sums[m][p] = fma(row, columns[p], sums[m][p]);
            }
        };
        constexpr std::integral_constant<int, 0> even{};
        constexpr std::integral_constant<int, 1> odd{};
        if constexpr (Panel::step == 1) {
#pragma GCC unroll 4
            for (int64_t k = 0; k < length; ++k) step(k, even);
        } else {
            const int64_t whole = length / 2 * 2;
            for (int64_t k = 0; k < whole; k += 2) {
                step(k, even);
                step(k + 1, odd);
            }
            if (whole < length) step(whole, even);  // the last column of an odd depth
        }
    });
}

#if defined(IRC_AVX512)
// The same with bf16 activations: vdpbf16ps multiplies pairs.
template <class Panel, int H, int P, class Fetch>
inline void gemm_tile(const bf16* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes, int64_t length,
                      float* totals, const Fetch& fetch) {
    in_registers<H, P>(totals, [&](f32x16(&sums)[H][P]) __attribute__((always_inline)) {
        for (int64_t k = 0; k < length; k += 2) {
            __m512i columns[P];
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) {
                const uint8_t* place = Panel::at(panel + p * panel_bytes, k);
                fetch(place);
                columns[p] = _mm512_loadu_si512(place);
            }
#pragma GCC unroll 16
            for (int m = 0; m < H; ++m) {
                int32_t pair = 0;
                std::memcpy(&pair, x + m * stride + k, k + 1 < length ? 4 : 2);
                const __m512i row = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
                for (int p = 0; p < P; ++p)
                    sums[m][p].v = _mm512_dpbf16_ps(sums[m][p].v, reinterpret_cast<__m512bh&>(columns[p]),
                                                    reinterpret_cast<const __m512bh&>(row));
            }
        }
    });
}
#endif

template <class Panel, int P, int Most = gemm_height, class Input, class Fetch = NoFetch>
inline void gemm_tile(int64_t height, const Input* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes,
                      int64_t length, float* totals, const Fetch& fetch = {}) {
    with_height<Most>(height, [&](auto h) {
        gemm_tile<Panel, decltype(h)::value, P>(x, stride, panel, panel_bytes, length, totals, fetch);
    });
}

IRC_END
