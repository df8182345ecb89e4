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
    int64_t padded, span_x, span_y;

    // Places behind the last have weights of 0: any memory will do.
    DepthwisePlaces(const ConvShape& shape, const DepthwiseWindow& window)
        : padded(round_up(window.places, 4)), span_x((shape.kernel_x - 1) * shape.dilation_x),
          span_y((shape.kernel_y - 1) * shape.dilation_y) {
        int64_t t = 0;
        for (int64_t i = 0; i < shape.kernel_y; ++i)
            for (int64_t j = 0; j < shape.kernel_x; ++j, ++t)
                offsets[t] = (i * shape.dilation_y * shape.width + j * shape.dilation_x) * shape.channels;
        for (; t < padded; ++t) offsets[t] = 0;
    }
    // The window of a pixel; how many pixels from it on, of at most `count`, have theirs inside the image at the same
    // distances: it and those right of it, or it alone.
    int64_t move_to(const ConvShape& shape, const OutputPixel& pixel, const Input* input, const Input* outside,
                    int64_t count) {
        const int64_t last_x = shape.width - 1 - span_x;
        if (pixel.y >= 0 && pixel.x >= 0 && pixel.x <= last_x && pixel.y + span_y < shape.height) {
            const Input* corner = input + ((pixel.b * shape.height + pixel.y) * shape.width + pixel.x) * shape.channels;
            for (int64_t t = 0; t < padded; t += 4)
                for (int64_t k = 0; k < 4; ++k) at[t + k] = corner + offsets[t + k];
            return min_of(count, (last_x - pixel.x) / shape.stride_x + 1);
        }
        int64_t t = 0;
        for (int64_t i = 0; i < shape.kernel_y; ++i)
            for (int64_t j = 0; j < shape.kernel_x; ++j, ++t) {
                const int64_t under = pixel.under(shape, i, j);
                at[t] = under < 0 ? outside : input + under * shape.channels;
            }
        for (; t < padded; ++t) at[t] = outside;
        return 1;
    }
};

// Copies of the last channels, for windows where a whole block of them would end behind the input.
template <class Input>
struct DepthwiseCopies {
    const Input* at[depthwise_places];
    Input memory[depthwise_places][depthwise_block];

    explicit DepthwiseCopies(int64_t places) {
        for (int64_t t = 0; t < places; ++t) at[t] = memory[t];
    }
    static bool needed(const DepthwisePlaces<Input>& places, int64_t from, const Input* end) {
        bool found = false;
        for (int64_t t = 0; t < places.padded; ++t)
            found |= places.at[t] < end && end - places.at[t] < from + depthwise_block;
        return found;
    }
    void fill(const DepthwisePlaces<Input>& places, int64_t from, int64_t count) {
        for (int64_t t = 0; t < places.padded; ++t)
            std::memcpy(memory[t], places.at[t] + from, static_cast<size_t>(count));
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
#pragma GCC unroll 2
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
    const Epilogue epilogue;
    const float* scales;
    int64_t channels;
    alignas(64) float values[conv_group];
    int64_t first;

    // Channels of a pixel follow, from c on.
    void start(int64_t c) { first = c; }
    // A block of channels of pixel m.
    IRC_INLINE void take(int64_t m, int64_t c, const i32x16 (&sums)[2]) {
        if constexpr (takes_sums<Epilogue>)
            epilogue.take(m, c, sums);
        else
            keep(m, c, sums);
    }
    // The last channels, fewer than a block.
    void take_last(int64_t m, int64_t c, int64_t count, const i32x16 (&sums)[2]) {
        if constexpr (takes_sums<Epilogue>) {
            if (count >= 16) epilogue.take(m, c, {sums[0]});
            if (count % 16 > 0) epilogue.take_last(m, c + count / 16 * 16, count % 16, sums[count / 16]);
        } else {
            keep(m, c, sums);
        }
    }
    // No more of this pixel: its channels end at `end`.
    void finish(int64_t m, int64_t end) {
        if constexpr (!takes_sums<Epilogue>)
            if (first < end) epilogue(m, first, end, static_cast<const float*>(values));
    }

private:
    void keep(int64_t m, int64_t c, const i32x16 (&sums)[2]) {
        if (c == first + conv_group) {
            epilogue(m, first, c, static_cast<const float*>(values));
            first = c;
        }
        store(values + c - first, mul(to_float(sums[0]), load(scales + c)));
        store(values + c - first + 16, mul(to_float(sums[1]), load(scales + c + 16)));
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

template <class Product, class Input>
struct DepthwiseMemory {
    DepthwiseCopies<Input> copies;
    // Wider weights of some blocks, for products that want them so.
    static constexpr int64_t largest = 32 * depthwise_places;
    static_assert(largest >= depthwise_cached, "the weights of one block, or of some that are cached together");
    alignas(64) uint8_t weights[Product::widening > 1 ? Product::widening * largest : 64];

    explicit DepthwiseMemory(int64_t places) : copies(places) {}
};

// Pixels [m0, m1), blocks [b0, b1) of channels. known: fours of places in front of a single one, or 0.
template <class Product, int64_t known, class Input, class Epilogue>
__attribute__((noinline)) void depthwise_part(const Worker& worker, const ConvShape& shape, const DepthwiseWindow& window, const Input* input,
                                              const DepthwiseOperand& operand, int64_t m0, int64_t m1, int64_t b0,
                                              int64_t b1, const Epilogue& epilogue) {
    constexpr bool widens = Product::widening > 1;
    const int64_t fours = known > 0 ? known : window.fours, block_bytes = window.block_bytes;
    const bool single = known > 0 || window.single;
    const int64_t whole = min_of(b1, shape.channels / depthwise_block), left = shape.channels - 32 * whole;
    const uint8_t* const packed = operand.weights;
    DepthwisePlaces<Input> places(shape, window);
    auto& memory = in_worker_memory<DepthwiseMemory<Product, Input>>(worker, places.padded);
    DepthwiseCopies<Input>& copies = memory.copies;
    const int64_t distance = widens ? 128 * Product::widening * fours : block_bytes;
    for (int64_t b = b0; widens && b < b1; ++b)
        Product::ready(packed + b * block_bytes, fours, memory.weights + (b - b0) * distance);
    const uint8_t* const weights = widens ? memory.weights : packed + b0 * block_bytes;
    DepthwiseResults<Epilogue> results{epilogue, operand.scales, shape.channels, {}, 0};
    const Input* const end = input + shape.batch * shape.height * shape.width * shape.channels;
    const Input* const outside = reinterpret_cast<const Input*>(operand.outside);
    const auto block = [&](const Input* const* from, int64_t at, int64_t b, i32x16(&sums)[2])
                           __attribute__((always_inline)) {
        const uint8_t* last = single ? packed + b * block_bytes + 128 * fours : nullptr;
        depthwise_sums<Product>(from, at, fours, weights + (b - b0) * distance, last,
                                operand.corrections + b * depthwise_block, sums);
    };
    for (int64_t m = m0, run; m < m1; m += run) {
        run = places.move_to(shape, OutputPixel(shape, m), input, outside, m1 - m);
        for (int64_t k = 0; k < run; ++k) {
            const int64_t shift = k * shape.stride_x * shape.channels;
            results.start(b0 * depthwise_block);
            for (int64_t b = b0; b < whole; ++b) {
                i32x16 sums[2];
                block(places.at, shift + b * depthwise_block, b, sums);
                results.take(m + k, b * depthwise_block, sums);
            }
            if (whole < b1) {
                const int64_t c = whole * depthwise_block, from = shift + c;
                const bool copied = copies.needed(places, from, end);
                if (copied) copies.fill(places, from, left);
                i32x16 sums[2];
                block(copied ? copies.at : places.at, copied ? 0 : from, whole, sums);
                results.take_last(m + k, c, left, sums);
            }
            results.finish(m + k, min_of(shape.channels, b1 * depthwise_block));
        }
    }
}

template <class Product, class Input, class Epilogue>
IRC_INLINE auto depthwise_part_of(const DepthwiseWindow& window) {
    // Windows of 3 × 3 have their fours in one piece.
    const bool three = window.single && window.fours == 2;
    return three ? &depthwise_part<Product, 2, Input, Epilogue> : &depthwise_part<Product, 0, Input, Epilogue>;
}

// narrow: no weight is beyond 64. Input: uint8_t or int8_t. All workers call it; results are complete after the next
// barrier. Inlined, so that of the parts that there are only the one that printed sizes ask for is compiled.
template <class Input, class Epilogue>
IRC_INLINE void depthwise_bytes(Worker& worker, const ConvShape& shape, const Input* input, const uint8_t* packed,
                                bool narrow, const Epilogue& epilogue) {
    const DepthwiseWindow window(shape);
    const DepthwiseOperand operand(packed, shape, window);
    const int64_t pixels = shape.pixels(), blocks = ceil_div(shape.channels, depthwise_block);
    const int64_t together = window.blocks_together(), parts = ceil_div(blocks, together);
    // Pieces of some 2^18 products, but four for each worker.
    const int64_t pieces = max_of(4 * worker.count, pixels * min_of(blocks, together) * 32 * window.places >> 18);
    const int64_t cuts = min_of(pixels, pieces);
#if defined(IRC_AVX2)
    const auto part = narrow ? depthwise_part_of<DepthwiseBytes, Input, Epilogue>(window)
                             : depthwise_part_of<DepthwiseShorts, Input, Epilogue>(window);
#else
    const auto part = depthwise_part_of<DepthwiseBytes, Input, Epilogue>(window);
    (void)narrow;
#endif
    for_chunks(worker, cuts * parts, [&](int64_t chunk) {
        const int64_t cut = chunk / parts, b0 = chunk % parts * together, b1 = min_of(blocks, b0 + together);
        part(worker, shape, window, input, operand, pixels * cut / cuts, pixels * (cut + 1) / cuts, b0, b1, epilogue);
    });
}

IRC_END
