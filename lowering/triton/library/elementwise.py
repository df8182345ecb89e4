"""Operations on elements that Triton lacks, or computes otherwise than PyTorch.

All of them run in Triton's interpreter, too, so nothing here calls a device library.
"""

from __future__ import annotations

import triton
import triton.language as tl

from irc.lowering.triton.module import interpreting


@triton.jit
def larger(a, b):
    """The larger of two sizes."""
    return tl.maximum(a, b)


@triton.jit
def smaller(a, b):
    """The smaller of two sizes."""
    return tl.minimum(a, b)


@triton.jit
def maximum(a, b):
    """The larger; NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    """The smaller; NaN where either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def isnan(x):
    """Whether x is no number."""
    return x != x


@triton.jit
def isinf(x):
    """Whether x is infinite."""
    return tl.abs(x) == float("inf")


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN."""
    return tl.where(x > 0, 1, 0).to(x.dtype) - tl.where(x < 0, 1, 0).to(x.dtype)


@triton.jit
def _negative(x):
    """Whether a float has the sign, -0.0 included."""
    if x.dtype == tl.float64:
        sign_bit = x.to(tl.int64, bitcast=True) < 0
    else:
        sign_bit = x.to(tl.int32, bitcast=True) < 0
    return sign_bit


@triton.jit
def trunc(x):
    """Towards zero."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_even(x):
    """The nearest whole number, ties to even: floats from 2^23 (f64: 2^52) on are whole."""
    if x.dtype == tl.float64:
        magic = tl.full((), 6755399441055744.0, tl.float64)
        limit = tl.full((), 2251799813685248.0, tl.float64)
    else:
        magic = tl.full((), 12582912.0, tl.float32)
        limit = tl.full((), 4194304.0, tl.float32)
    # Between 2^22 and 2^23 halves exist, which a floor and a comparison decide.
    down = tl.floor(x)
    half = x - down
    odd = (down * 0.5) != tl.floor(down * 0.5)
    decided = tl.where((half > 0.5) | ((half == 0.5) & odd), down + 1, down)
    return tl.where(tl.abs(x) < limit, (x + magic) - magic, decided)


@triton.jit
def divide(a, b):
    """a / b, rounded once: quantizing looks at ties."""
    if b.dtype == tl.float32:
        return tl.div_rn(tl.cast(a, tl.float32), b)
    return a / b


@triton.jit
def bounded(x, low, high):
    """A whole float between two integers as an integer of 32 bits; NaN is the lower."""
    kept = tl.where(x > low, x, tl.cast(low, x.dtype))
    return tl.where(kept < high, kept, tl.cast(high, x.dtype)).to(tl.int32)


@triton.jit
def floor_div(a, b):
    """⌊a / b⌋ of integers."""
    quotient = a // b
    rest = a - quotient * b
    return quotient - tl.where((rest != 0) & ((rest < 0) != (b < 0)), 1, 0).to(quotient.dtype)


@triton.jit
def trunc_div(a, b):
    """The quotient of integers, towards zero."""
    quotient = a // b
    rest = a - quotient * b
    # What `//` does with signs differs between Triton and its interpreter.
    low = (rest != 0) & ((rest < 0) == (b < 0)) & ((a < 0) != (b < 0))
    return quotient + tl.where(low, 1, 0).to(quotient.dtype)


@triton.jit
def remainder(a, b):
    """What ⌊a / b⌋ leaves, with the sign of b."""
    return a - floor_div(a, b) * b


@triton.jit
def floor_div_floats(a, b):
    """⌊a / b⌋."""
    return tl.floor(divide(a, b))


@triton.jit
def trunc_div_floats(a, b):
    """a / b towards zero."""
    return trunc(divide(a, b))


if interpreting():

    @triton.jit
    def _rest(a, b):
        """What a whole quotient leaves of two numbers that are not negative."""
        return a % b

else:

    @triton.jit
    def _rest(a, b):
        """What a whole quotient leaves of two numbers that are not negative; exact for quotients up to 2^200.

        Triton's own remainder is off from quotients of 2^24 (f64: 2^53) on. What a rounded quotient leaves is a float:
        so each step is exact, and leaves a number some 50 bits shorter.
        """
        rest = tl.cast(a, tl.float64)
        divisor = tl.cast(b, tl.float64)
        for _ in range(4):
            rest = tl.fma(-trunc(rest / divisor), divisor, rest)
        rest = tl.where(rest < 0, rest + divisor, rest)
        rest = tl.where((divisor == float("inf")) & (a < divisor), a, rest)
        return rest.to(b.dtype)


@triton.jit
def fmod(a, b):
    """What the truncated quotient leaves, with the sign of a."""
    rest = _rest(tl.abs(a), tl.abs(b))
    return tl.where(a < 0, -rest, rest)


@triton.jit
def fmod_of_integers(a, b):
    """What the truncated quotient leaves, with the sign of a."""
    return a - trunc_div(a, b) * b


@triton.jit
def remainder_floats(a, b):
    """What ⌊a / b⌋ leaves, with the sign of b."""
    rest = fmod(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def rsqrt(x):
    """1 / sqrt(x); Triton's own has but 20 bits for f64."""
    if x.dtype == tl.float64:
        return 1.0 / tl.sqrt(x)
    return tl.rsqrt(x)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return divide(1.0, 1.0 + tl.exp(-x))


@triton.jit
def expm1(x):
    """e^x - 1, without cancellation near 0 (W. Kahan: the errors of u - 1 and ln u cancel)."""
    u = tl.exp(x)
    small = tl.abs(x) < 0.5
    log = tl.log(tl.where(small, u, 1.5))
    near = tl.where(log == 0, x, (u - 1) * divide(x, tl.where(log == 0, tl.full((), 1, x.dtype), log)))
    return tl.where(small, near, u - 1)


@triton.jit
def log1p(x):
    """ln(1 + x), without cancellation near 0 (W. Kahan)."""
    u = 1 + x
    d = u - 1
    near = tl.log(u) * divide(x, tl.where(d == 0, tl.full((), 1, x.dtype), d))
    return tl.where(d == 0, x, tl.where(u == float("inf"), u, near))


@triton.jit
def tanh(x):
    """(e^2|x| - 1) / (e^2|x| + 1) with the sign of x."""
    size = tl.abs(x)
    m = expm1(2 * tl.where(size < 20, size, tl.full((), 20, x.dtype)))
    value = divide(m, m + 2)
    value = tl.where(x < 0, -value, value)
    return tl.where(x != x, x, value)


@triton.jit
def log10(x):
    """Logarithm to base 10."""
    return tl.log(x) * 0.4342944819032518


@triton.jit
def tan(x):
    """sin x / cos x."""
    return divide(tl.sin(x), tl.cos(x))


@triton.jit
def _atan_below_1(x):
    """The series around 0, after angles above 22.5° are turned by 45°; x in [0, 1]."""
    turned = x > 0.41421356237309503
    t = tl.where(turned, divide(x - 1, x + 1), x)
    terms: tl.constexpr = 22 if x.dtype == tl.float64 else 9
    square = t * t
    p = tl.zeros_like(t)
    for k in tl.static_range(terms):
        p = 1.0 / (2 * (terms - k) + 1) - square * p
    near = t - t * square * p
    return tl.where(turned, near + 0.7853981633974483, near)


@triton.jit
def atan(x):
    """The angle in [-π/2, π/2] whose tangent is x."""
    size = tl.abs(x)
    steep = size > 1
    angle = _atan_below_1(tl.where(steep, divide(1.0, size), size))
    angle = tl.where(steep, 1.5707963267948966 - angle, angle)
    return tl.where(x < 0, -angle, angle)


@triton.jit
def atan2(y, x):
    """The angle in [-π, π] of the point (x, y)."""
    height = tl.abs(y)
    width = tl.abs(x)
    one = tl.full((), 1, x.dtype)
    slope = divide(height, tl.where(height == 0, one, width))
    slope = tl.where((height == width) & (height != 0), one, slope)  # infinities, too
    angle = atan(tl.where(x != x, x, slope))
    angle = tl.where(_negative(x), 3.141592653589793 - angle, angle)
    return tl.where(_negative(y), -angle, angle)


@triton.jit
def sinh(x):
    """(e^x - e^-x) / 2."""
    size = tl.abs(x)
    m = expm1(tl.where(size < 20, size, tl.full((), 20, x.dtype)))
    value = tl.where(size < 20, 0.5 * (m + divide(m, m + 1)), _half_exp(size))
    value = tl.where(x < 0, -value, value)
    return tl.where(x != x, x, value)


@triton.jit
def _half_exp(x):
    """e^x / 2, also where e^x is infinite."""
    root = tl.exp(0.5 * x)
    return (0.5 * root) * root


@triton.jit
def cosh(x):
    """(e^x + e^-x) / 2."""
    half = _half_exp(tl.abs(x))
    return half + divide(0.25, half)


@triton.jit
def power(a, b):
    """a^b of floats, in f64: the exponent of a large result takes its digits."""
    base, exponent = tl.broadcast(tl.cast(a, tl.float64), tl.cast(b, tl.float64))
    size = tl.exp2(exponent * tl.log2(tl.abs(base)))
    size = tl.where((exponent == 0) | (tl.abs(base) == 1), 1.0, size)
    whole = exponent == tl.floor(exponent)
    odd = whole & ((exponent * 0.5) != tl.floor(exponent * 0.5))
    value = tl.where(_negative(base) & odd, -size, size)
    value = tl.where((base < 0) & (base != float("-inf")) & (whole == 0), float("nan"), value)
    unknown = ((base != base) & (exponent != 0)) | ((exponent != exponent) & (base != 1))
    value = tl.where(unknown, float("nan"), value)
    return value.to(a.dtype)


@triton.jit
def power_of_integers(a, b):
    """a^b of integers by squaring; exponents below 0 give 0, but for bases 1 and -1."""
    base = tl.cast(a, tl.int64) + tl.cast(b, tl.int64) * 0
    left = tl.cast(b, tl.int64) + base * 0
    alternating = tl.where(left % 2 == 0, 1, -1).to(tl.int64)
    below = tl.where(base == 1, 1, tl.where(base == -1, alternating, 0)).to(tl.int64)
    result = tl.where(left < 0, below, 1).to(tl.int64)
    for _ in range(63):
        result = tl.where((left > 0) & (left % 2 != 0), result * base, result)
        base = base * base
        left = tl.where(left > 0, left // 2, 0)
    return result.to(a.dtype)


@triton.jit
def product_of(a, b):
    """a · b, for reductions."""
    return a * b


@triton.jit
def _first_of(values, positions, best):
    """(best of each row, or its NaN; where that stands first)."""
    unknown = values != values
    any_unknown = tl.max(unknown.to(tl.int32), axis=1, keep_dims=True) != 0
    wanted = tl.where(any_unknown, unknown, values == best)
    first = tl.min(tl.where(wanted, positions, 0x7FFFFFFFFFFFFFFF), axis=1, keep_dims=True)
    return tl.where(any_unknown, tl.cast(float("nan"), values.dtype), best), first


@triton.jit
def first_of_largest(values, positions):
    """(largest of each row [ROWS, 1], its first position); a NaN is larger than any number."""
    known = tl.where(values != values, tl.cast(float("-inf"), values.dtype), values)
    return _first_of(values, positions, tl.max(known, axis=1, keep_dims=True))


@triton.jit
def first_of_smallest(values, positions):
    """(smallest of each row [ROWS, 1], its first position); a NaN is smaller than any number."""
    known = tl.where(values != values, tl.cast(float("inf"), values.dtype), values)
    return _first_of(values, positions, tl.min(known, axis=1, keep_dims=True))


@triton.jit
def first_of_largest_integers(values, positions):
    """(largest of each row [ROWS, 1], its first position)."""
    best = tl.max(values, axis=1, keep_dims=True)
    return best, tl.min(tl.where(values == best, positions, 0x7FFFFFFFFFFFFFFF), axis=1, keep_dims=True)


@triton.jit
def first_of_smallest_integers(values, positions):
    """(smallest of each row [ROWS, 1], its first position)."""
    best = tl.min(values, axis=1, keep_dims=True)
    return best, tl.min(tl.where(values == best, positions, 0x7FFFFFFFFFFFFFFF), axis=1, keep_dims=True)


if interpreting():

    @triton.jit
    def to_bf16(x):
        """x rounded to bf16: the interpreter drops bits instead."""
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        odd = (bits >> 16) & 1
        near = tl.where(x != x, bits, (bits + 0x7FFF + odd) & -65536)
        return near.to(tl.float32, bitcast=True).to(tl.bfloat16)

else:

    @triton.jit
    def to_bf16(x):
        """x rounded to bf16."""
        return x.to(tl.bfloat16)


@triton.jit
def round_bf16(x):
    """x as it reads back from bf16."""
    return to_bf16(x).to(x.dtype)
