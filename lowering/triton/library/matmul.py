"""Tiles of matrix products: acc f32[BM, BN] = x[m, :] · w[n, :]ᵀ, for printed kernels to run an epilogue on.

    m, n = matmul.tile_of(tl.program_id(0), M, 2048, BM, BN)
    acc = matmul.integer_tile(x, weight, scale, None, m, n, M, 2048, 2048, 2048, 4, True, 32, BK, SPLIT)

Shapes: x: [M, K] f32|f16|bf16, rows `x_stride` elements apart; weight: [N, K] as the program holds it (see
`dequantize`); m: [BM, 1] and n: [1, BN] indices, which may exceed M and N: what is computed there is discarded by the
caller's mask. K, GROUP and the tile's sizes are constexpr, M may change at run time.

SPLIT cuts the K of a tile into that many parts that different warps multiply, and adds the parts at the end. For few
rows: tiles are then so small that without it all warps would share the columns of a single instruction.

Products of f32 use three tf32 products each (PRECISION), which keeps them near f32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from irc.lowering.triton.library.dequantize import fields_of, load_scales, load_weights, rows_of

# A default that is a plain string is not taken for a constexpr by triton 3.6.
TF32X3 = tl.constexpr("tf32x3")


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, HEIGHT: tl.constexpr = 8):
    """Indices (m [BM, 1], n [1, BN]) of tile `pid` of cdiv(M, BM) · cdiv(N, BN).

    Tiles run down HEIGHT row blocks before the next column, so that those computed at the same time read few
    different rows of x and of w, which then come from the L2 cache.
    """
    blocks_m = tl.cdiv(M, BM)
    blocks_n = tl.cdiv(N, BN)
    band = pid // (HEIGHT * blocks_n)
    within = pid % (HEIGHT * blocks_n)
    height = tl.minimum(blocks_m - band * HEIGHT, HEIGHT)
    m = (band * HEIGHT + within % height) * BM + tl.arange(0, BM)
    n = (within // height) * BN + tl.arange(0, BN)
    return m[:, None], n[None, :]


@triton.jit
def activations(x, m, M, start, K, x_stride, BK: tl.constexpr, EVEN: tl.constexpr):
    """[BM, BK]: rows of x from k = `start`; 0 beyond M and (unless EVEN: BK divides K) beyond K."""
    at = start + tl.arange(0, BK)
    mask = m < M
    if not EVEN:
        mask = mask & (at < K)[None, :]
    return tl.load(x + m.to(tl.int64) * x_stride + at[None, :], mask=mask, other=0.0)


@triton.jit
def empty_sum(BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr):
    """Zeros to accumulate into: f32[BM, BN], or [SPLIT, BM, BN] for more than one part."""
    if SPLIT == 1:
        acc = tl.zeros((BM, BN), tl.float32)
    else:
        acc = tl.zeros((SPLIT, BM, BN), tl.float32)
    return acc


@triton.jit
def add_product(acc, a, w, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a · wᵀ. a: [BM, BK]; w: [BN, BK]; acc from `empty_sum`."""
    BM: tl.constexpr = a.shape[0]
    BN: tl.constexpr = w.shape[0]
    BK: tl.constexpr = a.shape[1]
    if SPLIT == 1:
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
    else:
        parts_a = tl.permute(tl.reshape(a, (BM, SPLIT, BK // SPLIT)), (1, 0, 2))
        parts_w = tl.permute(tl.reshape(w, (BN, SPLIT, BK // SPLIT)), (1, 2, 0))
        acc = tl.dot(parts_a, parts_w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def whole_sum(acc, SPLIT: tl.constexpr):
    """f32[BM, BN]: the parts of `empty_sum` added."""
    if SPLIT != 1:
        acc = tl.sum(acc, axis=0)
    return acc


@triton.jit
def float_tile(
    x,
    weight,
    m,
    n,
    M,
    N,
    K: tl.constexpr,
    x_stride,
    BK: tl.constexpr,
    SPLIT: tl.constexpr = 1,
    PRECISION: tl.constexpr = TF32X3,
):
    """f32[BM, BN] for a weight [N, K] of f32, f16 or bf16."""
    acc = empty_sum(m.shape[0], n.shape[1], SPLIT)
    rows = rows_of(n, N)
    at = tl.arange(0, BK)
    pointers = weight + rows[:, None].to(tl.int64) * K + at[None, :]
    for start in range(0, K, BK):
        a = activations(x, m, M, start, K, x_stride, BK, K % BK == 0)
        if K % BK == 0:
            w = tl.load(pointers + start)
        else:
            w = tl.load(pointers + start, mask=(start + at < K)[None, :], other=0.0)
        acc = add_product(acc, a, w.to(a.dtype), SPLIT, PRECISION)
    return whole_sum(acc, SPLIT)


@triton.jit
def integer_tile(
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
    SPLIT: tl.constexpr = 1,
    PRECISION: tl.constexpr = TF32X3,
):
    """f32[BM, BN] for a weight of integers of 8 bits, or of 4, with a scale (and unless None a zero point) a group."""
    FIELDS: tl.constexpr = fields_of(K, BITS)
    acc = empty_sum(m.shape[0], n.shape[1], SPLIT)
    rows = rows_of(n, N)
    zeros = None
    if GROUP == K:
        scales = load_scales(scale, rows, 0, K, GROUP, BK, FIELDS)
        if zero is not None:
            zeros = load_scales(zero, rows, 0, K, GROUP, BK, FIELDS)
    for start in range(0, K, BK):
        a = activations(x, m, M, start, K, x_stride, BK, K % BK == 0)
        if GROUP == K:
            w = load_weights(weight, scales, zeros, rows, start, K, BITS, SIGNED, BK, a.dtype)
        else:
            group_scales = load_scales(scale, rows, start, K, GROUP, BK, FIELDS)
            group_zeros = None
            if zero is not None:
                group_zeros = load_scales(zero, rows, start, K, GROUP, BK, FIELDS)
            w = load_weights(weight, group_scales, group_zeros, rows, start, K, BITS, SIGNED, BK, a.dtype)
        acc = add_product(acc, a, w, SPLIT, PRECISION)
    return whole_sum(acc, SPLIT)


@triton.jit
def strided_tile(
    a,
    b,
    m,
    n,
    M,
    N,
    K,
    a_row,
    a_depth,
    b_depth,
    b_column,
    BK: tl.constexpr,
    PRECISION: tl.constexpr = TF32X3,
):
    """f32[BM, BN] of a [M, K] · b [K, N], both by strides (in elements), K at run time or constexpr.

    For products of two activations; the caller adds the offset of the batch to the pointers.
    """
    acc = tl.zeros((m.shape[0], n.shape[1]), tl.float32)
    at = tl.arange(0, BK)
    rows = a + m.to(tl.int64) * a_row
    columns = b + n.to(tl.int64) * b_column
    for start in range(0, K, BK):
        k = start + at
        left = tl.load(rows + k[None, :].to(tl.int64) * a_depth, mask=(m < M) & (k < K)[None, :], other=0.0)
        right = tl.load(columns + k[:, None].to(tl.int64) * b_depth, mask=(k < K)[:, None] & (n < N), other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc
