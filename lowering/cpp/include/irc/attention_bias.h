// What attention adds to its scores: nothing, numbers, or bool (false: minus infinity).
#pragma once

#include "irc/f32x16.h"

IRC_BEGIN

struct NoBias {
    void add(float*, int64_t, int64_t, int64_t, int64_t, int64_t) const {}
};

// [batch, heads, queries, keys] in any strides; 0 where one number serves all. Keys behind the last one, of which a page
// may have some, belong to no position: nothing is read or added there.
template <class Stored>
struct BiasRows {
    const Stored* base;
    int64_t stride_batch, stride_head, stride_row, stride_key, keys;

    // To the scores of keys [first, first + count).
    void add(float* scores, int64_t b, int64_t h, int64_t s, int64_t first, int64_t count) const {
        const Stored* row = base + b * stride_batch + h * stride_head + s * stride_row + first * stride_key;
        const int64_t known = min_of(count, keys - first);
        for (int64_t t = 0; t < known; ++t) {
            const Stored one = row[t * stride_key];
            if constexpr (std::is_same_v<Stored, bool>)
                scores[t] = one ? scores[t] : -__builtin_inff();
            else
                scores[t] += to_float(one);
        }
    }
};

IRC_END
