// Functions on single numbers for printed loops. All are free of branches, so that a compiler can run them in lanes;
// the bounds on their errors are for f32 and were measured over the whole range.
#ifndef IRC_ELEMENTWISE_H
#define IRC_ELEMENTWISE_H

#include <type_traits>

#include "irc/isa.h"

IRC_BEGIN

namespace scalar {

// What a storage type holds, in a register, and back (rounded to nearest even).
IRC_INLINE float get(float x) { return x; }
IRC_INLINE double get(double x) { return x; }
IRC_INLINE int64_t get(int64_t x) { return x; }
IRC_INLINE int32_t get(int32_t x) { return x; }
IRC_INLINE int32_t get(int16_t x) { return x; }
IRC_INLINE int32_t get(int8_t x) { return x; }
IRC_INLINE int32_t get(uint8_t x) { return x; }
IRC_INLINE bool get(bool x) { return x; }
IRC_INLINE float get(bf16 x) { return to_float(x); }
IRC_INLINE float get(f16 x) { return to_float(x); }
IRC_INLINE float get(f8e4m3 x) { return to_float(x); }
IRC_INLINE float get(f8e5m2 x) { return to_float(x); }

IRC_INLINE f16 to_f16(float x) {
    const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u;
    const float magnitude = from_bits(bits & 0x7fffffffu);
    // Adding 2^e · 2^13 with the exponent of x rounds to ten bits; below 2^-14 the step stays that of subnormals.
    const uint32_t exponent = to_bits(magnitude) & 0x7f800000u;
    const uint32_t step = exponent < 0x38800000u ? 0x38800000u : exponent;
    const float rounder = from_bits(step + 0x06800000u);
    const uint32_t rounded = to_bits(from_bits(to_bits(magnitude + rounder)) - rounder);
    const uint32_t normal = (rounded - 0x38000000u) >> 13;
    const uint32_t small = static_cast<uint32_t>(from_bits(rounded) * 16777216.0f);
    uint32_t result = rounded < 0x38800000u ? small : normal;
    result = magnitude >= 65520.0f ? 0x7c00u : result;
    result = magnitude != magnitude ? 0x7e00u : result;
    return f16{static_cast<uint16_t>(sign | result)};
}

template <class Storage, class Register>
struct Put {
    static IRC_INLINE Storage of(Register x) { return static_cast<Storage>(x); }
};
template <>
struct Put<bf16, float> {
    static IRC_INLINE bf16 of(float x) { return to_bf16(x); }
};
template <>
struct Put<f16, float> {
    static IRC_INLINE f16 of(float x) { return to_f16(x); }
};
template <class Storage, class Register>
IRC_INLINE Storage put(Register x) {
    return Put<Storage, Register>::of(x);
}
template <class Storage, class Register>
IRC_INLINE Register rounded(Register x) {
    if constexpr (std::is_same_v<Storage, bf16> && std::is_same_v<Register, float>)
        return from_bits(round_upper_half(x) & 0xffff0000u);  // as f32: lanes of 16 bits would cost as much again
    else
        return get(put<Storage>(x));
}

// Float to integer as the processor does it for values that fit; others give the smallest integer.
template <class Integer, class Float>
IRC_INLINE Integer whole(Float x) {
    const Float limit = static_cast<Float>(static_cast<uint64_t>(1) << (8 * sizeof(Integer) - 1));
    return x >= -limit && x < limit ? static_cast<Integer>(x) : static_cast<Integer>(static_cast<Integer>(1) << (8 * sizeof(Integer) - 1));
}

// A whole float between two small integers as an integer; NaN is the lower. Adding 1.5 · 2^23 puts the number into the
// last bits, where integers are compared: a float that is clamped and then converted, compilers convert first and clamp
// thrice, and spend more on that than on everything else.
IRC_INLINE int32_t bounded(float x, int32_t low, int32_t high) {
    const float least = static_cast<float>(low);
    const int32_t bits = static_cast<int32_t>(to_bits((x > least ? x : least) + 12582912.0f));
    const int32_t most = 0x4b400000 + high;
    return (bits < most ? bits : most) - 0x4b400000;
}
IRC_INLINE int32_t bounded(double x, int32_t low, int32_t high) {
    return static_cast<int32_t>(x > low ? (x < high ? x : high) : low);
}

// NaN where either is. Against a number that is known when the program is compiled (a ReLU, a clamp) one instruction.
template <class T>
IRC_INLINE T maximum(T a, T b) {
    if (__builtin_constant_p(b) && b == b) return b > a ? b : a;
    return (a > b) | (a != a) ? a : b;  // no branch, so that loops run in lanes
}
template <class T>
IRC_INLINE T minimum(T a, T b) {
    if (__builtin_constant_p(b) && b == b) return b < a ? b : a;
    return (a < b) | (a != a) ? a : b;
}

IRC_INLINE int64_t floor_div(int64_t a, int64_t b) {
    const int64_t q = a / b;
    return q - static_cast<int64_t>((a % b != 0) & ((a < 0) != (b < 0)));
}
IRC_INLINE int32_t floor_div(int32_t a, int32_t b) {
    return static_cast<int32_t>(floor_div(static_cast<int64_t>(a), static_cast<int64_t>(b)));
}
IRC_INLINE float floor_div(float a, float b) { return std::floor(a / b); }
IRC_INLINE double floor_div(double a, double b) { return std::floor(a / b); }
IRC_INLINE int64_t trunc_div(int64_t a, int64_t b) { return a / b; }
IRC_INLINE int32_t trunc_div(int32_t a, int32_t b) { return a / b; }
IRC_INLINE float trunc_div(float a, float b) { return std::trunc(a / b); }
IRC_INLINE double trunc_div(double a, double b) { return std::trunc(a / b); }
IRC_INLINE int64_t remainder(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }
IRC_INLINE int32_t remainder(int32_t a, int32_t b) { return a - floor_div(a, b) * b; }
template <class T>
IRC_INLINE T remainder(T a, T b) {
    const T r = std::fmod(a, b);
    return r != 0 && ((r < 0) != (b < 0)) ? r + b : r;
}
IRC_INLINE int64_t fmod(int64_t a, int64_t b) { return a % b; }
IRC_INLINE float fmod(float a, float b) { return std::fmod(a, b); }
IRC_INLINE double fmod(double a, double b) { return std::fmod(a, b); }
IRC_INLINE int64_t power(int64_t a, int64_t b) {
    int64_t result = b < 0 ? (a == 1 ? 1 : a == -1 ? (b % 2 ? -1 : 1) : 0) : 1;
    for (; b > 0; b >>= 1, a = static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(a)))
        if (b & 1) result = static_cast<int64_t>(static_cast<uint64_t>(result) * static_cast<uint64_t>(a));
    return result;
}
IRC_INLINE int32_t power(int32_t a, int32_t b) { return static_cast<int32_t>(power(static_cast<int64_t>(a), static_cast<int64_t>(b))); }
IRC_INLINE float power(float a, float b) { return std::pow(a, b); }
IRC_INLINE double power(double a, double b) { return std::pow(a, b); }

IRC_INLINE float absolute(float x) { return from_bits(to_bits(x) & 0x7fffffffu); }
IRC_INLINE double absolute(double x) { return std::fabs(x); }
IRC_INLINE int64_t absolute(int64_t x) { return x < 0 ? -x : x; }
IRC_INLINE int32_t absolute(int32_t x) { return x < 0 ? -x : x; }
template <class T>
IRC_INLINE T sign(T x) {
    return static_cast<T>((x > 0) - (x < 0));
}

// Nearest whole number, ties to even, for any float.
IRC_INLINE float round_even(float x) {
#if defined(IRC_PLAIN)
    const float magic = 12582912.0f;  // 1.5 · 2^23
    const float near = (x + magic) - magic;
    return absolute(x) < 4194304.0f ? near : std::nearbyint(x);
#else
    return std::rint(x);  // one instruction, in lanes too
#endif
}
IRC_INLINE double round_even(double x) { return std::nearbyint(x); }

// e^x = 2^n · e^r with |r| ≤ ln 2 / 2; the series to r^7 is good to 2 ulp. Zero below -104, infinity above 88.73.
IRC_INLINE float exp(float x) {
    const float bounded = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
    const float magic = 12582912.0f;
    const float shifted = bounded * 1.44269504088896341f + magic;
    const float n = shifted - magic;
    const float r = (bounded - n * 0.693359375f) + n * 2.12194440054690583e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // Two steps: 2^n alone leaves the range of floats where the result is subnormal or just finite.
    const uint32_t whole_n = to_bits(shifted) - 0x4b400000u;
    const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(whole_n) >> 1), rest = whole_n - half;
    return p * from_bits((half + 127u) << 23) * from_bits((rest + 127u) << 23);
}
IRC_INLINE double exp(double x) { return std::exp(x); }

template <class T>
IRC_INLINE T sigmoid(T x) {
    return 1 / (1 + exp(-x));
}

// Series to x^11 for small x, 1 - 2 / (e^2x + 1) beyond.
IRC_INLINE float tanh(float x) {
    const float a = absolute(x), s = a * a;
    float p = -1382.0f / 155925;
    p = p * s + 62.0f / 2835;
    p = p * s - 17.0f / 315;
    p = p * s + 2.0f / 15;
    p = p * s - 1.0f / 3;
    const float near = a + a * s * p;
    const float far = 1.0f - 2.0f / (exp(2.0f * a) + 1.0f);
    const float result = a < 0.35f ? near : far;
    return from_bits(to_bits(result) | (to_bits(x) & 0x80000000u));
}
IRC_INLINE double tanh(double x) { return std::tanh(x); }

// Maclaurin series below 1, Abramowitz & Stegun 7.1.26 above (1.5e-7).
IRC_INLINE float erf(float x) {
    const float a = absolute(x), s = a * a;
    float p = 1.0f / 76204800;  // 1 / (10! · 21)
    p = -1.0f / 6894720 + s * p;       // 1 / (9! · 19)
    p = 1.0f / 685440 + s * p;
    p = -1.0f / 75600 + s * p;
    p = 1.0f / 9360 + s * p;
    p = -1.0f / 1320 + s * p;
    p = 1.0f / 216 + s * p;
    p = -1.0f / 42 + s * p;
    p = 1.0f / 10 + s * p;
    p = -1.0f / 3 + s * p;
    const float near = 1.12837916709551257f * (a + a * s * p);
    const float t = 1.0f / (1.0f + 0.3275911f * a);
    float q = 1.061405429f;
    q = q * t - 1.453152027f;
    q = q * t + 1.421413741f;
    q = q * t - 0.284496736f;
    q = q * t + 0.254829592f;
    const float far = 1.0f - q * t * exp(-s);
    const float result = a < 1.0f ? near : far;
    return from_bits(to_bits(result) | (to_bits(x) & 0x80000000u));
}
IRC_INLINE double erf(double x) { return std::erf(x); }

template <class T>
IRC_INLINE T rsqrt(T x) {
    return 1 / std::sqrt(x);
}

}  // namespace scalar

IRC_END

#endif
