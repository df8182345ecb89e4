// One function for each type.
namespace {

// Blocks of 256 numbers, as many at a time as sixteen groups of N make.
template <int N, class Pack>
void with_minima(const float* x, const float* importance, uint8_t* out, int64_t blocks, int64_t per_row, Affine plan,
                 float factor, int num_bytes, Pack pack) {
    constexpr int groups = BLOCK / N, at_once = LANES / groups;
    if (importance != nullptr) plan = {plan.high, plan.unit, -0.9f, 0.05f, 37, false};
    for (int64_t start = 0; start < blocks; start += at_once) {
        const int count = static_cast<int>(min_of(at_once, blocks - start));
        alignas(64) Table<N> values = {}, weights = {};
        for (int b = 0; b < count; ++b) {
            const float* block = x + (start + b) * BLOCK;
            for (int i = 0; i < BLOCK; ++i) values[i % N][b * groups + i / N] = block[i];
            if (importance != nullptr)
                weigh<N>(block, importance + (start + b) % per_row * BLOCK, factor, b * groups, weights);
        }
        Lanes sizes, scale, minimum;
        if (importance == nullptr) {
            f32x16 total = zero();
            for (int i = 0; i < N; ++i) total = add(total, mul(load(values[i]), load(values[i])));
            store(sizes, total);
            for (int lane = 0; lane < LANES; ++lane) sizes[lane] = plan.absolute ? 0.0f : std::sqrt(sizes[lane] / N);
            for (int i = 0; i < N; ++i) store(weights[i], add(load(sizes), abs(load(values[i]))));
        } else {
            sum_weights<N>(weights, sizes);
        }
        Codes best;
        search_affine<N>(values, weights, plan, scale, minimum, best);
        for (int b = 0; b < count; ++b) {
            const int lane = b * groups;
            const float* fit = importance == nullptr ? nullptr : sizes + lane;
            WithMinima block;
            block.d = as_half(fit_units(groups, scale + lane, fit, plan.unit, block.scales));
            block.dmin = as_half(fit_units(groups, minimum + lane, fit, plan.unit, block.minima));
            uint8_t codes[BLOCK];
            for (int g = 0; g < groups; ++g) {
                const float step = block.d * block.scales[g], base = block.dmin * block.minima[g];
                const float kept = best.base[lane + g], inverse = best.inverse[lane + g];
                const float* number = x + (start + b) * BLOCK + g * N;
                for (int i = 0; i < N; ++i) {
                    const float wanted = step != 0 ? (number[i] + base) / step : inverse * (number[i] - kept);
                    const float code = std::min(std::max(std::nearbyint(wanted), 0.0f), static_cast<float>(plan.high));
                    codes[g * N + i] = static_cast<uint8_t>(code);
                }
            }
            pack(block, codes, out + (start + b) * num_bytes);
        }
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) void

// x: f32 [blocks, 256], rows of `per_row` blocks; importance: f32 of a row, or null; out: bytes of the blocks.

EXPORT q2_k(const float* x, const float* importance, uint8_t* out, int64_t blocks, int64_t per_row) {
    with_minima<16>(x, importance, out, blocks, per_row, {3, 15, -0.5f, 0.1f, 16, true}, 1.0f, 84, pack_q2);
}

EXPORT q4_k(const float* x, const float* importance, uint8_t* out, int64_t blocks, int64_t per_row) {
    with_minima<32>(x, importance, out, blocks, per_row, {15, 63, -1.0f, 0.1f, 21, false}, 2.0f, 144, pack_q4);
}

EXPORT q5_k(const float* x, const float* importance, uint8_t* out, int64_t blocks, int64_t per_row) {
    with_minima<32>(x, importance, out, blocks, per_row, {31, 63, -0.5f, 0.1f, 16, false}, 2.0f, 176, pack_q5);
}

EXPORT q3_k(const float* x, const float* importance, uint8_t* out, int64_t blocks, int64_t per_row) {
    for (int64_t b = 0; b < blocks; ++b) {
        const float* block = x + b * BLOCK;
        alignas(64) Table<16> values, weights, integers;
        Lanes scale, inverse, sizes;
        float scales[LANES], d;
        for (int i = 0; i < BLOCK; ++i) values[i % 16][i / 16] = block[i];
        if (importance == nullptr) {
            descend(values, 4, scale, integers);
            d = signed_units(scale, 32, scales);
        } else {
            weigh<16>(block, importance + b % per_row * BLOCK, 2.0f, 0, weights);
            sum_weights<16>(weights, sizes);
            search_centred<16>(values, weights, 4, scale, inverse);
            searched_integers(values, inverse, 4, integers);
            d = fit_signed_units(scale, sizes, 32, scales);
        }
        d = as_half(d);
        uint8_t codes[BLOCK], raised[LANES];
        round_centred(block, scales, d, integers, 4, codes);
        for (int g = 0; g < LANES; ++g) raised[g] = static_cast<uint8_t>(scales[g] + 32.0f);
        pack_q3(raised, d, codes, out + b * 110);
    }
}

EXPORT q6_k(const float* x, const float* importance, uint8_t* out, int64_t blocks, int64_t per_row) {
    for (int64_t b = 0; b < blocks; ++b) {
        const float* block = x + b * BLOCK;
        alignas(64) Table<16> values, weights, integers;
        Lanes scale, inverse;
        for (int i = 0; i < BLOCK; ++i) {
            values[i % 16][i / 16] = block[i];
            weights[i % 16][i / 16] = importance == nullptr ? block[i] * block[i] : importance[b % per_row * BLOCK + i];
        }
        search_centred<16>(values, weights, 32, scale, inverse);
        float size = 0.0f, scales[LANES];
        for (const float one : scale) size = std::max(size, std::fabs(one));
        if (size < TINY) {
            std::memset(out + b * 210, 0, 210);
            continue;
        }
        searched_integers(values, inverse, 32, integers);
        const float d = as_half(signed_units(scale, 128, scales));
        uint8_t codes[BLOCK], bytes[LANES];
        round_centred(block, scales, d, integers, 32, codes);
        for (int g = 0; g < LANES; ++g) bytes[g] = static_cast<uint8_t>(static_cast<int8_t>(scales[g]));
        pack_q6(bytes, d, codes, out + b * 210);
    }
}
