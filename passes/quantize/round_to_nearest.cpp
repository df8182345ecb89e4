// Round-to-nearest quantization of rows of weights and its check: what _round_to_nearest.py does, to the bit, at a
// fraction of the time. Needs AVX2 and F16C, and groups of a multiple of 8 numbers.

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

enum class Type : int32_t { f32, f16, bf16 };

// What is done to the numbers (irc.core.formats.QuantFormat), and the types of weights [rows, width] and scales.
struct Format {
    int64_t width, group;
    int32_t bits, symmetric, is_signed;
    Type weight, scale;

    int64_t groups() const { return width / group; }
    int32_t high() const { return is_signed ? (1 << (bits - 1)) - 1 : (1 << bits) - 1; }
    int32_t lowest_stored() const { return is_signed ? -(1 << (bits - 1)) : 0; }
    int32_t low() const { return lowest_stored() + (is_signed && symmetric ? 1 : 0); }
    bool packs_two() const { return bits == 4; }
    int64_t stored_width() const { return packs_two() ? width / 2 : width; }
};

constexpr int32_t kNoSign = 0x7fffffff, kInfinity = 0x7f800000;

// Rounded to the type's precision, half to even.
__m256 rounded(__m256 x, Type type) {
    if (type == Type::f32) return x;
    if (type == Type::f16) return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000))));
}

float rounded(float x, Type type) { return _mm256_cvtss_f32(rounded(_mm256_set1_ps(x), type)); }

float float_of(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// The bits of |x|: ordered as the numbers are, with infinity and what is no number at the end.
__m256i magnitude(__m256 x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(kNoSign)); }

int32_t largest(__m256i x) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

float largest(__m256 x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// One row of weights as f32, and the largest |x| of each group; the range too if the format is asymmetric.
class Row {
   public:
    explicit Row(const Format& format)
        : low(format.groups()), high(format.groups()), absmax(format.groups()), format_(format), wide_(format.width) {}

    // Whether all numbers are finite. Whole rows at a time: what follows need not wait for one group's reduction.
    bool read(const uint8_t* weights) {
        widen(weights);
        int32_t most = 0;
        for (int64_t i = 0; i < format_.groups(); ++i) {
            const float* x = numbers + i * format_.group;
            __m256i top = _mm256_setzero_si256();
            for (int64_t k = 0; k < format_.group; k += 8) top = _mm256_max_epi32(top, magnitude(_mm256_loadu_ps(x + k)));
            const int32_t bits = largest(top);
            most = bits > most ? bits : most;
            absmax[i] = float_of(bits);
            if (!format_.symmetric) find_range(x, i);
        }
        return most < kInfinity;
    }

    const float* numbers = nullptr;
    std::vector<float> low, high;  // of the group and 0
    std::vector<float> absmax;

   private:
    void widen(const uint8_t* weights) {
        if (format_.weight == Type::f32) {
            numbers = reinterpret_cast<const float*>(weights);
            return;
        }
        for (int64_t k = 0; k < format_.width; k += 8) {
            const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + 2 * k));
            const __m256i brain = _mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
            const __m256 x = format_.weight == Type::f16 ? _mm256_cvtph_ps(raw) : _mm256_castsi256_ps(brain);
            _mm256_storeu_ps(&wide_[k], x);
        }
        numbers = wide_.data();
    }

    void find_range(const float* x, int64_t i) {
        __m256 least = _mm256_setzero_ps(), most = least;
        for (int64_t k = 0; k < format_.group; k += 8) {
            least = _mm256_max_ps(least, _mm256_sub_ps(_mm256_setzero_ps(), _mm256_loadu_ps(x + k)));
            most = _mm256_max_ps(most, _mm256_loadu_ps(x + k));
        }
        low[i] = -largest(least);
        high[i] = largest(most);
    }

    const Format& format_;
    std::vector<float> wide_;
};

struct Scales {
    const Format& format;
    uint8_t* at;

    float get(int64_t i) const {
        if (format.scale == Type::f32) return reinterpret_cast<const float*>(at)[i];
        return _cvtsh_ss(reinterpret_cast<const uint16_t*>(at)[i]);
    }

    void set(int64_t i, float x) const {
        if (format.scale == Type::f32) reinterpret_cast<float*>(at)[i] = x;
        else reinterpret_cast<uint16_t*>(at)[i] = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }

    void next_row() { at += format.groups() * (format.scale == Type::f32 ? 4 : 2); }
};

// The scale of each group of a row and its zero point.
void find_scales(const Format& format, const Row& row, float* scale, float* zero_point) {
    const float high = static_cast<float>(format.high()), low = static_cast<float>(format.low());
    // As Python has it: a quotient of f64, rounded once.
    const float share = static_cast<float>(format.high() / (format.high() + 0.5));
    for (int64_t i = 0; i < format.groups(); ++i) {
        const float span = format.symmetric ? row.absmax[i] / high : (row.high[i] - row.low[i]) / (high - low);
        float found = rounded(span, format.scale);
        if (found == 0) found = 1;
        if (!format.symmetric) {
            const __m128 exact = _mm_set_ss(low - row.low[i] / found);
            const float whole = _mm_cvtss_f32(_mm_round_ss(exact, exact, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
            zero_point[i] = whole < low ? low : whole > high ? high : whole;
        } else if (format.bits < 8) {
            found = row.absmax[i] > 0 ? rounded(found * share, format.scale) : 1;
        }
        scale[i] = found;
    }
}

// The integers of a group, a byte each.
void round_group(const Format& format, const float* x, float inverse, float zero_point, uint8_t* out) {
    const bool stretched = format.symmetric && format.bits < 8;
    const __m256 least = _mm256_set1_ps(static_cast<float>(stretched ? format.lowest_stored() : format.low()));
    const __m256 most = _mm256_set1_ps(static_cast<float>(format.high()));
    const __m256 factor = _mm256_set1_ps(inverse), zero = _mm256_set1_ps(zero_point);
    for (int64_t k = 0; k < format.group; k += 8) {
        __m256 value = _mm256_mul_ps(_mm256_loadu_ps(x + k), factor);
        value = _mm256_add_ps(_mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), zero);
        const __m256i whole = _mm256_cvttps_epi32(_mm256_min_ps(_mm256_max_ps(value, least), most));
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        const __m128i bytes = _mm_packus_epi16(_mm_and_si128(words, _mm_set1_epi16(255)), words);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + k), bytes);
    }
}

// A row of bytes as two offset nibbles a byte, the even one below; `values` can be read 8 bytes beyond its end.
void pack_nibbles(const Format& format, const uint8_t* values, uint8_t* out) {
    const __m128i offset = _mm_set1_epi8(format.is_signed ? 8 : 0);
    for (int64_t k = 0; k < format.width; k += 16) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + k));
        const __m128i low = _mm_xor_si128(_mm_and_si128(raw, _mm_set1_epi8(15)), offset);
        const __m128i pairs = _mm_maddubs_epi16(low, _mm_set1_epi16(0x1001));  // even + 16 odd
        const __m128i packed = _mm_packus_epi16(pairs, pairs);
        std::memcpy(out + k / 2, &packed, k + 16 <= format.width ? 8 : 4);
    }
}

// The integers of a row, a byte each.
void unpack(const Format& format, const uint8_t* stored, uint8_t* out) {
    if (!format.packs_two()) {
        std::memcpy(out, stored, static_cast<size_t>(format.width));
        return;
    }
    const __m128i offset = _mm_set1_epi8(format.is_signed ? 8 : 0);
    for (int64_t k = 0; k < format.width; k += 8) {
        int32_t four;
        std::memcpy(&four, stored + k / 2, 4);
        const __m128i raw = _mm_cvtsi32_si128(four);
        const __m128i both = _mm_and_si128(_mm_unpacklo_epi8(raw, _mm_srli_epi16(raw, 4)), _mm_set1_epi8(15));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + k), _mm_sub_epi8(both, offset));
    }
}

// Bits of the largest |restored - x| of a group.
template <bool kSigned, Type kWeight>
int32_t error_of(const float* x, const uint8_t* integers, int64_t count, float scale_, float zero_point) {
    const __m256 scale = _mm256_set1_ps(scale_), zero = _mm256_set1_ps(zero_point);
    __m256i error = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k += 8) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(integers + k));
        const __m256 number = _mm256_cvtepi32_ps(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
        const __m256 value = rounded(_mm256_mul_ps(_mm256_sub_ps(number, zero), scale), kWeight);
        error = _mm256_max_epi32(error, magnitude(_mm256_sub_ps(value, _mm256_loadu_ps(x + k))));
    }
    return largest(error);
}

using ErrorOf = int32_t (*)(const float*, const uint8_t*, int64_t, float, float);

template <bool kSigned>
ErrorOf error_function(Type weight) {
    if (weight == Type::f32) return error_of<kSigned, Type::f32>;
    return weight == Type::f16 ? error_of<kSigned, Type::f16> : error_of<kSigned, Type::bf16>;
}

}  // namespace

// Whether all numbers are finite; if not, what is written is of no use. No zero points: a null pointer.
extern "C" __attribute__((visibility("default"))) int32_t irc_quantize_rows(
    const Format* format, int64_t rows, const uint8_t* weights, uint8_t* stored, uint8_t* scales_at, uint8_t* zeros) {
    const int64_t groups = format->groups();
    Row row(*format);
    Scales scales{*format, scales_at};
    std::vector<float> scale(groups), zero_point(groups);
    std::vector<uint8_t> integers(format->width + 8);
    for (int64_t r = 0; r < rows; ++r) {
        if (!row.read(weights)) return false;
        find_scales(*format, row, scale.data(), zero_point.data());
        for (int64_t i = 0; i < groups; ++i) {
            const int64_t k = i * format->group;
            scales.set(i, scale[i]);
            if (zeros) zeros[i] = static_cast<uint8_t>(static_cast<int32_t>(zero_point[i]));
            round_group(*format, row.numbers + k, 1 / scale[i], zero_point[i], &integers[k]);
        }
        if (format->packs_two()) pack_nibbles(*format, integers.data(), stored);
        else std::memcpy(stored, integers.data(), static_cast<size_t>(format->width));
        weights += format->width * (format->weight == Type::f32 ? 4 : 2);
        stored += format->stored_width();
        scales.next_row();
        if (zeros) zeros += groups;
    }
    return true;
}

// The largest error of a number in steps that its group of the original gives; infinity if one is not finite.
extern "C" __attribute__((visibility("default"))) float irc_worst_rows(
    const Format* format, int64_t rows, const uint8_t* weights, const uint8_t* stored, uint8_t* scales_at,
    const uint8_t* zeros) {
    const int64_t groups = format->groups();
    const float intervals = static_cast<float>(format->symmetric ? (1 << (format->bits - 1)) - 1 : (1 << format->bits) - 1);
    const ErrorOf error_of_group = format->is_signed ? error_function<true>(format->weight) : error_function<false>(format->weight);
    Row row(*format);
    Scales scales{*format, scales_at};
    std::vector<int32_t> errors(groups);
    std::vector<uint8_t> integers(format->width);
    float worst = 0;
    for (int64_t r = 0; r < rows; ++r) {
        if (!row.read(weights)) return float_of(kInfinity);
        unpack(*format, stored, integers.data());
        for (int64_t i = 0; i < groups; ++i) {
            const uint8_t raw = zeros ? zeros[i] : 0;
            const float zero_point = format->is_signed ? static_cast<int8_t>(raw) : raw;
            const int64_t k = i * format->group;
            errors[i] = error_of_group(row.numbers + k, &integers[k], format->group, scales.get(i), zero_point);
        }
        for (int64_t i = 0; i < groups; ++i) {
            if (errors[i] >= kInfinity) return float_of(kInfinity);
            float step = (format->symmetric ? row.absmax[i] : row.high[i] - row.low[i]) / intervals;
            step = step < 1e-6f ? 1e-6f : step;
            const float steps = float_of(errors[i]) / step;
            worst = steps > worst ? steps : worst;
        }
        weights += format->width * (format->weight == Type::f32 ? 4 : 2);
        stored += format->stored_width();
        scales.next_row();
        if (zeros) zeros += groups;
    }
    return worst;
}
