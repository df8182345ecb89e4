// Scales of sixteen groups of numbers at a time, one in each lane of a vector. Every lane computes what one group's loop in
// llama.cpp computes, in the same order, so the numbers are the same: build without contraction of products and sums.
// The searches themselves are explained in irc/core/formats/gguf_search.py.
#include <algorithm>

#include "irc/elementwise.h"
#include "irc/f32x16.h"

using namespace irc;

namespace {

constexpr int LANES = 16;
constexpr int BLOCK = 256;
constexpr float TINY = 1e-15f;

using Lanes = float[LANES];

// Number i of each group lies in row i.
template <int N>
using Table = float[N][LANES];

struct Affine {
    int high, unit;
    float first, step;
    int count;
    bool absolute;
};

IRC_INLINE f32x16 clamp(f32x16 x, float low, float high) { return min(max(x, set1(low)), set1(high)); }

// ------------------------------------------------------------------ integers from 0, with a minimum

struct Codes {  // code = round((x - base) * inverse), limited
    Lanes base, inverse;
};

template <int N>
IRC_INLINE void sum_errors(const Table<N>& x, const Table<N>& w, const Codes& codes, const Lanes& scale, const Lanes& low,
                           const Affine& plan, Lanes& error) {
    const f32x16 base = load(codes.base), inverse = load(codes.inverse), factor = load(scale), offset = load(low);
    f32x16 total = zero();
    for (int i = 0; i < N; ++i) {
        const f32x16 value = load(x[i]);
        const f32x16 code = clamp(round(mul(inverse, sub(value, base))), 0.0f, static_cast<float>(plan.high));
        const f32x16 difference = sub(add(mul(factor, code), offset), value);
        total = add(total, mul(load(w[i]), plan.absolute ? abs(difference) : mul(difference, difference)));
    }
    store(error, total);
}

template <int N>
void search_affine(const Table<N>& x, const Table<N>& w, const Affine& plan, Lanes& scale, Lanes& minimum, Codes& best) {
    f32x16 bottom = load(x[0]), top = bottom, sum_w = load(w[0]), sum_x = mul(sum_w, bottom);
    for (int i = 1; i < N; ++i) {
        const f32x16 value = load(x[i]), weight = load(w[i]);
        bottom = min(bottom, value);
        top = max(top, value);
        sum_w = add(sum_w, weight);
        sum_x = add(sum_x, mul(weight, value));
    }
    Lanes low, high, first, weights, values, error, lowest;
    store(low, min(bottom, zero()));
    store(high, top);
    store(weights, sum_w);
    store(values, sum_x);
    for (int lane = 0; lane < LANES; ++lane) {
        lowest[lane] = first[lane] = low[lane];
        best.base[lane] = low[lane];
        best.inverse[lane] = static_cast<float>(plan.high) / (high[lane] - low[lane]);
        scale[lane] = 1.0f / best.inverse[lane];
    }
    sum_errors<N>(x, w, best, scale, first, plan, error);
    Codes tried;
    Lanes sums, squares, products, slope, offset, found;
    for (int trial = 0; trial < plan.count; ++trial) {
        const float number = (plan.first + plan.step * static_cast<float>(trial)) + static_cast<float>(plan.high);
        for (int lane = 0; lane < LANES; ++lane) {
            tried.base[lane] = lowest[lane];
            tried.inverse[lane] = number / (high[lane] - lowest[lane]);
        }
        const f32x16 base = load(tried.base), inverse = load(tried.inverse);
        f32x16 sum_q = zero(), sum_qq = zero(), sum_xq = zero();
        for (int i = 0; i < N; ++i) {
            const f32x16 value = load(x[i]);
            const f32x16 code = clamp(round(mul(inverse, sub(value, base))), 0.0f, static_cast<float>(plan.high));
            const f32x16 weighted = mul(load(w[i]), code);
            sum_q = add(sum_q, weighted);
            sum_qq = add(sum_qq, mul(weighted, code));
            sum_xq = add(sum_xq, mul(weighted, value));
        }
        store(sums, sum_q);
        store(squares, sum_qq);
        store(products, sum_xq);
        Lanes determinant;
        for (int lane = 0; lane < LANES; ++lane) {
            const float d = weights[lane] * squares[lane] - sums[lane] * sums[lane];
            const float line = (weights[lane] * products[lane] - values[lane] * sums[lane]) / d;
            const float at = (squares[lane] * values[lane] - sums[lane] * products[lane]) / d;
            const float alone = products[lane] / squares[lane];
            determinant[lane] = d;
            slope[lane] = at > 0 ? alone : line;
            offset[lane] = at > 0 ? 0.0f : at;
        }
        sum_errors<N>(x, w, tried, slope, offset, plan, found);
        for (int lane = 0; lane < LANES; ++lane) {
            const bool better = determinant[lane] > 0 && found[lane] < error[lane];
            error[lane] = better ? found[lane] : error[lane];
            scale[lane] = better ? slope[lane] : scale[lane];
            lowest[lane] = better ? offset[lane] : lowest[lane];
            best.base[lane] = better ? tried.base[lane] : best.base[lane];
            best.inverse[lane] = better ? tried.inverse[lane] : best.inverse[lane];
        }
    }
    for (int lane = 0; lane < LANES; ++lane) {
        const bool flat = high[lane] == first[lane];
        scale[lane] = flat ? 0.0f : scale[lane];
        minimum[lane] = flat ? -first[lane] : -lowest[lane];
        best.inverse[lane] = flat ? 0.0f : best.inverse[lane];
    }
}

// ------------------------------------------------------------------ scales in units

// Sums after every integer in turn took the value that explains more, in up to five rounds.
IRC_INLINE void move_single(int count, const float* x, const float* w, float* q, float low, float high, bool both_positive,
                            float& sum_xq, float& sum_qq) {
    for (int round = 0; round < 5; ++round) {
        bool moved = false;
        for (int i = 0; i < count; ++i) {
            const float rest_xq = sum_xq - w[i] * x[i] * q[i], rest_qq = sum_qq - w[i] * q[i] * q[i];
            if (!(rest_xq > 0) || (both_positive && !(rest_qq > 0))) continue;
            const float to = std::min(std::max(std::nearbyint(x[i] * rest_qq / rest_xq), low), high);
            if (to == q[i]) continue;
            const float new_xq = rest_xq + w[i] * x[i] * to, new_qq = rest_qq + w[i] * to * to;
            if ((both_positive || new_qq > 0) && new_xq * new_xq * sum_qq > sum_xq * sum_xq * new_qq) {
                q[i] = to;
                sum_xq = new_xq;
                sum_qq = new_qq;
                moved = true;
            }
        }
        if (!moved) break;
    }
}

// d, and integers 0 to unit: d * integer is near each value.
float fit_units(int count, const float* values, const float* sizes, int unit, uint8_t* integers) {
    const float limit = static_cast<float>(unit);
    float largest = 0.0f, q[LANES];
    for (int i = 0; i < count; ++i) largest = std::max(largest, values[i]);
    if (sizes == nullptr) {
        const float inverse = largest > 0 ? limit / largest : 0.0f;
        for (int i = 0; i < count; ++i)
            integers[i] = static_cast<uint8_t>(std::min(std::max(std::nearbyint(inverse * values[i]), 0.0f), limit));
        return largest / limit;
    }
    if (largest < TINY) {
        std::fill(integers, integers + count, uint8_t{0});
        return 0.0f;
    }
    float inverse = limit / largest, best = 0.0f;
    for (int trial = -5; trial <= 4; ++trial) {  // the first: the range's own unit
        const float tried = trial == -5 ? inverse : (0.1f * static_cast<float>(trial) + limit) / largest;
        const float scale = 1.0f / tried;
        float error = 0.0f;
        for (int i = 0; i < count; ++i) {
            const float difference = values[i] - scale * std::min(limit, std::nearbyint(tried * values[i]));
            error += sizes[i] * difference * difference;
        }
        if (trial == -5 || error < best) {
            best = error;
            inverse = tried;
        }
    }
    float sum_xq = 0.0f, sum_qq = 0.0f;
    for (int i = 0; i < count; ++i) {
        q[i] = std::min(limit, std::nearbyint(inverse * values[i]));
        sum_xq += sizes[i] * values[i] * q[i];
        sum_qq += sizes[i] * q[i] * q[i];
    }
    move_single(count, values, sizes, q, 0.0f, limit, true, sum_xq, sum_qq);
    for (int i = 0; i < count; ++i) integers[i] = static_cast<uint8_t>(q[i]);
    return sum_qq > 0 ? sum_xq / sum_qq : 0.0f;
}

}  // namespace
