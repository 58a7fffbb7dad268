"""What the Triton kernels share: masks, exact sums, and numbers that are real or complex.

A number is a tuple of tensors: one, or real and imaginary part. In memory the two lie side by side.
"""

import triton
import triton.language as tl


@triton.jit
def before(t, end, c, C: tl.constexpr):
    """Mask of the channels of token t, all of them out where t is not before ``end``."""
    if C // c.shape[0] * c.shape[0] == C:
        return tl.zeros_like(c) + t < end  # the same for all channels: one predicate, not one for each
    return c < tl.where(end > t, C, 0)


@triton.jit
def two_sum(a, b):
    """Return a + b rounded, and what the rounding cut off. Not to be compiled with fused multiply-adds around it."""
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
def load(ptr, offset, mask, like):
    """Read numbers that are ``offset`` numbers away, 0 outside of the mask, in the form and dtype of another."""
    if len(like) == 2:
        both = tl.load(ptr + 2 * offset[:, None] + tl.arange(0, 2)[None, :], mask=mask[:, None], other=0.0)
        re, im = tl.split(both.to(like[0].dtype))
        return (re, im)
    else:
        return (tl.load(ptr + offset, mask=mask, other=0.0).to(like[0].dtype),)


@triton.jit
def store(ptr, offset, z, mask):
    if len(z) == 2:
        tl.store(ptr + 2 * offset[:, None] + tl.arange(0, 2)[None, :], tl.join(z[0], z[1]), mask=mask[:, None])
    else:
        tl.store(ptr + offset, z[0], mask=mask)


@triton.jit
def conjugate(z):
    if len(z) == 2:
        return (z[0], -z[1])
    else:
        return z


@triton.jit
def plus(y, z):
    if len(z) == 2:
        return (y[0] + z[0], y[1] + z[1])
    else:
        return (y[0] + z[0],)


@triton.jit
def times(y, z):
    if len(z) == 2:
        return (tl.fma(y[0], z[0], -(y[1] * z[1])), tl.fma(y[0], z[1], y[1] * z[0]))
    else:
        return (y[0] * z[0],)


@triton.jit
def times_sum(a, h, low, EXACT: tl.constexpr):
    """Return a (h + low) as such a sum again; without EXACT low is 0 and stays so."""
    if not EXACT:
        return times(a, h), low
    elif len(a) == 2:
        re, re_low = _product_sum(a[0], h[0], -a[1], h[1])
        im, im_low = _product_sum(a[0], h[1], a[1], h[0])
        re_low = tl.fma(a[0], low[0], tl.fma(-a[1], low[1], re_low))
        im_low = tl.fma(a[0], low[1], tl.fma(a[1], low[0], im_low))
        return (re, im), (re_low, im_low)
    else:
        product = a[0] * h[0]
        return (product,), (tl.fma(a[0], low[0], tl.fma(a[0], h[0], -product)),)


@triton.jit
def _product_sum(a, b, c, d):
    """Return a b + c d as a sum of two, exact to the rounding of the smaller."""
    ab = a * b
    cd = c * d
    total, error = two_sum(ab, cd)
    return total, error + (tl.fma(a, b, -ab) + tl.fma(c, d, -cd))


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
