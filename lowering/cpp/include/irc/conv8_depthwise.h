// Depthwise convolutions of 8-bit integers with static scales: every channel has a window of its own,
//
//     out[m, c] = scale[c] sum over places t of (in[pixel t under m, c] - zero) w[t, c].
//
// Lanes are channels, 32 of them a block. Places go in fours: the bytes of four pixels are interleaved, so that the four
// of a channel lie together, as the dot products of bytes want them. Packed weights of a block, for each four places:
//
//     four lines of 32 bytes; line q has channels 4 q to 4 q + 3, then 16 + 4 q to 16 + 4 q + 3, four places each,
//
// which is the order that unpack instructions give. Where one place is left (windows of 3 × 3, 5 × 5, 7 × 7), its weight
// stands alone as 32 bits; where two or three are, weights of 0 fill the four.
//
// Inputs count as unsigned (signed ones plus 128), pixels outside the image as a row of zero points, and zero times the
// sum of a channel's weights is taken off the sum. AVX-512 has vpdpbusd (of 256 bits: the same lines). AVX2 sums pairs in
// 16 bits (vpmaddubsw) where no weight is beyond 64; for others, weights are widened to 16 bits once for many pixels, and
// each four takes two vpmaddwd. All sums are exact.
//
// What the epilogue gets is that of conv8.h: a sum, rounded to f32 (exact below 2^24), times an f32 scale; or sums in
// registers, if it takes them.
#pragma once

#include "irc/conv8.h"

IRC_BEGIN

// Channels of a block; places at most; bytes of weights that stay in the first-level cache while pixels pass.
constexpr int64_t depthwise_block = 32, depthwise_places = 1024, depthwise_cached = 8192;

// A window as the kernel walks it: fours of places, and perhaps one more.
struct DepthwiseWindow {
    int64_t places, fours, block_bytes;
    bool single;

    explicit DepthwiseWindow(const ConvShape& shape)
        : places(shape.kernel_y * shape.kernel_x), fours(places / 4 + (places % 4 > 1)),
          block_bytes(depthwise_block * 4 * ceil_div(places, 4)), single(places % 4 == 1) {}
    // Blocks whose weights are cached together.
    int64_t blocks_together() const { return max_of(1, depthwise_cached / block_bytes); }
};

// Where the places of a window lie: the channels of each pixel, or a row of zero points.
template <class Input>
struct DepthwisePlaces {
    const Input* at[depthwise_places];
    int64_t offsets[depthwise_places];
    int64_t padded;

    // Places behind the last have weights of 0: any memory will do.
    DepthwisePlaces(const ConvShape& shape, const DepthwiseWindow& window) : padded(round_up(window.places, 4)) {
        int64_t t = 0;
        for (int64_t i = 0; i < shape.kernel_y; ++i)
            for (int64_t j = 0; j < shape.kernel_x; ++j, ++t)
                offsets[t] = (i * shape.dilation_y * shape.width + j * shape.dilation_x) * shape.channels;
        for (; t < padded; ++t) offsets[t] = 0;
    }
    void move_to(const ConvShape& shape, const OutputPixel& pixel, const Input* input, const Input* outside) {
        const bool inside = pixel.y >= 0 && pixel.x >= 0 &&
                            pixel.y + (shape.kernel_y - 1) * shape.dilation_y < shape.height &&
                            pixel.x + (shape.kernel_x - 1) * shape.dilation_x < shape.width;
        if (inside) {
            const Input* corner = input + ((pixel.b * shape.height + pixel.y) * shape.width + pixel.x) * shape.channels;
            for (int64_t t = 0; t < padded; t += 4)
                for (int64_t k = 0; k < 4; ++k) at[t + k] = corner + offsets[t + k];
            return;
        }
        int64_t t = 0;
        for (int64_t i = 0; i < shape.kernel_y; ++i)
            for (int64_t j = 0; j < shape.kernel_x; ++j, ++t) {
                const int64_t under = pixel.under(shape, i, j);
                at[t] = under < 0 ? outside : input + under * shape.channels;
            }
        for (; t < padded; ++t) at[t] = outside;
    }
    // Whether a whole block from channel c on would end behind the input.
    bool reaches(int64_t c, const Input* end) const {
        bool found = false;
        for (int64_t t = 0; t < padded; ++t) found |= at[t] < end && end - at[t] < c + depthwise_block;
        return found;
    }
    // Goes on with copies of `count` channels from c on.
    void copy(int64_t c, int64_t count, Input (*memory)[depthwise_block]) {
        for (int64_t t = 0; t < padded; ++t) {
            std::memcpy(memory[t], at[t] + c, static_cast<size_t>(count));
            at[t] = memory[t];
        }
    }
};

#if defined(IRC_AVX512) || defined(IRC_AVX2)

template <class Input>
IRC_INLINE __m256i depthwise_load(const Input* from) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return std::is_same_v<Input, int8_t> ? _mm256_xor_si256(raw, _mm256_set1_epi8(-128)) : raw;
}
IRC_INLINE __m256i load_line(const uint8_t* from, int64_t q) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + q);
}

// Four places as bytes: weights as they are packed.
struct DepthwiseBytes {
    static constexpr int64_t widening = 1;
    static void ready(const uint8_t*, int64_t, uint8_t*) {}
#if defined(IRC_AVX512)
    static IRC_INLINE __m256i four(__m256i sum, __m256i x, const uint8_t* weights, int64_t q) {
        return _mm256_dpbusd_epi32(sum, x, load_line(weights, q));
    }
#else
    static IRC_INLINE __m256i four(__m256i sum, __m256i x, const uint8_t* weights, int64_t q) {
        const __m256i pairs = _mm256_maddubs_epi16(x, load_line(weights, q));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
#endif
};

#if defined(IRC_AVX2)
// Places 0 and 2 of a four, then 1 and 3, as 16 bits: eight lines a four.
struct DepthwiseShorts {
    static constexpr int64_t widening = 2;
    static void ready(const uint8_t* packed, int64_t fours, uint8_t* memory) {
        for (int64_t line = 0; line < 4 * fours; ++line) {
            const __m256i bytes = load_line(packed, line);
            __m256i* to = reinterpret_cast<__m256i*>(memory) + 2 * line;
            _mm256_storeu_si256(to, _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8));
            _mm256_storeu_si256(to + 1, _mm256_srai_epi16(bytes, 8));
        }
    }
    static IRC_INLINE __m256i four(__m256i sum, __m256i x, const uint8_t* weights, int64_t q) {
        const __m256i even = _mm256_and_si256(x, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(x, 8);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, load_line(weights, 2 * q)));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, load_line(weights, 2 * q + 1)));
    }
};
#endif

// The bytes of line q as 32 bits each.
IRC_INLINE __m256i depthwise_line(__m256i x, int q) {
    const __m256i first = _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3);  // a byte and three of zero, by vpshufb
    const __m256i empty = _mm256_set1_epi32(static_cast<int32_t>(0x80808000u));
    return _mm256_shuffle_epi8(x, _mm256_or_si256(_mm256_add_epi32(first, _mm256_set1_epi32(4 * q)), empty));
}

// Sums of a block's channels, from c on. single: the weights of a last place, or null.
template <class Product, class Input>
IRC_INLINE void depthwise_sums(const Input* const* places, int64_t c, int64_t fours, const uint8_t* weights,
                               const uint8_t* single, const int32_t* corrections, i32x16 (&sums)[2]) {
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t k = 0; k < fours; ++k, places += 4, weights += 128 * Product::widening) {
        const __m256i x0 = depthwise_load(places[0] + c), x1 = depthwise_load(places[1] + c);
        const __m256i x2 = depthwise_load(places[2] + c), x3 = depthwise_load(places[3] + c);
        const __m256i low01 = _mm256_unpacklo_epi8(x0, x1), high01 = _mm256_unpackhi_epi8(x0, x1);
        const __m256i low23 = _mm256_unpacklo_epi8(x2, x3), high23 = _mm256_unpackhi_epi8(x2, x3);
        s0 = Product::four(s0, _mm256_unpacklo_epi16(low01, low23), weights, 0);
        s1 = Product::four(s1, _mm256_unpackhi_epi16(low01, low23), weights, 1);
        s2 = Product::four(s2, _mm256_unpacklo_epi16(high01, high23), weights, 2);
        s3 = Product::four(s3, _mm256_unpackhi_epi16(high01, high23), weights, 3);
    }
    if (single != nullptr) {
        const __m256i x = depthwise_load(places[0] + c);
        s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(depthwise_line(x, 0), load_line(single, 0)));
        s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(depthwise_line(x, 1), load_line(single, 1)));
        s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(depthwise_line(x, 2), load_line(single, 2)));
        s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(depthwise_line(x, 3), load_line(single, 3)));
    }
    const auto in_order = [](__m256i a, __m256i b) __attribute__((always_inline)) {
#if defined(IRC_AVX512)
        return i32x16{_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1)};
#else
        return i32x16{a, b};
#endif
    };
    sums[0] = add(in_order(_mm256_permute2x128_si256(s0, s1, 0x20), _mm256_permute2x128_si256(s2, s3, 0x20)),
                  load_i32(corrections));
    sums[1] = add(in_order(_mm256_permute2x128_si256(s0, s1, 0x31), _mm256_permute2x128_si256(s2, s3, 0x31)),
                  load_i32(corrections + 16));
}

#else

struct DepthwiseBytes {
    static constexpr int64_t widening = 1;
    static void ready(const uint8_t*, int64_t, uint8_t*) {}
};

template <class Product, class Input>
inline void depthwise_sums(const Input* const* places, int64_t c, int64_t fours, const uint8_t* weights,
                           const uint8_t* single, const int32_t* corrections, i32x16 (&sums)[2]) {
    constexpr uint8_t flip = std::is_same_v<Input, int8_t> ? 128 : 0;
    for (int64_t n = 0; n < depthwise_block; ++n) {
        const int64_t at = n % 16 / 4 * 32 + n / 16 * 16 + n % 4 * 4;
        int32_t sum = corrections[n];
        for (int64_t t = 0; t < 4 * fours; ++t)
            sum += static_cast<int8_t>(weights[t / 4 * 128 + at + t % 4]) * (static_cast<uint8_t>(places[t][c + n]) ^ flip);
        if (single != nullptr)
            sum += static_cast<int8_t>(single[at]) * (static_cast<uint8_t>(places[4 * fours][c + n]) ^ flip);
        sums[n / 16].v[n % 16] = sum;
    }
}

#endif

// Sums to an epilogue: as they are, or scaled, up to 128 channels at a time.
template <class Epilogue>
struct DepthwiseResults {
    const Epilogue& epilogue;
    const float* scales;
    int64_t channels;
    alignas(64) float values[conv_group];
    int64_t first = 0;

    // Channels from c on of pixel m; `last`: no more of this pixel follow.
    IRC_INLINE void take(int64_t m, int64_t c, bool last, const i32x16 (&sums)[2]) {
        if constexpr (takes_sums<Epilogue>) {
            if (c + depthwise_block <= channels) {
                epilogue.take(m, c, sums);
                return;
            }
            const bool half = c + 16 <= channels;
            if (half) epilogue.take(m, c, {sums[0]});
            const int64_t n = half ? c + 16 : c;
            if (n < channels) epilogue.take_last(m, n, channels - n, sums[half]);
        } else {
            float* to = values + (c - first);
            store(to, mul(to_float(sums[0]), load(scales + c)));
            store(to + 16, mul(to_float(sums[1]), load(scales + c + 16)));
            const int64_t end = min_of(channels, c + depthwise_block);
            if (!last && end - first < conv_group) return;
            epilogue(m, first, end, static_cast<const float*>(values));
            first = last ? 0 : end;
        }
    }
};

// The packed operand: weights of all blocks, then for all channels (padded to whole blocks) f32 scales, i32 corrections,
// and the zero point of the input as a row that stands for pixels outside the image.
struct DepthwiseOperand {
    const uint8_t* weights;
    const float* scales;
    const int32_t* corrections;
    const uint8_t* outside;

    DepthwiseOperand(const uint8_t* packed, const ConvShape& shape, const DepthwiseWindow& window) : weights(packed) {
        const int64_t padded = round_up(shape.channels, depthwise_block);
        const uint8_t* const behind = packed + padded / depthwise_block * window.block_bytes;
        scales = reinterpret_cast<const float*>(behind);
        corrections = reinterpret_cast<const int32_t*>(behind + 4 * padded);
        outside = behind + 8 * padded;
    }
};

// Pixels [m0, m1), blocks [b0, b1) of channels.
template <class Product, class Input, class Epilogue>
__attribute__((noinline)) void depthwise_part(const ConvShape& shape, const DepthwiseWindow& window, const Input* input,
                                              const DepthwiseOperand& operand, int64_t m0, int64_t m1, int64_t b0,
                                              int64_t b1, const Epilogue& given_epilogue) {
    constexpr bool widens = Product::widening > 1;
    const Epilogue epilogue = given_epilogue;
    const int64_t fours = window.fours, block_bytes = window.block_bytes;
    const Input* const end = input + shape.batch * shape.height * shape.width * shape.channels;
    const uint8_t* const packed = operand.weights + b0 * block_bytes;
    alignas(64) uint8_t memory[widens ? Product::widening * max_of(depthwise_cached, 32 * depthwise_places) : 64];
    for (int64_t b = 0; widens && b < b1 - b0; ++b)
        Product::ready(packed + b * block_bytes, fours, memory + 128 * Product::widening * fours * b);
    const uint8_t* const weights = widens ? memory : packed;
    const int64_t distance = widens ? 128 * Product::widening * fours : block_bytes;
    DepthwisePlaces<Input> places(shape, window);
    Input copies[depthwise_places][depthwise_block];
    DepthwiseResults<Epilogue> results{epilogue, operand.scales, shape.channels, {}, 0};
    OutputPixel pixel(shape, m0);
    for (int64_t m = m0; m < m1; ++m, pixel.next(shape)) {
        places.move_to(shape, pixel, input, reinterpret_cast<const Input*>(operand.outside));
        results.first = b0 * depthwise_block;
        for (int64_t b = b0; b < b1; ++b) {
            const int64_t c = b * depthwise_block;
            const uint8_t* single = window.single ? packed + (b - b0) * block_bytes + 128 * fours : nullptr;
            int64_t from = c;
            if (__builtin_expect(c + depthwise_block > shape.channels, 0) && places.reaches(c, end)) {
                places.copy(c, shape.channels - c, copies);
                from = 0;
            }
            i32x16 sums[2];
            depthwise_sums<Product>(places.at, from, fours, weights + (b - b0) * distance, single,
                                    operand.corrections + c, sums);
            results.take(m, c, b + 1 == b1, sums);
        }
    }
}

// narrow: no weight is beyond 64. Input: uint8_t or int8_t. All workers call it; results are complete after the next
// barrier.
template <class Input, class Epilogue>
inline void depthwise_bytes(Worker& worker, const ConvShape& shape, const Input* input, const uint8_t* packed, bool narrow,
                            Epilogue&& epilogue) {
    const DepthwiseWindow window(shape);
    const DepthwiseOperand operand(packed, shape, window);
    const int64_t pixels = shape.pixels(), blocks = ceil_div(shape.channels, depthwise_block);
    const int64_t together = window.blocks_together(), parts = ceil_div(blocks, together);
    // Pieces of some 2^18 products, but four for each worker.
    const int64_t pieces = max_of(4 * worker.count, pixels * min_of(blocks, together) * 32 * window.places >> 18);
    const int64_t cuts = min_of(pixels, pieces);
    for_chunks(worker, cuts * parts, [&](int64_t chunk) {
        const int64_t cut = chunk / parts, b0 = chunk % parts * together, b1 = min_of(blocks, b0 + together);
        const int64_t m0 = pixels * cut / cuts, m1 = pixels * (cut + 1) / cuts;
#if defined(IRC_AVX2)
        if (!narrow) {
            depthwise_part<DepthwiseShorts>(shape, window, input, operand, m0, m1, b0, b1, epilogue);
            return;
        }
#else
        (void)narrow;
#endif
        depthwise_part<DepthwiseBytes>(shape, window, input, operand, m0, m1, b0, b1, epilogue);
    });
}

IRC_END
