"""Integers with a scale → numbers: the part of the matrix products that reads quantized weights.

A weight [N, K] lies in memory as the program holds it: int8 or uint8 [N, K], or 4 bits two to a byte, uint8 [N, K / 2]
(even k in the low nibble; signed formats store the value + 8), with a scale per group [N, K / GROUP], and an integer
zero point per group if the format is asymmetric. One scale a row is GROUP = K. Numbers are those of `irc::dequantize`:
(integer - zero point) · scale in f32, rounded once to the layer's type.

Rows are read as words of 32 bits where they consist of whole words, else as bytes. Offsets of rows are 64-bit: the
weight of a large vocabulary has more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 2^23 in f32: an integer below 2^23 put into the lowest bits of its pattern makes the float 2^23 + integer.
_MAGIC_BITS = tl.constexpr(0x4B000000)
_MAGIC = tl.constexpr(8388608.0)
_FLIP_WORD = tl.constexpr(-0x7F7F7F80)  # 0x80808080


@triton.constexpr_function
def fields_of(K: int, BITS: int) -> int:
    """Integers of BITS bits in each number that is loaded: a word if rows consist of whole words, else a byte."""
    return 32 // BITS if K % (32 // BITS) == 0 else 8 // BITS


@triton.constexpr_function
def scales_of(K: int, GROUP: int, BK: int, FIELDS: int) -> int:
    """Number of scales that BK numbers of a row need, in a tile that starts at a multiple of BK.

    One where a group holds the whole tile; BK / GROUP where groups and tiles nest; else one for every loaded number
    (or, where a word spans groups, for every integer): right for any group, and slow.
    """
    if GROUP >= K or GROUP % BK == 0:
        return 1
    if BK % GROUP == 0:
        return BK // GROUP
    return BK // FIELDS if GROUP % FIELDS == 0 else BK


@triton.jit
def rows_of(n, N):
    """[BN]: rows of a weight, kept below N so that they need no mask. n: [1, BN]."""
    return tl.minimum(tl.reshape(n, (n.shape[1],)), N - 1)


@triton.jit
def magic_bits(weight):
    """The bits of 2^23, as a number that the compiler does not know: (word & mask) | bits is then one instruction.

    With two constants it is two, and for 4 bits at the speed of memory that is a fifth of all. No address has the
    highest bits set.
    """
    return _MAGIC_BITS + (weight.to(tl.int64) >> 62).to(tl.int32)


@triton.jit
def load_packed(weight, rows, start, K: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr):
    """int32[BN, BK / fields]: the stored integers of the rows from k = `start`, as words or bytes; 0 beyond K."""
    FIELDS: tl.constexpr = fields_of(K, BITS)
    WIDTH: tl.constexpr = K // FIELDS
    if FIELDS * BITS == 32:
        words = weight.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        words = weight.to(tl.pointer_type(tl.uint8), bitcast=True)
    at = start // FIELDS + tl.arange(0, BK // FIELDS)
    pointers = words + rows[:, None].to(tl.int64) * WIDTH + at[None, :]
    if K % BK == 0:
        packed = tl.load(pointers)
    else:
        packed = tl.load(pointers, mask=(at < WIDTH)[None, :], other=0)
    return packed.to(tl.int32)


@triton.jit
def unpack(packed, magic, BITS: tl.constexpr, FIELDS: tl.constexpr, SIGNED: tl.constexpr):
    """int32[R, W] → f32[R, W · FIELDS]: the integers, in the order of k. Exact. magic: from `magic_bits`.

    A field is not shifted down but masked where it stands, into the mantissa of 2^23, and scaled while that is
    subtracted: one logical instruction and one multiply-add each, and a shift for the upper half of a word. Integer to
    float conversions run at a quarter of that speed.
    """
    R: tl.constexpr = packed.shape[0]
    W: tl.constexpr = packed.shape[1]
    PLACES: tl.constexpr = min(FIELDS, 16 // BITS)
    OFFSET: tl.constexpr = (1 << (BITS - 1)) if SIGNED else 0
    if SIGNED and BITS == 8:  # two's complement: flipping the sign bit adds 128
        packed = packed ^ (_FLIP_WORD if FIELDS == 4 else 0x80)
    field = tl.reshape(tl.arange(0, FIELDS), (1, 1, FIELDS))
    shift = field % PLACES * BITS
    halves = tl.reshape(packed, (R, W, 1)) >> (field // PLACES * 16)
    shifted = ((halves & (((1 << BITS) - 1) << shift)) | magic).to(tl.float32, bitcast=True)
    unit = ((127 - shift) << 23).to(tl.float32, bitcast=True)  # 2^-shift
    return tl.reshape(shifted * unit - (_MAGIC * unit + OFFSET), (R, W * FIELDS))


@triton.constexpr_function
def scales_in_word(K: int, GROUP: int, BK: int, COUNT: int, BITS: int) -> int:
    """How many scales (or zero points) of BITS bits are loaded as one word: 1 where words and tiles do not fit."""
    per_word = 32 // BITS
    nested = BK % GROUP == 0 or GROUP % BK == 0
    return per_word if nested and K // GROUP % per_word == 0 and (COUNT == 1 or COUNT % per_word == 0) else 1


@triton.jit
def _from_bits(bits, DTYPE: tl.constexpr):
    """The numbers of type DTYPE (8 or 16 bits) in the low bits of words, as f32."""
    if DTYPE.primitive_bitwidth == 16:
        numbers = bits.to(tl.int16).to(DTYPE, bitcast=True)
    else:
        numbers = bits.to(DTYPE)
    return numbers.to(tl.float32)


@triton.jit
def load_scales(values, rows, start, K: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, FIELDS: tl.constexpr):
    """f32[BN, scales]: scales or zero points of the rows from k = `start`. values: [N, K / GROUP]; rows: [BN].

    In words of 32 bits where possible: the compiler copies nothing smaller ahead of its use.
    """
    DTYPE: tl.constexpr = values.dtype.element_ty
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth
    BN: tl.constexpr = rows.shape[0]
    COUNT: tl.constexpr = scales_of(K, GROUP, BK, FIELDS)
    PACKED: tl.constexpr = scales_in_word(K, GROUP, BK, COUNT, SIZE)
    WIDTH: tl.constexpr = K // GROUP // PACKED
    if PACKED > 1:
        values = values.to(tl.pointer_type(tl.int32), bitcast=True)
    row = values + rows.to(tl.int64) * WIDTH
    if COUNT == 1:
        found = tl.load(row + start // GROUP // PACKED)[:, None]
        if PACKED > 1:
            found = _from_bits(found >> (start // GROUP % PACKED * SIZE), DTYPE)
    else:
        if BK % GROUP == 0:
            at = start // GROUP // PACKED + tl.arange(0, COUNT // PACKED)  # neighbours, as the compiler sees
        else:
            at = (start + tl.arange(0, COUNT) * (BK // COUNT)) // GROUP
        if K % BK == 0:
            found = tl.load(row[:, None] + at[None, :])
        else:
            found = tl.load(row[:, None] + at[None, :], mask=(at < WIDTH)[None, :], other=0)
        if PACKED > 1:
            part = tl.reshape(tl.arange(0, PACKED), (1, 1, PACKED))
            numbers = _from_bits(tl.reshape(found, (BN, COUNT // PACKED, 1)) >> (part * SIZE), DTYPE)
            found = tl.reshape(numbers, (BN, COUNT))
    return found.to(tl.float32)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """f32 x rounded to the precision of DTYPE (bf16, f16), to nearest even, as f32.

    x + 2^b x has no room for the last b bits of x; what is left when 2^b x is taken away is a multiple of 2^b units in
    the last place of x. Two multiply-adds, where a conversion there and back is limited to an eighth of their speed.
    Not for numbers beyond 2^112; what would be subnormal keeps its bits.
    """
    if tl.bfloat16 == DTYPE:
        y = (x * 65536.0 + x) - x * 65536.0
    elif tl.float16 == DTYPE:
        y = (x * 8192.0 + x) - x * 8192.0
    else:
        y = x
    return y


@triton.jit
def load_weights(
    weight,
    scales,
    zeros,
    rows,
    start,
    K: tl.constexpr,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """DTYPE[BN, BK]: the rows' numbers from k = `start`; beyond K anything finite. scales, zeros: by `load_scales`."""
    FIELDS: tl.constexpr = fields_of(K, BITS)
    BN: tl.constexpr = rows.shape[0]
    COUNT: tl.constexpr = scales.shape[1]
    integers = unpack(load_packed(weight, rows, start, K, BK, BITS), magic_bits(weight), BITS, FIELDS, SIGNED)
    grouped = tl.reshape(integers, (BN, COUNT, BK // COUNT))
    if zeros is not None:
        grouped = grouped - zeros[:, :, None]
    # The conversion comes last: triton 3.6 fails on a reshape right in front of a dot.
    return tl.reshape(grouped * scales[:, :, None], (BN, BK)).to(DTYPE)
