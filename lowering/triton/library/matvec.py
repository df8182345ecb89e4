"""Products of a weight with a single row, limited by the memory that the weight is read from: one row in decoding.

    m, n = matmul.tile_of(tl.program_id(0), M, 2048, 1, BN)
    acc = matvec.integer_vector(x, weight, scale, None, m, n, M, 2048, 2048, 2048, 4, True, 32, BK)

A block computes BN results of a row by reading BN rows of the weight, BK columns at a time, each byte once and 16 bytes
a thread; threads sum over their part of K, and add up at the end. The weight goes from memory to registers, and enough
bytes are in flight because a thread asks for all its loads of a step, and several blocks share a multiprocessor.

Arguments and results are those of `matmul`, with m [1, 1] and acc [1, BN]. ROUND rounds each weight to the type of x,
as the program does; without it the scale is applied to sums over groups, which is nearer to the real product and takes
half of the instructions.

Inside, K is cut into units, the 16 bytes that a thread loads at once (a group, if that is shorter). The weight is
loaded last: the compiler then lays out everything else like it, and converts x instead, which is smaller.
"""

from __future__ import annotations

import triton
import triton.language as tl

from irc.lowering.triton.library.dequantize import (
    fields_of,
    load_packed,
    load_scales,
    magic_bits,
    rounded,
    rows_of,
    unpack,
)


@triton.jit
def _load_x(x, m, start, K, x_stride, BK: tl.constexpr, UNITS: tl.constexpr, EVEN: tl.constexpr):
    """f32[1, UNITS, BK / UNITS]: the row of x from k = `start`; 0 beyond K."""
    at = start + tl.arange(0, BK)[None, :]
    pointers = x + m.to(tl.int64) * x_stride + at
    if EVEN:
        row = tl.load(pointers)
    else:
        row = tl.load(pointers, mask=at < K, other=0.0)
    return tl.reshape(row, (1, UNITS, BK // UNITS)).to(tl.float32)


@triton.jit
def _for_units(values, UNITS: tl.constexpr):
    """[BN, scales] → [BN, UNITS]: each number for all units of its group."""
    BN: tl.constexpr = values.shape[0]
    COUNT: tl.constexpr = values.shape[1]
    return tl.reshape(tl.broadcast_to(values[:, :, None], (BN, COUNT, UNITS // COUNT)), (BN, UNITS))


@triton.jit
def _unit_sums(
    packed,
    magic,
    scales,
    zeros,
    a,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    FIELDS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """f32[BN, UNITS]: Σ over each unit of (integer - zero) · scale · x. a: f32[1, UNITS, U]."""
    BN: tl.constexpr = packed.shape[0]
    UNITS: tl.constexpr = a.shape[1]
    integers = tl.reshape(unpack(packed, magic, BITS, FIELDS, SIGNED), (BN, UNITS, a.shape[2]))
    if zeros is not None:
        integers = integers - _for_units(zeros, UNITS)[:, :, None]
    factors = _for_units(scales, UNITS)
    if ROUND:
        sums = tl.sum(rounded(integers * factors[:, :, None], DTYPE) * a, axis=2)
    else:
        sums = tl.sum(integers * a, axis=2) * factors
    return sums


@triton.jit
def float_vector(x, weight, m, n, M, N, K: tl.constexpr, x_stride, BK: tl.constexpr, STAGES: tl.constexpr):
    """f32[1, BN] for a weight [N, K] of f32, f16 or bf16."""
    BN: tl.constexpr = n.shape[1]
    UNITS: tl.constexpr = BK * weight.dtype.element_ty.primitive_bitwidth // 128
    w_rows = weight + rows_of(n, N)[:, None].to(tl.int64) * K
    acc = tl.zeros((BN, UNITS), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        a = _load_x(x, m, start, K, x_stride, BK, UNITS, K % BK == 0)
        at = start + tl.arange(0, BK)[None, :]
        if K % BK == 0:
            w = tl.load(w_rows + at)
        else:
            w = tl.load(w_rows + at, mask=at < K, other=0.0)
        acc += tl.sum(tl.reshape(w, (BN, UNITS, BK // UNITS)).to(tl.float32) * a, axis=2)
    return tl.sum(acc, axis=1)[None, :]


@triton.jit
def integer_vector(
    x,
    weight,
    scale,
    zero,
    m,
    n,
    M,
    N,
    K: tl.constexpr,
    x_stride,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    ROUND: tl.constexpr = False,
):
    """f32[1, BN] for a weight of integers of 8 or 4 bits. GROUP: K, or a power of two of a word's integers or more."""
    FIELDS: tl.constexpr = fields_of(K, BITS)
    UNITS: tl.constexpr = BK // min(128 // BITS, BK if GROUP == K else GROUP)
    DTYPE: tl.constexpr = x.dtype.element_ty
    tl.static_assert(GROUP == K or (GROUP & (GROUP - 1) == 0 and GROUP >= FIELDS), "groups do not consist of words")
    rows, magic = rows_of(n, N), magic_bits(weight)
    row_zeros = None
    if GROUP == K:
        row_scales = load_scales(scale, rows, 0, K, GROUP, BK, FIELDS)
        if zero is not None:
            row_zeros = load_scales(zero, rows, 0, K, GROUP, BK, FIELDS)
    acc = tl.zeros((n.shape[1], UNITS), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        a = _load_x(x, m, start, K, x_stride, BK, UNITS, K % BK == 0)
        if GROUP == K:
            packed = load_packed(weight, rows, start, K, BK, BITS)
            acc += _unit_sums(packed, magic, row_scales, row_zeros, a, BITS, SIGNED, FIELDS, DTYPE, ROUND)
        else:
            scales = load_scales(scale, rows, start, K, GROUP, BK, FIELDS)
            zeros = None
            if zero is not None:
                zeros = load_scales(zero, rows, start, K, GROUP, BK, FIELDS)
            packed = load_packed(weight, rows, start, K, BK, BITS)
            acc += _unit_sums(packed, magic, scales, zeros, a, BITS, SIGNED, FIELDS, DTYPE, ROUND)
    return tl.sum(acc, axis=1)[None, :]
