// What attention is asked for, and the steps of its softmax that both kernels take.
#pragma once

#include <type_traits>

#include "irc/attention_bias.h"
#include "irc/cache_rows.h"
#include "irc/pool.h"

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

IRC_END
