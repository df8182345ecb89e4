// Instruction set of this translation unit, from the compiler's flags: IRC_AVX512 (F, BW, VL, VNNI, BF16), IRC_AVX2
// (with FMA and F16C) or IRC_PLAIN. Everything that depends on it lives in an inline namespace of that name, so that
// units compiled for different sets can be linked together and the target picks one at run time.
#ifndef IRC_ISA_H
#define IRC_ISA_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(IRC_EMULATE_AVX512)
// SIMDe computes the AVX-512 intrinsics with what the machine has: slow, but it runs anywhere.
#define IRC_AVX512 1
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include "irc/emulation.h"
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && \
    defined(__AVX512BF16__)
#define IRC_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define IRC_AVX2 1
#include <immintrin.h>
#else
#define IRC_PLAIN 1
#endif

#if defined(IRC_AVX512)
#define IRC_ISA avx512
#elif defined(IRC_AVX2)
#define IRC_ISA avx2
#else
#define IRC_ISA plain
#endif

#define IRC_BEGIN \
    namespace irc { \
    inline namespace IRC_ISA {
#define IRC_END \
    } \
    }

#define IRC_INLINE inline __attribute__((always_inline))

IRC_BEGIN

using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

// Brain float and half float as stored: wrappers, so that overloads can tell them apart.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
struct f8e4m3 {
    uint8_t bits;
};
struct f8e5m2 {
    uint8_t bits;
};

IRC_INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

IRC_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

IRC_INLINE float to_float(float x) { return x; }
IRC_INLINE float to_float(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

IRC_INLINE float to_float(f16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | rest << 13);  // infinity, NaN
    // Exponent and fraction read as a float are 2^112 too small; the product also makes subnormals normal.
    return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000u)));
}

// The 8-bit floats (OFP8): e5m2 is the upper half of a half float, e4m3 (no infinity; NaN is 0x7f) lies in one.
IRC_INLINE float to_float(f8e5m2 x) { return to_float(f16{static_cast<uint16_t>(x.bits << 8)}); }
IRC_INLINE float to_float(f8e4m3 x) {
    if ((x.bits & 0x7f) == 0x7f) return from_bits(0x7fc00000u);
    const uint16_t half = static_cast<uint16_t>((x.bits & 0x80) << 8 | (x.bits & 0x7f) << 7);
    return to_float(f16{half}) * 256.0f;
}

// Bits whose upper half is the number as brain float, rounded to nearest, ties to even; NaN stays NaN.
IRC_INLINE uint32_t round_upper_half(float x) {
    const uint32_t bits = to_bits(x), nan = -static_cast<uint32_t>(x != x);
    return (bits + ((0x7fffu + (bits >> 16 & 1u)) & ~nan)) | (nan & 0x400000u);
}

IRC_INLINE bf16 to_bf16(float x) { return bf16{static_cast<uint16_t>(round_upper_half(x) >> 16)}; }

IRC_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

IRC_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
IRC_INLINE int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }
IRC_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
IRC_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

IRC_END

#endif
