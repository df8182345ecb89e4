// The product of many rows with weights stored as floats, summed in f32, in the order of Goto and van de Geijn (2008): for a
// block of rows and columns, 256 neighbours along k at a time, rows are packed for the second-level cache, and one panel of
// weights after the other stays in the first while all tiles of rows pass.
//
// Packed rows: tile by tile, [length][height of the tile], so that a tile reads one stream. Sums: [columns / width of a
// tile][rows][width], so that those of a panel lie together. Rows of x, or of 128 sums, lie a power of two apart in most
// models, share a few sets of the first-level cache, and throw the panel out of it.
//
// Sums run in ascending order of k: error at most (depth + 4) 2^-24 sum |x w|. Halves are widened while they are packed.
//
// The epilogue is called as epilogue(m, n0, n1, values): columns n0 to n1 (at most 128, n0 a multiple of 128 behind the first
// of a block) of row m, soon after the last tile.
#pragma once

#include "irc/conv.h"

IRC_BEGIN

constexpr int64_t linear_rows = 192, linear_columns = 768, linear_group = 128;

struct LinearMemory {
    alignas(64) float rows[linear_rows * gemm_depth];
    alignas(64) float sums[linear_rows * linear_columns];
};

// H packed rows, as FloatProduct reads them.
template <int H>
struct PackedTile {
    const float* x;
    IRC_INLINE const float* at(int m, int64_t k) const { return x + k * H + m; }
};

#if !defined(IRC_PLAIN)
// to[k][distance] = rows[m][k] for four neighbours k of 4 or 2 rows.
template <int distance>
IRC_INLINE void transpose_4x4(const float* rows, int64_t stride, float* to) {
    const __m128 a = _mm_loadu_ps(rows), b = _mm_loadu_ps(rows + stride);
    const __m128 c = _mm_loadu_ps(rows + 2 * stride), d = _mm_loadu_ps(rows + 3 * stride);
    const __m128 ab = _mm_unpacklo_ps(a, b), ab2 = _mm_unpackhi_ps(a, b);
    const __m128 cd = _mm_unpacklo_ps(c, d), cd2 = _mm_unpackhi_ps(c, d);
    _mm_storeu_ps(to, _mm_movelh_ps(ab, cd));
    _mm_storeu_ps(to + distance, _mm_movehl_ps(cd, ab));
    _mm_storeu_ps(to + 2 * distance, _mm_movelh_ps(ab2, cd2));
    _mm_storeu_ps(to + 3 * distance, _mm_movehl_ps(cd2, ab2));
}
template <int distance>
IRC_INLINE void transpose_2x4(const float* rows, int64_t stride, float* to) {
    const __m128 a = _mm_loadu_ps(rows), b = _mm_loadu_ps(rows + stride);
    const __m128 ab = _mm_unpacklo_ps(a, b), ab2 = _mm_unpackhi_ps(a, b);
    _mm_storel_pi(reinterpret_cast<__m64*>(to), ab);
    _mm_storeh_pi(reinterpret_cast<__m64*>(to + distance), ab);
    _mm_storel_pi(reinterpret_cast<__m64*>(to + 2 * distance), ab2);
    _mm_storeh_pi(reinterpret_cast<__m64*>(to + 3 * distance), ab2);
}
#endif

// to[padded][H] = x[H][length], zeros from `length` on.
template <int H, class Input>
inline void pack_tile(const Input* x, int64_t stride, int64_t length, int64_t padded, float* to) {
    if constexpr (sizeof(Input) != 4) {
        constexpr int64_t apart = gemm_depth + 16;
        alignas(64) float wide[H * apart];
        for (int m = 0; m < H; ++m)
            for (int64_t k = 0; k < length; k += 16) store(wide + m * apart + k, load_part(x + m * stride + k, length - k));
        pack_tile<H>(wide, apart, length, padded, to);
    } else {
        int64_t k = 0;
#if !defined(IRC_PLAIN)
        constexpr int fours = H / 4 * 4, twos = H / 2 * 2;
        for (; k + 4 <= length; k += 4) {
            for (int m = 0; m < fours; m += 4) transpose_4x4<H>(x + m * stride + k, stride, to + k * H + m);
            if constexpr (twos > fours) transpose_2x4<H>(x + fours * stride + k, stride, to + k * H + fours);
            if constexpr (H > twos)
                for (int64_t j = k; j < k + 4; ++j) to[j * H + twos] = x[twos * stride + j];
        }
#endif
        for (; k < length; ++k)
            for (int m = 0; m < H; ++m) to[k * H + m] = x[m * stride + k];
        for (; k < padded; ++k)
            for (int m = 0; m < H; ++m) to[k * H + m] = 0.0f;
    }
}

// One block: rows [m0, m0 + count) of x, columns [n0, n1).
template <class Product, class Input, class Epilogue>
class LinearBlock {
public:
    LinearBlock(LinearMemory& memory, const Product& product, const Input* x, int64_t stride, const uint8_t* packed, int64_t m0,
                int64_t count, int64_t n0, int64_t n1, int64_t size, Epilogue& epilogue)
        : x_(x + m0 * stride), stride_(stride), packed_(packed), m0_(m0), count_(count), n0_(n0), n1_(n1), size_(size),
          tiles_(ceil_div(count, Product::height)), memory_(memory), epilogue_(epilogue),
          product_(product) {}

    void run() {
        for (int64_t k = 0; k < size_; k += gemm_depth) {
            length_ = min_of(gemm_depth, size_ - k);
            padded_ = round_up(length_, Product::step);
            first_ = k == 0;
            last_ = k + length_ == size_;
            for_heights([&](auto h, int64_t begin, int64_t end) { pack_rows<decltype(h)::value>(k, begin, end); });
            for (int64_t n = n0_, panels; n < n1_; n += 16 * panels) {
                panels = panels_at(n);
                if (panels == 1)
                    multiply_panels<1>(k, n);
                else
                    multiply_panels<Product::panels>(k, n);
            }
        }
    }

private:
    // The panels that a tile takes at column n.
    int64_t panels_at(int64_t n) const { return n + 16 < n1_ ? Product::panels : 1; }
    float* sums_at(int64_t n, int64_t row, int64_t panels) const {
        return memory_.sums + (n - n0_) * count_ + row * 16 * panels;
    }

    // Calls f(height, begin, end) for the rows in higher tiles, and then for the others; heights differ by one.
    template <class F>
    void for_heights(const F& f) const {
        const int64_t least = count_ / tiles_, border = count_ % tiles_ * (least + 1);
        if (border > 0) with_height<Product::height>(least + 1, [&](auto h) { f(h, int64_t{0}, border); });
        with_height<Product::height>(least, [&](auto h) { f(h, border, count_); });
    }

    template <int H>
    void pack_rows(int64_t k, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += H)
            pack_tile<H>(x_ + row * stride_ + k, stride_, length_, padded_, memory_.rows + row * padded_);
    }

    template <int P>
    void multiply_panels(int64_t k, int64_t n) {
        const int64_t panel_bytes = product_.panel_bytes(size_), ahead = P * product_.panel_bytes(length_) / tiles_;
        const int64_t group = n0_ + (n - n0_) / linear_group * linear_group, group_end = min_of(n1_, group + linear_group);
        const bool finishes = last_ && n + 16 * P >= group_end;
        const uint8_t* panel = packed_ + n / 16 * panel_bytes;
        const uint8_t *weights = product_.ready_at(panel, k, length_, ready_), *next = panel + P * panel_bytes + product_.panel_bytes(k);
        for_heights([&](auto h, int64_t begin, int64_t end) {
            constexpr int H = decltype(h)::value;
            for (int64_t row = begin; row < end; row += H, next += ahead) {
                fetch_later(next, ahead);
                multiply_tile<H, P>(weights, panel_bytes, n, row);
                if (finishes) finish_rows(row, row + H, group, group_end);
            }
        });
    }

    template <int H, int P>
    __attribute__((noinline)) void multiply_tile(const uint8_t* weights, int64_t panel_bytes, int64_t n, int64_t row) {
        f32x16 sums[H][P];
        float* totals = sums_at(n, row, P);
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m)
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) sums[m][p] = first_ ? zero() : load(totals + 16 * (m * P + p));
        product_.template multiply<H, P>(PackedTile<H>{memory_.rows + row * padded_}, length_, weights, panel_bytes, sums);
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m)
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) store(totals + 16 * (m * P + p), sums[m][p]);
    }

    void finish_rows(int64_t begin, int64_t end, int64_t group, int64_t group_end) {
        alignas(64) float values[linear_group];
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t n = group, panels; n < group_end; n += 16 * panels) {
                panels = panels_at(n);
                const float* sums = sums_at(n, row, panels);
                for (int64_t i = 0; i < 16 * panels; i += 16) store(values + n - group + i, load(sums + i));
            }
            epilogue_(m0_ + row, group, group_end, static_cast<const float*>(values));
        }
    }

    const Input* x_;
    const int64_t stride_;
    const uint8_t* packed_;
    const int64_t m0_, count_, n0_, n1_, size_, tiles_;
    LinearMemory& memory_;
    Epilogue& epilogue_;
    const Product product_;
    typename Product::Ready ready_;
    int64_t length_ = 0, padded_ = 0;
    bool first_ = true, last_ = false;
};

// All workers call it; results are complete after the next barrier.
template <class Product, class Input, class Epilogue>
inline void linear_rows_product(Worker& worker, const Product& product, const Input* x, int64_t stride,
                                const uint8_t* packed, int64_t num_rows, int64_t num_columns, int64_t size,
                                Epilogue& epilogue) {
    // Narrower blocks, then lower ones, where whole ones cannot be shared evenly.
    int64_t width = linear_columns, height = linear_rows;
    const auto row_blocks = [&] { return ceil_div(num_rows, height); };
    const auto uneven = [&] {
        const int64_t blocks = ceil_div(num_columns, width) * row_blocks();
        return blocks < 4 * worker.count && blocks % worker.count != 0;
    };
    while (width > linear_group && uneven()) width = round_up(width / 2, linear_group);
    while (height > 48 && uneven()) height /= 2;
    const int64_t column_blocks = ceil_div(num_columns, width), blocks = row_blocks();
    for_chunks(worker, blocks * column_blocks, [&](int64_t chunk) {
        const int64_t block = chunk / column_blocks, n0 = chunk % column_blocks * width;
        const int64_t m0 = num_rows * block / blocks, m1 = num_rows * (block + 1) / blocks;
        LinearBlock<Product, Input, Epilogue>(in_worker_memory<LinearMemory>(worker), product, x, stride, packed, m0, m1 - m0,
                                              n0, min_of(num_columns, n0 + width), size, epilogue)
            .run();
    });
}

IRC_END
