// Linear layers over float weights: the product of fmatmul.h for few rows, that of conv.h, which gathers each block of
// rows once for 256 columns, for many. The epilogue gets up to 128 columns.
#pragma once

#include "irc/conv.h"

IRC_BEGIN

constexpr int64_t gather_pays = 24;

template <class Stored, class Input, class Epilogue>
inline void float_linear(Worker& worker, const Input* x, int64_t stride, const uint8_t* packed, int64_t num_rows,
                         int64_t num_columns, int64_t size, uint8_t* scratch, Epilogue&& epilogue) {
#if defined(IRC_AVX512)
    constexpr bool pairs = std::is_same_v<Input, bf16> && std::is_same_v<Stored, bf16>;  // vdpbf16ps is faster
#else
    constexpr bool pairs = false;
#endif
    if constexpr (!FloatPanel<Stored>::scaled && !pairs) {
        if (num_rows >= gather_pays && stride == size) {
            const ConvShape shape{num_rows, size, 1, 1, num_columns, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1};
            conv_rows(worker, shape, FloatProduct<Stored>{}, x, packed, epilogue);
            return;
        }
    }
    float_matmul<Stored>(worker, x, stride, packed, num_rows, num_columns, size, scratch, epilogue);
}

IRC_END
