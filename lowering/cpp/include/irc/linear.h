// Linear layers over float weights: the product of fmatmul.h for few rows, that of linear_rows.h, which packs each block of
// rows, for many. The epilogue gets up to 128 columns.
#pragma once

#include "irc/linear_rows.h"

IRC_BEGIN

constexpr int64_t packing_pays = 24;

template <class Stored, class Input, class Epilogue>
inline void float_linear(Worker& worker, const Input* x, int64_t stride, const uint8_t* packed, int64_t num_rows,
                         int64_t num_columns, int64_t size, uint8_t* scratch, Epilogue&& epilogue) {
#if defined(IRC_AVX512)
    constexpr bool pairs = std::is_same_v<Input, bf16> && std::is_same_v<Stored, bf16>;  // vdpbf16ps is faster
#else
    constexpr bool pairs = false;
#endif
    if constexpr (!pairs) {
        if (num_rows >= packing_pays) {
            linear_rows_product(worker, FloatProduct<Stored>{}, x, stride, packed, num_rows, num_columns, size, epilogue);
            return;
        }
    }
    float_matmul<Stored>(worker, x, stride, packed, num_rows, num_columns, size, scratch, epilogue);
}

IRC_END
