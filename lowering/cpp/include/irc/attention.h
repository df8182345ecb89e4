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

#include "irc/attention_few.h"
#include "irc/attention_many.h"

IRC_BEGIN

// Rows of a key-value head (queries times group) from which laying keys and values out as panels pays.
constexpr int64_t panels_pay = 32;

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
