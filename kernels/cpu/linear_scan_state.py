"""Steps of the linear scan in registers, for the kernels of both directions. kernels/cpu/linear_scan.py says why.

What differs between kinds of numbers is chosen when a kernel is compiled, by whether an argument is None: ``pairs`` for
real numbers (else lanes hold real and imaginary parts by turns), ``exact`` for 16 bits, ``log`` for multipliers that
are given as they are.
"""

import torch
from torch import Tensor

from fastwkv.kernels.cpu.numerics import TAGS, exp_pair, inlined, load, splat
from fastwkv.kernels.cpu.vectors import conjugate, exchanged, fma, imaginary_parts, real_parts, select

# Steps that are done in one vector of channels before the next: its sums stay in registers, and what is read ahead
# stays in the innermost cache.
ROWS = 16
# exp_pair reaches beyond these.
LARGEST_FLOAT32, LARGEST_FLOAT64 = 80.0, 700.0
E64 = 6.235149080811617e27  # e^64


def kind(h: Tensor, state_dtype: torch.dtype, log: bool) -> tuple[object, ...]:
    """Return the last arguments of the kernels: two tags, then pairs, exact and log."""
    tags = TAGS[h.dtype.to_real()], TAGS[state_dtype.to_real()]
    return *tags, 1 if h.is_complex() else None, 1 if h.dtype == state_dtype else None, 1 if log else None


@inlined
def load_multiplier(a_ptr, index, conjugated, storage, sums, pairs, log):
    """Read a as ``scaled`` takes it: its real parts, its imaginary parts with the signs of a product, and a low part.

    The low part is what the rounding of e^log_a has left. The fourth result is a itself.
    """
    a = load(a_ptr, index, storage)
    low = splat(0.0, sums)
    if log is not None:
        # exp_pair does not reach up to the overflow. NaN stays NaN, and -inf becomes 0.
        largest = LARGEST_FLOAT32 if sums.itemsize == 4 else LARGEST_FLOAT64
        large = a > largest
        a = select(large, a - 64.0, a)
        factor = select(large, splat(E64, sums), 1.0)
        a, low = exp_pair(select(a > largest, largest, a))
        a, low = a * factor, low * factor
    if pairs is None:
        return a, a, low, a
    imaginary = conjugate(imaginary_parts(a))
    return real_parts(a), imaginary if conjugated else -imaginary, low, a


@inlined
def _two_sum(a, b):
    """Return a + b rounded, and what the rounding left."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


@inlined
def scaled(re, im, a_low, h, low, pairs, exact, log):
    """Return the product of a multiplier with h + low, again as a sum of two."""
    product = re * h
    if pairs is None:
        if exact is None:
            return product, low
        rest = fma(re, h, -product)
        if log is not None:
            rest = fma(a_low, h, rest)
        return product, fma(re, low, rest)
    other_h = exchanged(h)
    other = im * other_h
    total, rest = _two_sum(product, other)
    rest = rest + (fma(re, h, -product) + fma(im, other_h, -other))
    return total, fma(re, low, fma(im, exchanged(low), rest))


@inlined
def added(h, low, x, exact):
    """Return (h + low) + x, again as a sum of two."""
    if exact is None:
        return h + x, low
    total, rest = _two_sum(h, x)
    return total, low + rest


@inlined
def total(h, low, exact):
    """Return h + low as one number."""
    if exact is None:
        return h
    # Where h has overflowed nothing is known of what its rounding has left.
    return select(low == low, h + low, h)


@inlined
def conjugate_product(a, b, pairs):
    """Return a conj(b)."""
    if pairs is None:
        return a * b
    return fma(a, real_parts(b), exchanged(a) * conjugate(imaginary_parts(b)))
