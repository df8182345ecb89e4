// Sums of one group of packed weights times quantized activations, for all rows of a tile.
//
// Packed weights: panels of 16 rows; a panel is its groups one after the other; a group is its lines (dot8.h), 16
// scales, and if asymmetric 16 zero points (8 bits: plus 128).
#pragma once

#include "irc/quantize.h"

IRC_BEGIN

#if defined(IRC_AVX512)
constexpr int packed_height = 12, unpacked_height = 0;
#elif defined(IRC_AVX2)
// Two sums a row, weights and activations in 16 registers; packed weights need some more while they are unpacked.
constexpr int packed_height = 4, unpacked_height = 5;
#else
constexpr int packed_height = 4, unpacked_height = 0;
#endif
constexpr int64_t few_tokens = 16;
static_assert(packed_height <= 12 && unpacked_height <= 12, "FILLING_ROWS of quantized_matmul.py: one less than a tile");

// Bits 4 or 8; Group 0: the whole row; Scale: float or f16.
template <int Bits, int Group, bool Asymmetric, class Scale>
struct Weights {
    static_assert(Bits == 4 || Bits == 8, "weights have 4 or 8 bits");
    static_assert(Group % 8 == 0, "a line of 4-bit weights holds 8 neighbours");
    static constexpr int bits = Bits;
    static constexpr bool asymmetric = Asymmetric;
    static constexpr int64_t fixed_group = Group;
    static constexpr bool one_segment = Group > 0 && Group <= segment_size;
    // With many tokens the groups are unpacked to bytes first, for taller tiles than have registers for unpacking.
    static constexpr bool unpacks = Bits == 4 && Group > 0 && Group <= 128 && unpacked_height > 0;
    static constexpr int64_t line_depth = Bits == 4 ? 8 : 4;
#if defined(IRC_AVX2)
    static constexpr Seeds seeds = Bits == 4 ? Seeds::pairs : Asymmetric ? Seeds::whole : Seeds::none;
#else
    static constexpr Seeds seeds = Bits == 4 || Asymmetric || byte_offset != 0 ? Seeds::whole : Seeds::none;
#endif
    static constexpr int32_t seed_factor = Asymmetric ? -1 : Bits == 4 ? -8 : -byte_offset;

    static int64_t tile_height(int64_t num_rows) {
        return unpacks && num_rows > few_tokens ? unpacked_height : packed_height;
    }
    static int64_t depth(int64_t size) { return round_up(size, 8); }
    static int64_t group(int64_t size) { return Group ? Group : depth(size); }
    static int64_t groups(int64_t size) { return depth(size) / group(size); }
    static int64_t segments_of_group(int64_t size) { return ceil_div(group(size), segment_size); }
    static int64_t segments(int64_t size) { return groups(size) * segments_of_group(size); }
    static int64_t line_bytes(int64_t size) { return group(size) * 2 * Bits; }
    static int64_t group_bytes(int64_t size) {
        return line_bytes(size) + 16 * static_cast<int64_t>(sizeof(Scale)) + (Asymmetric ? 16 : 0);
    }
    static int64_t panel_bytes(int64_t size) { return groups(size) * group_bytes(size); }
    static f32x16 scales(const uint8_t* p) { return load(reinterpret_cast<const Scale*>(p)); }
};

// 4-bit weights of a group as bytes: of each line the low nibbles, then the high ones.
template <class W>
IRC_INLINE void unpack_group(const uint8_t* lines, uint8_t* bytes) {
    for (int64_t i = 0; i < W::fixed_group / 8; ++i) {
        const bytes64 line = load_line(lines + 64 * i);
        store_line(bytes + 128 * i, low_nibbles(line));
        store_line(bytes + 128 * i + 64, high_nibbles(line));
    }
}

// Quantized activations from one group on (quantize.h): of the tile that starts at row `first` of `rows`.
struct GroupValues {
    const int8_t* values;
    const int32_t* seeds;
    int64_t rows, first;

    IRC_INLINE const int8_t* segment(int64_t start, int64_t length) const { return values + start * rows + first * length; }
    IRC_INLINE const int32_t* seed(int64_t index) const { return seeds + index * rows + first; }
};

// The same pointer, but so that the compiler counts on from here: addresses further away than a signed byte says make
// instructions of nine bytes, which arrive at half the pace.
template <class T>
IRC_INLINE const T* from_here(const T* p) {
    __asm__ volatile("" : "+r"(p));
    return p;
}

// Adds the products of `length` neighbours, 4 bits.
template <int H, bool Unpacked>
IRC_INLINE void nibble_sums(const uint8_t* lines, int64_t length, const int8_t* values, NibbleSum (&sums)[H]) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < length; i += 8) {
        const uint8_t* line = lines + i * (Unpacked ? 16 : 8);
        const bytes64 low = Unpacked ? load_line(line) : low_nibbles(load_line(line));
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) dot(sums[m], low, values + H * i + 4 * m);
        const bytes64 high = Unpacked ? load_line(line + 64) : high_nibbles(load_line(line));
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) dot(sums[m], high, values + H * (i + 4) + 4 * m);
    }
}

// Adds the products of `length` neighbours, 8 bits.
template <int H>
IRC_INLINE void byte_sums(const uint8_t* lines, int64_t length, const int8_t* values, i32x16 (&sums)[H]) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < length; i += 4) {
        const ByteLine line = load_bytes(lines + 16 * i);
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) dot(sums[m], line, values + H * i + 4 * m);
    }
}

// Integer sums of one group of a panel for the H rows of a tile. Lines are packed, or bytes from `unpack_group`.
template <class W, int H, bool Unpacked>
IRC_INLINE void group_sums(const uint8_t* lines, const uint8_t* zeros, int64_t group_at_run_time, const GroupValues& x,
                           i32x16 (&sums)[H]) {
    const int64_t group = W::one_segment ? W::fixed_group : group_at_run_time;
    constexpr bool even = W::fixed_group > 0 && W::fixed_group % segment_size == 0;
    if constexpr (!W::one_segment || W::bits == 8) {
#pragma GCC unroll 16
        for (int m = 0; m < H; ++m) sums[m] = zero_i32();
    }
    for (int64_t k = 0; k < group; k += segment_size) {
        const int64_t length = W::one_segment ? W::fixed_group : even ? segment_size : min_of(segment_size, group - k);
        const int8_t* values = x.segment(k, length);
        const int32_t* seeds = x.seed(k / segment_size);
        if constexpr (W::bits == 4) {
            NibbleSum part[H];
#pragma GCC unroll 16
            for (int m = 0; m < H; ++m) {
                if constexpr (W::asymmetric) part[m] = start(seeds[m], zeros);
                else part[m] = start(seeds[m]);
            }
            constexpr int64_t line_step = Unpacked ? 16 : 8;
            if (H > 1 && length == segment_size) {
#pragma GCC unroll 2
                for (int64_t i = 0; i < segment_size; i += segment_size / 2)
                    nibble_sums<H, Unpacked>(from_here(lines + line_step * i), segment_size / 2, from_here(values + H * i), part);
            } else {
                nibble_sums<H, Unpacked>(lines, length, values, part);
            }
            lines += line_step * length;
#pragma GCC unroll 16
            for (int m = 0; m < H; ++m) {
                if constexpr (W::one_segment) sums[m] = finish(part[m]);
                else sums[m] = add(sums[m], finish(part[m]));
            }
        } else {
            if (H > 1 && length == segment_size) {
#pragma GCC unroll 2
                for (int64_t i = 0; i < segment_size; i += segment_size / 2)
                    byte_sums<H>(from_here(lines + 16 * i), segment_size / 2, from_here(values + H * i), sums);
            } else {
                byte_sums<H>(lines, length, values, sums);
            }
            lines += 16 * length;
            if constexpr (W::seeds != Seeds::none) {
                i32x16 zero = set1_i32(1);
                if constexpr (W::asymmetric) zero = add(load_u8(zeros), set1_i32(byte_offset - 128));
#pragma GCC unroll 16
                for (int m = 0; m < H; ++m) sums[m] = add(sums[m], mul(zero, set1_i32(seeds[m])));
            }
        }
    }
}

IRC_INLINE void add_scaled(float* total, i32x16 sums, f32x16 scales) {
    store(total, fma(to_float(sums), scales, load(total)));
}

IRC_END
