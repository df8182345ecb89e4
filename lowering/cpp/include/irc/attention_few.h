// Attention of few rows, and over pages: dots along the head's width, blocks of keys, the keys split over the workers.
#pragma once

#include "irc/attention_arguments.h"

IRC_BEGIN

constexpr int64_t few_rows = 64, few_keys = 64, least_split = 128;

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

IRC_END
