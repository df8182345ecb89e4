// Attention with an online softmax in f32: out[b, h, s] = sum over t of softmax(cap(q . k scale))[t] v[t].
//
// What a query at position p sees is always an interval of keys (`visible`), so a mask costs nothing where it cuts whole
// blocks away and a fill of -infinity at the ends of a row elsewhere. Keys outside the interval of all queries that are
// worked on together are never read. A query that sees no key gives 0. `sinks` has one more logit a head that takes
// probability and gives nothing.
//
// Rows: the queries of all heads that share a key-value head are worked on together (row r of a key-value head: query
// r / group, head r % group), so keys and values are read once for the group.
//
// Two kernels. `few` (up to 31 rows, and paged caches): dots along the head's width, blocks of 64 keys; the keys of
// one row block are split over workers where there are fewer blocks than workers can use, and the parts are merged
// (Flash-Decoding). `many` (more rows over contiguous caches): keys and values are laid out once as panels, then the tiles
// of fmatmul.h multiply.
//
// Error of an element, with f32 operands: at most (2 width 2^-24 max|q||k| scale + length 2^-24 + 1e-6) sum p |v|.
//
// The epilogue is called as epilogue(b, h, s, values), values [value width], once for each.
// Sources: Dao 2023, https://arxiv.org/abs/2307.08691; Dao et al. 2023, Flash-Decoding (split over the keys).
#pragma once

#include "irc/attention_bias.h"
#include "irc/cache_rows.h"
#include "irc/fmatmul.h"

IRC_BEGIN

enum class MaskKind { full, causal, sliding, chunked };

struct KeyRange {
    int64_t first, last;
};

// The keys [first, last) of `length` that a query at position p sees.
inline KeyRange visible(MaskKind mask, int64_t window, int64_t p, int64_t length) {
    const int64_t last = mask == MaskKind::full ? length : min_of(length, p + 1);
    int64_t first = 0;
    if (mask == MaskKind::sliding) first = max_of(0, p - window + 1);
    if (mask == MaskKind::chunked && p >= 0) first = p / window * window;
    return {min_of(first, max_of(last, 0)), max_of(last, 0)};
}

template <class Query, class Stored, class Bias = NoBias>
struct AttentionArguments {
    const Query* query;  // [batch, heads, queries, width]
    int64_t query_batch, query_head, query_row;
    CacheRows<Stored> keys, values;
    const int64_t* positions;     // [batch, queries], or nullptr: query s is at length - queries + s
    const int64_t* sequence_ids;  // [queries] of flat tokens (batch is 1), or nullptr: a batch is a sequence
    const float* sinks;           // [heads] or nullptr
    int64_t batch, heads, kv_heads, queries, length;
    MaskKind mask;
    int64_t window;
    float scale, softcap;  // softcap 0: none
    Bias bias = {};        // added behind the soft cap

    int64_t group() const { return heads / kv_heads; }
    int64_t rows() const { return queries * group(); }
    int64_t position(int64_t b, int64_t s) const {
        return positions == nullptr ? length - queries + s : positions[b * queries + s];
    }
    KeyRange range(int64_t b, int64_t s) const { return visible(mask, window, position(b, s), length); }
    int64_t sequence(int64_t b, int64_t s) const { return sequence_ids == nullptr ? b : sequence_ids[s]; }
};

constexpr int64_t few_rows = 64, few_keys = 64, least_split = 128;
constexpr int64_t many_rows = 96, many_keys = gemm_columns;
// Rows of a key-value head (queries times group) from which laying keys and values out as panels pays.
constexpr int64_t panels_pay = 32;

IRC_INLINE constexpr float minus_infinity() { return -__builtin_inff(); }

// Scores of a row of keys, already scaled, become weights; the running maximum and sum are brought up to date. Returns
// what the values summed so far have to be multiplied with. `count` is a multiple of 16; entries outside [first, last)
// are not seen.
inline float softmax_step(float* scores, int64_t count, int64_t first, int64_t last, float& top, float& total) {
    for (int64_t t = 0; t < min_of(first, count); ++t) scores[t] = minus_infinity();
    for (int64_t t = max_of(last, 0); t < count; ++t) scores[t] = minus_infinity();
    f32x16 largest = set1(top);
    for (int64_t t = 0; t < count; t += 16) largest = max(largest, load(scores + t));
    const float next = reduce_max(largest), shift = next == minus_infinity() ? 0.0f : next;
    f32x16 sum = zero();
    for (int64_t t = 0; t < count; t += 16) {
        const f32x16 weight = exp(sub(load(scores + t), set1(shift)));
        store(scores + t, weight);
        sum = add(sum, weight);
    }
    const float decay = top == next ? 1.0f : std::exp(top - shift);
    total = total * decay + reduce_add(sum);
    top = next;
    return decay;
}

IRC_INLINE f32x16 cap_scores(f32x16 scores, float softcap) {
    return softcap == 0.0f ? scores : mul(set1(softcap), tanh(div(scores, set1(softcap))));
}

// State of up to few_rows rows: queries, running maxima, sums, weighted values.
template <int Width, int ValueWidth>
struct RowState {
    static constexpr int64_t width = padded(Width), value_width = padded(ValueWidth);
    alignas(64) float queries[few_rows * width];
    alignas(64) float values[few_rows * value_width];
    float top[few_rows], total[few_rows];
    KeyRange range[few_rows];
};

// One block of keys for rows [0, count) of the state. key_rows and value_rows: pointers to rows of whole vectors.
// bias(r, scores) adds to the scores of row r.
template <class State, class AddBias>
inline void few_block(State& state, int64_t count, const float* const* key_rows, const float* const* value_rows,
                      int64_t start, int64_t keys, float softcap, const AddBias& bias) {
    constexpr int64_t width = State::width, value_width = State::value_width;
    alignas(64) float scores[few_rows * few_keys];
    for (int64_t t = 0; t < keys; t += 4) {
        const float *k0 = key_rows[t], *k1 = key_rows[min_of(t + 1, keys - 1)], *k2 = key_rows[min_of(t + 2, keys - 1)],
                    *k3 = key_rows[min_of(t + 3, keys - 1)];
        for (int64_t r = 0; r < count; ++r) {
            const float* q = state.queries + r * width;
            f32x16 a = zero(), b = zero(), c = zero(), d = zero();
            for (int64_t i = 0; i < width; i += 16) {
                const f32x16 x = load(q + i);
                a = fma(x, load(k0 + i), a);
                b = fma(x, load(k1 + i), b);
                c = fma(x, load(k2 + i), c);
                d = fma(x, load(k3 + i), d);
            }
            reduce_add(a, b, c, d, scores + r * few_keys + t);
        }
    }
    const int64_t whole = round_up(keys, 16);
    for (int64_t r = 0; r < count; ++r) {
        float* row = scores + r * few_keys;
        for (int64_t t = round_up(keys, 4); t < whole; ++t) row[t] = 0.0f;
        if (softcap != 0.0f)
            for (int64_t t = 0; t < whole; t += 16) store(row + t, cap_scores(load(row + t), softcap));
        bias(r, row);
        const int64_t first = state.range[r].first - start, last = min_of(state.range[r].last - start, keys);
        const float decay = softmax_step(row, whole, first, last, state.top[r], state.total[r]);
        f32x16 sums[value_width / 16];
        float* values = state.values + r * value_width;
        for (int64_t i = 0; i < value_width / 16; ++i) sums[i] = mul(load(values + 16 * i), set1(decay));
        for (int64_t t = max_of(first, 0); t < last; ++t) {
            const f32x16 weight = set1(row[t]);
            for (int64_t i = 0; i < value_width / 16; ++i) sums[i] = fma(weight, load(value_rows[t] + 16 * i), sums[i]);
        }
        for (int64_t i = 0; i < value_width / 16; ++i) store(values + 16 * i, sums[i]);
    }
}

// How the rows of all key-value heads are cut for `few`.
struct FewPlan {
    int64_t row_blocks, units, first, keys_a_split, splits;

    template <class Arguments>
    FewPlan(const Arguments& arguments, int workers) {
        // Flat tokens are cut at whole tokens, as each has its own keys.
        const int64_t group = arguments.group();
        per_block = group >= few_rows ? few_rows : few_rows / group * group;
        row_blocks = ceil_div(arguments.rows(), per_block);
        units = arguments.batch * arguments.kv_heads * row_blocks;
        first = arguments.length;
        int64_t last = 0;
        for (int64_t b = 0; b < arguments.batch; ++b)
            for (int64_t s = 0; s < arguments.queries; ++s) {
                const KeyRange range = arguments.range(b, s);
                if (range.first == range.last) continue;
                first = min_of(first, range.first);
                last = max_of(last, range.last);
            }
        first = min_of(first, last);
        splits = most_splits(units, last - first, workers);
        keys_a_split = max_of(few_keys, round_up(ceil_div(last - first, splits), few_keys));
    }
    static int64_t most_splits(int64_t units, int64_t keys, int workers) {
        return max_of(1, min_of(keys / least_split, units >= 4 * workers ? 1 : ceil_div(4 * workers, units)));
    }
    int64_t per_block;
};

// Rows [row, row + count) of a key-value head against keys [first, last) of one sequence.
template <class State, int Width, int ValueWidth, class Arguments>
inline void few_run(State& state, const Arguments& arguments, int64_t b, int64_t head, int64_t row, int64_t count,
                    KeyRange keys) {
    using Stored = std::remove_cv_t<std::remove_pointer_t<decltype(arguments.keys.base)>>;
    constexpr bool copied = sizeof(Stored) != 4 || Width % 16 != 0 || ValueWidth % 16 != 0;
    constexpr int64_t buffered = copied ? few_keys : 1;
    alignas(64) float key_buffer[buffered * State::width], value_buffer[buffered * State::value_width];
    const float *key_rows[few_keys], *value_rows[few_keys];
    const int64_t group = arguments.group(), sequence = arguments.sequence(b, row / group);
    int64_t first = keys.last, last = keys.first;
    for (int64_t r = 0; r < count; ++r) {
        const int64_t s = (row + r) / group, h = head * group + (row + r) % group;
        copy_row<Width>(state.queries + r * State::width,
                        arguments.query + b * arguments.query_batch + h * arguments.query_head + s * arguments.query_row,
                        arguments.scale);
        for (int64_t i = 0; i < State::value_width; i += 16) store(state.values + r * State::value_width + i, zero());
        // The sink counts once: in the part with the first keys.
        const bool sink = arguments.sinks != nullptr && keys.first == 0;
        state.top[r] = sink ? arguments.sinks[h] : minus_infinity();
        state.total[r] = sink ? 1.0f : 0.0f;
        const KeyRange range = arguments.range(b, s);
        state.range[r] = range;
        first = min_of(first, max_of(range.first, keys.first));
        last = max_of(last, min_of(range.last, keys.last));
    }
    for (int64_t start = first; start < last; start += few_keys) {
        const int64_t length = min_of(few_keys, last - start);
        gather_rows<Width>(arguments.keys, sequence, head, start, length, key_buffer, key_rows);
        gather_rows<ValueWidth>(arguments.values, sequence, head, start, length, value_buffer, value_rows);
        const auto bias = [&](int64_t r, float* scores) {
            arguments.bias.add(scores, b, head * group + (row + r) % group, (row + r) / group, start, length);
        };
        few_block(state, count, key_rows, value_rows, start, length, arguments.softcap, bias);
    }
}

template <int Width, int ValueWidth, class Arguments, class Epilogue>
inline void few(Worker& worker, const Arguments& arguments, uint8_t* scratch, Epilogue& epilogue) {
    using State = RowState<Width, ValueWidth>;
    constexpr int64_t part = State::value_width + 16;  // values, then maximum and sum
    const FewPlan plan(arguments, worker.count);
    const int64_t group = arguments.group(), rows = arguments.rows();
    float* parts = reinterpret_cast<float*>(scratch);
    const auto finish = [&](int64_t b, int64_t head, int64_t row, float* values, float total) {
        const f32x16 divisor = set1(total == 0.0f ? 1.0f : total);
        for (int64_t i = 0; i < State::value_width; i += 16) store(values + i, div(load(values + i), divisor));
        epilogue(b, head * group + row % group, row / group, static_cast<const float*>(values));
    };
    for_chunks(worker, plan.units * plan.splits, [&](int64_t chunk) {
        const int64_t split = chunk % plan.splits, unit = chunk / plan.splits, block = unit % plan.row_blocks;
        const int64_t head = unit / plan.row_blocks % arguments.kv_heads;
        const int64_t b = unit / plan.row_blocks / arguments.kv_heads;
        const int64_t end = min_of(rows, (block + 1) * plan.per_block);
        // Everything before the first key that any query sees belongs to the first part.
        // As parts are whole blocks of keys, the last ones may be empty.
        const int64_t first = min_of(arguments.length, plan.first + split * plan.keys_a_split);
        const int64_t last = split + 1 == plan.splits ? arguments.length : first + plan.keys_a_split;
        const KeyRange keys{split == 0 ? 0 : first, min_of(arguments.length, last)};
        State state;
        for (int64_t row = block * plan.per_block; row < end;) {
            int64_t count = end - row;
            if (arguments.sequence_ids != nullptr) {
                const int64_t id = arguments.sequence_ids[row / group];
                int64_t next = row / group + 1;
                while (next * group < end && arguments.sequence_ids[next] == id) ++next;
                count = min_of(count, next * group - row);
            }
            few_run<State, Width, ValueWidth>(state, arguments, b, head, row, count, keys);
            for (int64_t r = 0; r < count; ++r) {
                float* values = state.values + r * State::value_width;
                if (plan.splits == 1) {
                    finish(b, head, row + r, values, state.total[r]);
                    continue;
                }
                float* to = parts + (((b * arguments.kv_heads + head) * rows + row + r) * plan.splits + split) * part;
                std::memcpy(to, values, State::value_width * sizeof(float));
                to[State::value_width] = state.top[r];
                to[State::value_width + 1] = state.total[r];
            }
            row += count;
        }
    });
    if (plan.splits == 1) return;
    worker.barrier();
    for_chunks(worker, arguments.batch * arguments.kv_heads * rows, [&](int64_t index) {
        const float* from = parts + index * plan.splits * part;
        float top = minus_infinity(), total = 0.0f;
        for (int64_t i = 0; i < plan.splits; ++i) {
            const float other = from[i * part + State::value_width];
            top = other > top ? other : top;
        }
        alignas(64) float values[State::value_width] = {};
        for (int64_t i = 0; i < plan.splits; ++i) {
            const float other = from[i * part + State::value_width];
            if (other == minus_infinity() && from[i * part + State::value_width + 1] == 0.0f) continue;
            const float decay = std::exp(other - top);
            total += decay * from[i * part + State::value_width + 1];
            for (int64_t d = 0; d < State::value_width; d += 16)
                store(values + d, fma(set1(decay), load(from + i * part + d), load(values + d)));
        }
        finish(index / rows / arguments.kv_heads, index / rows % arguments.kv_heads, index % rows, values, total);
    });
}

// Keys and values of all sequences as f32 panels: keys [length / 16][width][16], values [value width / 16][length][16].
template <int Width, int ValueWidth>
struct PanelSizes {
    static constexpr int64_t value_width = padded(ValueWidth);
    static int64_t keys(int64_t length) { return padded(length) * Width; }
    static int64_t values(int64_t length) { return padded(length) * value_width; }
    static int64_t floats(int64_t length) { return keys(length) + values(length); }
};

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
        alignas(64) float row[padded(Width > ValueWidth ? Width : ValueWidth)];
        for (int64_t t = 0; t < 16; ++t) {
            if (t < count) arguments.keys.template copy<Width>(row, b, head, 16 * group + t);
            for (int64_t d = 0; d < Width; ++d) keys[d * 16 + t] = t < count ? row[d] : 0.0f;
            if (t < count) arguments.values.template copy<ValueWidth>(row, b, head, 16 * group + t);
            for (int64_t d = 0; d < Sizes::value_width; d += 16)
                store(values + d / 16 * padded(last) * 16 + t * 16, t < count ? load(row + d) : zero());
        }
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
        ManyState<Width, ValueWidth> state;
        many_run<Width, ValueWidth>(state, arguments, b, head, first, count, keys, keys + Sizes::keys(last), last);
        for (int64_t r = 0; r < count; ++r) {
            float* values = state.values + r * gemm_columns;
            const f32x16 divisor = set1(state.total[r] == 0.0f ? 1.0f : state.total[r]);
            for (int64_t d = 0; d < Sizes::value_width; d += 16) store(values + d, div(load(values + d), divisor));
            epilogue(b, head * group + (first + r) % group, (first + r) / group, static_cast<const float*>(values));
        }
    });
}

IRC_INLINE bool takes_many(int64_t width, int64_t value_width, int64_t rows, bool paged) {
    return !paged && rows >= panels_pay && width <= gemm_depth && value_width <= gemm_columns;
}

// Bytes of scratch for both kernels.
inline int64_t attention_scratch(int64_t width, int64_t value_width, int64_t batch, int64_t heads, int64_t kv_heads,
                                 int64_t queries, int64_t length, bool paged, int workers) {
    if (takes_many(width, value_width, queries * (heads / kv_heads), paged))
        return batch * kv_heads * padded(length) * (width + padded(value_width)) * 4;
    const int64_t group = heads / kv_heads, per_block = group >= few_rows ? few_rows : few_rows / group * group;
    const int64_t units = batch * kv_heads * ceil_div(queries * group, per_block);
    const int64_t splits = FewPlan::most_splits(units, length, workers);
    return splits == 1 ? 0 : batch * heads * queries * splits * (padded(value_width) + 16) * 4;
}

// All workers call it; results are complete after the next barrier.
template <int Width, int ValueWidth, class Arguments, class Epilogue>
inline void attention(Worker& worker, const Arguments& arguments, uint8_t* scratch, Epilogue&& epilogue) {
    const bool paged = arguments.keys.table != nullptr || arguments.sequence_ids != nullptr;
    if constexpr (Width <= gemm_depth && ValueWidth <= gemm_columns) {
        if (takes_many(Width, ValueWidth, arguments.rows(), paged)) {
            many<Width, ValueWidth>(worker, arguments, scratch, epilogue);
            return;
        }
    }
    few<Width, ValueWidth>(worker, arguments, scratch, epilogue);
}

IRC_END
