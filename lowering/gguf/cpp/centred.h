// Scales of groups of integers around 0, for Q3_K and Q6_K.
namespace {

template <int N>
void find_largest(const Table<N>& x, Lanes& largest) {
    for (int lane = 0; lane < LANES; ++lane) {
        float size = 0.0f, found = 0.0f;
        for (int i = 0; i < N; ++i) {
            const bool larger = std::fabs(x[i][lane]) > size;
            size = larger ? std::fabs(x[i][lane]) : size;
            found = larger ? x[i][lane] : found;
        }
        largest[lane] = found;
    }
}

// Scales of least weighted error; inverse: what the integers come of.
template <int N>
void search_centred(const Table<N>& x, const Table<N>& w, int half, Lanes& scale, Lanes& inverse) {
    Lanes largest, best, tried, products, squares;
    find_largest<N>(x, largest);
    for (int trial = -10; trial <= 9; ++trial) {  // the first: the range's own scale
        if (trial == 0) continue;
        const float number = static_cast<float>(half) + 0.1f * static_cast<float>(trial == -10 ? 0 : trial);
        for (int lane = 0; lane < LANES; ++lane) tried[lane] = -number / largest[lane];
        const f32x16 factor = load(tried);
        f32x16 sum_xq = zero(), sum_qq = zero();
        for (int i = 0; i < N; ++i) {
            const f32x16 value = load(x[i]), weight = load(w[i]);
            const f32x16 q = clamp(round(mul(factor, value)), static_cast<float>(-half), static_cast<float>(half - 1));
            sum_xq = add(sum_xq, mul(mul(weight, value), q));
            sum_qq = add(sum_qq, mul(mul(weight, q), q));
        }
        store(products, sum_xq);
        store(squares, sum_qq);
        for (int lane = 0; lane < LANES; ++lane) {
            const float slope = squares[lane] != 0 ? products[lane] / squares[lane] : 0.0f;
            const bool better = trial == -10 || (squares[lane] > 0 && products[lane] * products[lane] > best[lane] * squares[lane]);
            scale[lane] = better ? slope : scale[lane];
            best[lane] = better ? slope * products[lane] : best[lane];
            inverse[lane] = better ? tried[lane] : inverse[lane];
        }
    }
    for (int lane = 0; lane < LANES; ++lane)
        if (std::fabs(largest[lane]) < TINY) scale[lane] = inverse[lane] = 0.0f;
}

// The range's own scale, then single integers move.
void descend(const Table<16>& x, int half, Lanes& scale, Table<16>& integers) {
    Lanes largest;
    find_largest<16>(x, largest);
    const float low = static_cast<float>(-half), high = static_cast<float>(half - 1);
    for (int lane = 0; lane < LANES; ++lane) {
        scale[lane] = 0.0f;
        float value[16], weight[16], q[16], sum_xq = 0.0f, sum_qq = 0.0f;
        const float inverse = low / largest[lane];
        for (int i = 0; i < 16; ++i) {
            value[i] = x[i][lane];
            weight[i] = value[i] * value[i];
            q[i] = std::min(std::max(std::nearbyint(inverse * value[i]), low), high);
            sum_xq += weight[i] * value[i] * q[i];
            sum_qq += weight[i] * q[i] * q[i];
        }
        const bool empty = std::fabs(largest[lane]) < TINY;
        if (!empty) {
            move_single(16, value, weight, q, low, high, false, sum_xq, sum_qq);
            scale[lane] = sum_qq > 0 ? sum_xq / sum_qq : 0.0f;
        }
        for (int i = 0; i < 16; ++i) integers[i][lane] = empty ? low : q[i];
    }
}

// Integers of a block, by its scales or, where one is 0, as searched; `half` added.
void round_centred(const float* block, const float* scales, float d, const Table<16>& searched, int half, uint8_t* codes) {
    const float low = static_cast<float>(-half), high = static_cast<float>(half - 1);
    for (int g = 0; g < 16; ++g) {
        const float step = d * scales[g];
        for (int i = 0; i < 16; ++i) {
            const float again = std::min(std::max(std::nearbyint(block[g * 16 + i] / step), low), high);
            codes[g * 16 + i] = static_cast<uint8_t>((step != 0 ? again : searched[i][g]) + static_cast<float>(half));
        }
    }
}

// Where the largest of these numbers is next to nothing, the integers are the lowest.
void searched_integers(const Table<16>& x, const Lanes& inverse, int half, Table<16>& integers) {
    for (int i = 0; i < 16; ++i)
        for (int lane = 0; lane < LANES; ++lane) {
            const float q = std::nearbyint(inverse[lane] * x[i][lane]);
            integers[i][lane] = inverse[lane] == 0 ? static_cast<float>(-half)
                                                   : std::min(std::max(q, static_cast<float>(-half)), static_cast<float>(half - 1));
        }
}

// The scale of largest magnitude becomes -unit; unrounded d.
float signed_units(const Lanes& scale, int unit, float* integers) {
    float size = 0.0f, largest = 0.0f;
    for (const float one : scale)
        if (std::fabs(one) > size) {
            size = std::fabs(one);
            largest = one;
        }
    const float low = static_cast<float>(-unit), inverse = low / largest;
    for (int g = 0; g < LANES; ++g)
        integers[g] = largest == 0 ? low : std::min(std::max(std::nearbyint(inverse * scale[g]), low), -low - 1);
    return largest == 0 ? 0.0f : 1.0f / inverse;
}

// The same by least error: the search for a group of integers, with the sixteen scales as the numbers of lane 0.
float fit_signed_units(const Lanes& scale, const Lanes& sizes, int unit, float* integers) {
    Table<16> x = {}, w = {}, found;
    for (int g = 0; g < 16; ++g) {
        x[g][0] = scale[g];
        w[g][0] = sizes[g];
    }
    Lanes d, inverse;
    search_centred<16>(x, w, unit, d, inverse);
    searched_integers(x, inverse, unit, found);
    for (int g = 0; g < 16; ++g) integers[g] = found[g][0];
    return d[0];
}

}  // namespace
