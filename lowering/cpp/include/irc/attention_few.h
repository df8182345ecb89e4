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
    // Keys, and then values, that were widened; scores of a block of keys.
    alignas(64) float buffer[few_keys * (width > value_width ? width : value_width)];
    alignas(64) float scores[few_rows * few_keys];
};

// Numbers that are read as they lie come from memory: asks for what lies two kilobytes behind `width` numbers of a row, in
// the next rows if they follow each other.
template <int64_t width, class Stored>
IRC_INLINE void prefetch_behind(const Stored* row) {
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(Stored)), ahead = 32 * line;
    if constexpr (!std::is_same_v<Stored, float>)
        for (int64_t i = 0; i < width; i += line) prefetch(row + ahead + i);
}

// Scores of row r against a block of keys, four at a time.
template <class State, class Stored>
IRC_INLINE void score_row(const State& state, int64_t r, const Stored* const* rows, int64_t keys, float* scores) {
    const float* q = state.queries + r * State::width;
    for (int64_t t = 0; t < keys; t += 4) {
        const Stored *k0 = rows[t], *k1 = rows[min_of(t + 1, keys - 1)], *k2 = rows[min_of(t + 2, keys - 1)],
                     *k3 = rows[min_of(t + 3, keys - 1)];
        const Stored* const four[] = {k0, k1, k2, k3};
        for (const Stored* key : four) prefetch_behind<State::width>(key);
        f32x16 a = zero(), b = zero(), c = zero(), d = zero();
        for (int64_t i = 0; i < State::width; i += 16) {
            const f32x16 x = load(q + i);
            a = fma(x, load(k0 + i), a);
            b = fma(x, load(k1 + i), b);
            c = fma(x, load(k2 + i), c);
            d = fma(x, load(k3 + i), d);
        }
        reduce_add(a, b, c, d, scores + t, scores + t + 2);
    }
}

// The same of rows r and r + 1, two keys at a time: as many products with fewer loads.
template <class State, class Stored>
IRC_INLINE void score_two_rows(const State& state, int64_t r, const Stored* const* rows, int64_t keys, float* first,
                               float* second) {
    const float *q = state.queries + r * State::width, *other = q + State::width;
    for (int64_t t = 0; t < keys; t += 2) {
        const Stored *k0 = rows[t], *k1 = rows[min_of(t + 1, keys - 1)];
        f32x16 a = zero(), b = zero(), c = zero(), d = zero();
        for (int64_t i = 0; i < State::width; i += 16) {
            const f32x16 x = load(q + i), y = load(other + i), u = load(k0 + i), v = load(k1 + i);
            a = fma(x, u, a);
            b = fma(x, v, b);
            c = fma(y, u, c);
            d = fma(y, v, d);
        }
        reduce_add(a, b, c, d, first + t, second + t);
    }
}

// Scores [count][few_keys] of a block of keys for all rows of the state, filled with zeros up to whole vectors.
template <class State, class Stored>
inline void score_block(const State& state, int64_t count, const Stored* const* rows, int64_t keys, float* scores) {
    int64_t r = 0;
    for (; r + 2 <= count; r += 2)
        score_two_rows(state, r, rows, keys, scores + r * few_keys, scores + (r + 1) * few_keys);
    if (r < count) score_row(state, r, rows, keys, scores + r * few_keys);
    const int64_t whole = round_up(keys, 16);
    for (r = 0; r < count; ++r)
        for (int64_t t = keys; t < whole; ++t) scores[r * few_keys + t] = 0.0f;
}

// R rows of the state: their values times `decay`, and weights [R][few_keys] times the values [first, last) of a block.
template <int R, class State, class Stored>
IRC_INLINE void add_values(State& state, int64_t r, const float* weights, const float* decay, const Stored* const* rows,
                           int64_t first, int64_t last) {
    // Sums that stay in registers: of 64 entries of one row, or of 32 of two.
    constexpr int64_t vectors = 4 / R, width = State::value_width;
    for (int64_t start = 0; start < width; start += 16 * vectors) {
        f32x16 sums[R][vectors];
        const int64_t count = min_of(vectors, (width - start) / 16);
        float* values = state.values + r * width + start;
        for (int64_t m = 0; m < R; ++m)
            for (int64_t i = 0; i < count; ++i) sums[m][i] = mul(load(values + m * width + 16 * i), set1(decay[m]));
        for (int64_t t = first; t < last; ++t) {
            const Stored* row = rows[t] + start;
            prefetch_behind<16 * vectors>(row);
            for (int64_t i = 0; i < count; ++i) {
                const f32x16 value = load(row + 16 * i);
                for (int64_t m = 0; m < R; ++m)
                    sums[m][i] = fma(set1(weights[m * few_keys + t]), value, sums[m][i]);
            }
        }
        for (int64_t m = 0; m < R; ++m)
            for (int64_t i = 0; i < count; ++i) store(values + m * width + 16 * i, sums[m][i]);
    }
}

// A block of values for all rows of the state, with the weights that `softmax_step` made.
template <class State, class Stored>
inline void value_block(State& state, int64_t count, const float* weights, const float* decay, const Stored* const* rows,
                        int64_t start, int64_t keys) {
    const auto same = [&](int64_t r) {
        return state.range[r].first == state.range[r + 1].first && state.range[r].last == state.range[r + 1].last;
    };
    for (int64_t r = 0; r < count;) {
        const int64_t first = max_of(state.range[r].first - start, 0), last = min_of(state.range[r].last - start, keys);
        if (r + 1 < count && same(r)) {
            add_values<2>(state, r, weights + r * few_keys, decay + r, rows, first, last);
            r += 2;
        } else {
            add_values<1>(state, r, weights + r * few_keys, decay + r, rows, first, last);
            ++r;
        }
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
    // Numbers that more than one pair of rows reads are widened once, values where the keys were.
    constexpr bool floats = sizeof(Stored) == 4, whole = Width % 16 == 0 && ValueWidth % 16 == 0;
    constexpr bool readable = whole && !std::is_same_v<Stored, nibbles>;
    const bool direct = readable && (floats || (count <= 2 && arguments.keys.scales.base == nullptr &&
                                                arguments.values.scales.base == nullptr));
    [[maybe_unused]] float* const buffer = state.buffer;
    float* const scores = state.scores;
    const float* float_rows[few_keys];
    const Stored* stored_rows[few_keys];
    float decay[few_rows];
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
    const auto soften = [&](int64_t start, int64_t keys) {
        const int64_t padded_keys = round_up(keys, 16);
        for (int64_t r = 0; r < count; ++r) {
            float* scores_of = scores + r * few_keys;
            if (arguments.softcap != 0.0f)
                for (int64_t t = 0; t < padded_keys; t += 16) store(scores_of + t, cap_scores(load(scores_of + t), arguments.softcap));
            arguments.bias.add(scores_of, b, head * group + (row + r) % group, (row + r) / group, start, keys);
            decay[r] = softmax_step(scores_of, padded_keys, state.range[r].first - start, min_of(state.range[r].last - start, keys),
                                    state.top[r], state.total[r]);
        }
    };
    for (int64_t start = first; start < last; start += few_keys) {
        const int64_t keys = min_of(few_keys, last - start);
        if constexpr (readable) {
            if (direct) {
                find_rows(arguments.keys, sequence, head, start, keys, stored_rows);
                score_block(state, count, stored_rows, keys, scores);
                soften(start, keys);
                find_rows(arguments.values, sequence, head, start, keys, stored_rows);
                value_block(state, count, scores, decay, stored_rows, start, keys);
                continue;
            }
        }
        if constexpr (!(floats && whole)) {
            gather_rows<Width>(arguments.keys, sequence, head, start, keys, buffer, float_rows);
            score_block(state, count, float_rows, keys, scores);
            soften(start, keys);
            gather_rows<ValueWidth>(arguments.values, sequence, head, start, keys, buffer, float_rows);
            value_block(state, count, scores, decay, float_rows, start, keys);
        }
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
        State& state = in_worker_memory<State>(worker);
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
