"""Arithmetic that the Triton kernels share: sums of two numbers that lose nothing, and numbers real or complex.

A number is a tuple of its parts, each a tensor. In memory the parts of a complex number lie side by side.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastwkv.kernels import notation

LOG2_E = tl.constexpr(notation.LOG2_E)
LN2_HIGH = tl.constexpr(notation.LN2_HIGH_FLOAT32)
LN2_LOW = tl.constexpr(notation.LN2_LOW_FLOAT32)
EXP_LEAST = tl.constexpr(notation.EXP_LEAST_FLOAT32)
EXP_MOST = tl.constexpr(notation.EXP_MOST_FLOAT32)
E64 = tl.constexpr(notation.E64)
# Not one tuple: Triton 3.3 cannot take an element of a constant.
EXP_1, EXP_2, EXP_3, EXP_4, EXP_5, EXP_6 = map(tl.constexpr, notation.EXP_FLOAT32)


@triton.jit
def negated(x):
    """Return -x, which costs nothing: LLVM makes this product a sign of the instruction that takes it.

    Triton 3.6 compiles a minus sign to 0 - x, an addition that the next step often waits for.
    """
    return x * -1.0


INTERPRETED = tl.constexpr(not isinstance(negated, triton.JITFunction))


@triton.jit
def quotient(a, b):
    """Return a / b for b from the smallest normal number to 2^126. float32: two instructions, two units off at most.

    Triton's own division is ready for smaller and larger numbers too, which takes six instructions more.
    """
    if INTERPRETED or b.dtype == tl.float64:  # the interpreter knows no library functions
        return a / b
    else:
        return libdevice.fast_dividef(a, b)


@triton.jit
def two_sum(a, b):
    """Return a + b rounded, and what the rounding cut off. The compiler must fuse no multiply-adds around it."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit
def filled(value: tl.constexpr, like):
    """Return a real number of the form of another."""
    first = tl.full(like[0].shape, value, like[0].dtype)
    if len(like) == 2:
        return (first, tl.zeros_like(first))
    else:
        return (first,)


@triton.jit
def load(ptr, offset, mask, like, other: tl.constexpr = 0.0):
    """Read numbers that are ``offset`` numbers away, ``other`` out of the mask, in the form and dtype of ``like``."""
    if len(like) == 2:
        both = tl.load(ptr + 2 * offset[:, None] + tl.arange(0, 2)[None, :], mask=mask[:, None], other=other)
        re, im = tl.split(both.to(like[0].dtype))
        return (re, im)
    else:
        return (tl.load(ptr + offset, mask=mask, other=other).to(like[0].dtype),)


@triton.jit
def store(ptr, offset, z, mask):
    """Write numbers that are ``offset`` numbers away."""
    if len(z) == 2:
        tl.store(ptr + 2 * offset[:, None] + tl.arange(0, 2)[None, :], tl.join(z[0], z[1]), mask=mask[:, None])
    else:
        tl.store(ptr + offset, z[0], mask=mask)


@triton.jit
def conjugate(z):
    """Return conj(z), which for real numbers is z."""
    if len(z) == 2:
        return (z[0], negated(z[1]))
    else:
        return z


@triton.jit
def plus(y, z):
    """Return y + z."""
    if len(z) == 2:
        return (y[0] + z[0], y[1] + z[1])
    else:
        return (y[0] + z[0],)


@triton.jit
def times(y, z):
    """Return y z."""
    if len(z) == 2:
        return (tl.fma(y[0], z[0], negated(y[1] * z[1])), tl.fma(y[0], z[1], y[1] * z[0]))
    else:
        return (y[0] * z[0],)


@triton.jit
def times_sum(a, a_low, h, low, EXACT: tl.constexpr):
    """Return (a + a_low) (h + low) as such a sum again. Without EXACT low is 0, and stays so.

    ``a_low`` is None where a is one number without a low part. Every complex a is one.
    """
    if not EXACT:
        return times(a, h), low
    elif len(a) == 2:
        re, re_low = _product_sum(a[0], h[0], negated(a[1]), h[1])
        im, im_low = _product_sum(a[0], h[1], a[1], h[0])
        re_low = tl.fma(a[0], low[0], tl.fma(negated(a[1]), low[1], re_low))
        im_low = tl.fma(a[0], low[1], tl.fma(a[1], low[0], im_low))
        return (re, im), (re_low, im_low)
    else:
        product = a[0] * h[0]
        error = tl.fma(a[0], h[0], negated(product))
        if a_low is not None:
            error = tl.fma(a_low[0], h[0], error)
        return (product,), (tl.fma(a[0], low[0], error),)


@triton.jit
def _product_sum(a, b, c, d):
    """Return a b + c d as a sum of two, exact to the rounding of the smaller."""
    ab = a * b
    cd = c * d
    total, error = two_sum(ab, cd)
    return total, error + (tl.fma(a, b, negated(ab)) + tl.fma(c, d, negated(cd)))


@triton.jit
def plus_sum(h, low, x, EXACT: tl.constexpr):
    """Return h + low + x as such a sum again."""
    if not EXACT:
        return plus(h, x), low
    elif len(x) == 2:
        re, re_error = two_sum(h[0], x[0])
        im, im_error = two_sum(h[1], x[1])
        return (re, im), (low[0] + re_error, low[1] + im_error)
    else:
        total, error = two_sum(h[0], x[0])
        return (total,), (low[0] + error,)


@triton.jit
def rounded_sum(h, low):
    """Return h + low as one number. Where low is NaN, since h has overflowed, this is h alone."""
    if len(h) == 2:
        re = tl.where(low[0] == low[0], h[0] + low[0], h[0])
        return (re, tl.where(low[1] == low[1], h[1] + low[1], h[1]))
    else:
        return (tl.where(low[0] == low[0], h[0] + low[0], h[0]),)


@triton.jit
def times_state(product, h, low):
    """Return product (h + low) as a sum. A state of 0 stays 0, even where the product of many gates has overflowed."""
    h_new, low_new = times_sum(product, None, h, low, True)
    if len(h) == 2:
        zero = (h[0] == 0) & (h[1] == 0)
        h_new = (tl.where(zero, 0.0, h_new[0]), tl.where(zero, 0.0, h_new[1]))
        low_new = (tl.where(zero, 0.0, low_new[0]), tl.where(zero, 0.0, low_new[1]))
    else:
        zero = h[0] == 0
        h_new = (tl.where(zero, 0.0, h_new[0]),)
        low_new = (tl.where(zero, 0.0, low_new[0]),)
    return h_new, low_new


@triton.jit
def reduced(x):
    """Return n = x / ln 2 rounded, and r = x - n ln 2, so that e^x = 2^n e^r; for float32."""
    n = tl.floor(x * LOG2_E + 0.5)
    return n, tl.fma(n, -LN2_LOW, tl.fma(n, -LN2_HIGH, x))


@triton.jit
def exp_sum(x):
    """Return e^x as a sum of two numbers. Close to 1, e^x - 1 is known far better than e^x can be written as one.

    The formula is that of notation.py. In float64 the second number is 0.
    """
    if x.dtype == tl.float64:
        return tl.exp2(x * LOG2_E), tl.zeros_like(x)
    else:
        large = x > EXP_MOST
        x = tl.where(large, x - 64, x)
        n, r = reduced(x)
        p = tl.fma(r, EXP_6, EXP_5)
        p = tl.fma(p, r, EXP_4)
        p = tl.fma(p, r, EXP_3)
        p = tl.fma(p, r, EXP_2)
        rest = tl.fma(p, r, EXP_1) * r
        rounded = rest + 1
        power = tl.where(x < EXP_LEAST, 0.0, tl.exp2(n))
        normal = (x >= EXP_LEAST) & (x <= EXP_MOST)
        high = tl.where(normal | (x != x), rounded * power, power)
        low = tl.where(normal, (rest - (rounded - 1)) * power, 0.0)
        factor = tl.where(large, E64, 1.0)
        return high * factor, low * factor
