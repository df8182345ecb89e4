// Attention of many rows over contiguous keys: keys and values are laid out once as panels, then tiles multiply.
#pragma once

#include "irc/attention_arguments.h"
#include "irc/fmatmul.h"

IRC_BEGIN

constexpr int64_t many_rows = 96, many_keys = gemm_columns;

// Keys and values of all sequences as f32 panels: keys [length / 16][width][16], values [value width / 16][length][16].
template <int Width, int ValueWidth>
struct PanelSizes {
    static constexpr int64_t value_width = padded(ValueWidth);
    static int64_t keys(int64_t length) { return padded(length) * Width; }
    static int64_t values(int64_t length) { return padded(length) * value_width; }
    static int64_t floats(int64_t length) { return keys(length) + values(length); }
};

#if !defined(IRC_PLAIN)
// to[d][16] = rows[t][d] for 8 rows of `stride` and 8 places d.
IRC_INLINE void transpose_8(const float* rows, int64_t stride, float* to) {
    __m256 v[8], pairs[8], fours[8];
    for (int t = 0; t < 8; ++t) v[t] = _mm256_loadu_ps(rows + t * stride);
    for (int t = 0; t < 8; t += 2) {
        pairs[t] = _mm256_unpacklo_ps(v[t], v[t + 1]);
        pairs[t + 1] = _mm256_unpackhi_ps(v[t], v[t + 1]);
    }
    for (int t = 0; t < 8; t += 4) {
        fours[t] = _mm256_shuffle_ps(pairs[t], pairs[t + 2], 0x44);
        fours[t + 1] = _mm256_shuffle_ps(pairs[t], pairs[t + 2], 0xee);
        fours[t + 2] = _mm256_shuffle_ps(pairs[t + 1], pairs[t + 3], 0x44);
        fours[t + 3] = _mm256_shuffle_ps(pairs[t + 1], pairs[t + 3], 0xee);
    }
    for (int d = 0; d < 4; ++d) {
        _mm256_storeu_ps(to + 16 * d, _mm256_permute2f128_ps(fours[d], fours[d + 4], 0x20));
        _mm256_storeu_ps(to + 16 * (d + 4), _mm256_permute2f128_ps(fours[d], fours[d + 4], 0x31));
    }
}
#endif

// to[d][16] = rows[t][d] for 16 rows.
template <int Width>
IRC_INLINE void transpose_panel(const float (&rows)[16][padded(Width)], float* to) {
#if defined(IRC_PLAIN)
    constexpr int64_t first = 0;
#else
    constexpr int64_t first = Width / 8 * 8;
    for (int64_t d = 0; d < first; d += 8)
        for (int64_t t = 0; t < 16; t += 8) transpose_8(&rows[t][d], padded(Width), to + 16 * d + t);
#endif
    for (int64_t d = first; d < Width; ++d)
        for (int64_t t = 0; t < 16; ++t) to[16 * d + t] = rows[t][d];
}

template <int Width, int ValueWidth, class Arguments>
inline void lay_out_panels(Worker& worker, const Arguments& arguments, int64_t last, float* panels) {
    using Sizes = PanelSizes<Width, ValueWidth>;
    const int64_t groups = padded(last) / 16;
    for_chunks(worker, arguments.batch * arguments.kv_heads * groups, [&](int64_t chunk) {
        const int64_t group = chunk % groups, head = chunk / groups % arguments.kv_heads;
        const int64_t b = chunk / groups / arguments.kv_heads, count = min_of(16, last - 16 * group);
        float* keys = panels + (b * arguments.kv_heads + head) * Sizes::floats(last);
        float* values = keys + Sizes::keys(last) + 16 * 16 * group;
        keys += group * 16 * Width;
        alignas(64) float key_rows[16][padded(Width)] = {}, value_rows[16][Sizes::value_width] = {};
        copy_rows<Width>(arguments.keys, b, head, 16 * group, count, key_rows[0]);
        transpose_panel<Width>(key_rows, keys);
        copy_rows<ValueWidth>(arguments.values, b, head, 16 * group, count, value_rows[0]);
        for (int64_t t = 0; t < 16; ++t)
            for (int64_t d = 0; d < Sizes::value_width; d += 16)
                store(values + d / 16 * padded(last) * 16 + t * 16, load(value_rows[t] + d));
    });
    worker.barrier();
}

// Rows of one tile column: x [rows][stride] times one panel over `length` neighbours, added to totals.
inline void panel_product(const float* x, int64_t stride, int64_t rows, const float* panel, int64_t length,
                          float* totals) {
    using Panel = FloatPanel<float>;
    const int64_t tiles = ceil_div(rows, gemm_height);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = rows * tile / tiles, height = rows * (tile + 1) / tiles - first;
        gemm_tile<Panel, 1>(height, x + first * stride, stride, reinterpret_cast<const uint8_t*>(panel), 0, length,
                            totals + first * gemm_columns);
    }
}

template <int Width, int ValueWidth>
struct ManyState {
    static constexpr int64_t stride = padded(Width) + 16;
    alignas(64) float queries[many_rows * stride];
    alignas(64) float scores[many_rows * many_keys];
    alignas(64) float values[many_rows * gemm_columns];
    float top[many_rows], total[many_rows];
    KeyRange range[many_rows];
};

// Rows [row, row + count) of one key-value head against its panels.
template <int Width, int ValueWidth, class Arguments>
inline void many_run(ManyState<Width, ValueWidth>& state, const Arguments& arguments, int64_t b, int64_t head, int64_t row,
                     int64_t count, const float* keys, const float* values, int64_t length) {
    using Sizes = PanelSizes<Width, ValueWidth>;
    const int64_t group = arguments.group();
    int64_t first = length, last = 0;
    for (int64_t r = 0; r < count; ++r) {
        const int64_t s = (row + r) / group, h = head * group + (row + r) % group;
        copy_row<Width>(state.queries + r * state.stride,
                        arguments.query + b * arguments.query_batch + h * arguments.query_head + s * arguments.query_row,
                        arguments.scale);
        for (int64_t d = 0; d < Sizes::value_width; d += 16) store(state.values + r * gemm_columns + d, zero());
        state.top[r] = arguments.sinks == nullptr ? minus_infinity() : arguments.sinks[h];
        state.total[r] = arguments.sinks == nullptr ? 0.0f : 1.0f;
        state.range[r] = arguments.range(b, s);
        if (state.range[r].first == state.range[r].last) continue;
        first = min_of(first, state.range[r].first);
        last = max_of(last, state.range[r].last);
    }
    for (int64_t start = first / 16 * 16; start < last; start += many_keys) {
        const int64_t seen = min_of(many_keys, last - start), whole = padded(seen);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t t = 0; t < whole; t += 16) store(state.scores + r * many_keys + t, zero());
        for (int64_t t = 0; t < whole; t += 16)
            panel_product(state.queries, state.stride, count, keys + (start + t) * Width, Width, state.scores + t);
        for (int64_t r = 0; r < count; ++r) {
            float* scores = state.scores + r * many_keys;
            if (arguments.softcap != 0.0f)
                for (int64_t t = 0; t < whole; t += 16)
                    store(scores + t, cap_scores(load(scores + t), arguments.softcap));
            arguments.bias.add(scores, b, head * group + (row + r) % group, (row + r) / group, start, seen);
            const float decay = softmax_step(scores, whole, state.range[r].first - start, state.range[r].last - start,
                                             state.top[r], state.total[r]);
            if (decay == 1.0f) continue;
            float* sums = state.values + r * gemm_columns;
            for (int64_t d = 0; d < Sizes::value_width; d += 16) store(sums + d, mul(load(sums + d), set1(decay)));
        }
        for (int64_t d = 0; d < Sizes::value_width; d += 16)
            panel_product(state.scores, many_keys, count, values + (d / 16 * padded(length) + start) * 16, seen,
                          state.values + d);
    }
}

template <int Width, int ValueWidth, class Arguments, class Epilogue>
inline void many(Worker& worker, const Arguments& arguments, uint8_t* scratch, Epilogue& epilogue) {
    using Sizes = PanelSizes<Width, ValueWidth>;
    int64_t last = 0;
    for (int64_t b = 0; b < arguments.batch; ++b)
        for (int64_t s = 0; s < arguments.queries; ++s) last = max_of(last, arguments.range(b, s).last);
    float* panels = reinterpret_cast<float*>(scratch);
    lay_out_panels<Width, ValueWidth>(worker, arguments, last, panels);
    const int64_t group = arguments.group(), rows = arguments.rows(), blocks = ceil_div(rows, many_rows);
    for_chunks(worker, arguments.batch * arguments.kv_heads * blocks, [&](int64_t chunk) {
        // Late queries see most keys under a causal mask: those blocks go first.
        const int64_t block = blocks - 1 - chunk % blocks, head = chunk / blocks % arguments.kv_heads;
        const int64_t b = chunk / blocks / arguments.kv_heads;
        const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
        const float* keys = panels + (b * arguments.kv_heads + head) * Sizes::floats(last);
        auto& state = in_worker_memory<ManyState<Width, ValueWidth>>(worker);
        many_run<Width, ValueWidth>(state, arguments, b, head, first, count, keys, keys + Sizes::keys(last), last);
        for (int64_t r = 0; r < count; ++r) {
            float* values = state.values + r * gemm_columns;
            const f32x16 divisor = set1(state.total[r] == 0.0f ? 1.0f : state.total[r]);
            for (int64_t d = 0; d < Sizes::value_width; d += 16) store(values + d, div(load(values + d), divisor));
            epilogue(b, head * group + (first + r) % group, (first + r) / group, static_cast<const float*>(values));
        }
    });
}

IRC_END
