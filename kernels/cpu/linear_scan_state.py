"""Steps of the linear scan in registers, for the kernels of both directions. kernels/cpu/linear_scan.py says why.

A few arguments are constants: what a kernel is compiled for depends on whether they are None. ``parts`` is None for
real numbers, and 2 for complex ones, whose real and imaginary parts lanes hold by turns. ``exact`` is None for 16 bits,
``log`` for gates that are given as they are.
"""

import torch
from torch import Tensor

from fastwkv.kernels.cpu.numerics import TAGS, exp_sum, inlined, load, splat
from fastwkv.kernels.cpu.vectors import conjugate, exchanged, fma, imaginary_parts, real_parts, select
from fastwkv.kernels.notation import E64, EXP_MOST_FLOAT32, EXP_MOST_FLOAT64

# Steps that are done in one vector of channels before the next: its sums stay in registers, and what is read ahead
# stays in the innermost cache.
ROWS = 16


def scan_constants(h: Tensor, state_dtype: torch.dtype, log: bool) -> tuple[object, ...]:
    """Return what the kernels are compiled for, their last arguments: two tags, then parts, exact and log."""
    tags = TAGS[h.dtype.to_real()], TAGS[state_dtype.to_real()]
    return *tags, 2 if h.is_complex() else None, 1 if h.dtype == state_dtype else None, 1 if log else None


@inlined
def load_gate(a_ptr, index, conjugated, storage, sums, parts, log):
    """Read a as ``times_sum`` takes it: its real parts, its imaginary parts with the signs of a product, a low part.

    The low part is what the rounding of e^log_a has cut off. The fourth result is a itself.
    """
    a = load(a_ptr, index, storage)
    low = splat(0.0, sums)
    if log is not None:
        # exp_sum does not reach up to the overflow. NaN stays NaN, and -inf becomes 0.
        most = EXP_MOST_FLOAT32 if sums.itemsize == 4 else EXP_MOST_FLOAT64
        large = a > most
        a = select(large, a - 64.0, a)
        factor = select(large, splat(E64, sums), 1.0)
        a, low = exp_sum(select(a > most, most, a))
        a, low = a * factor, low * factor
    if parts is None:
        return a, a, low, a
    imaginary = conjugate(imaginary_parts(a))
    return real_parts(a), imaginary if conjugated else -imaginary, low, a


@inlined
def _two_sum(a, b):
    """Return a + b rounded, and what the rounding cut off."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@inlined
def times_sum(re, im, a_low, h, low, parts, exact, log):
    """Return (a + a_low) (h + low) as such a sum again. Without ``exact`` low is 0, and stays so."""
    product = re * h
    if parts is None:
        if exact is None:
            return product, low
        error = fma(re, h, -product)
        if log is not None:
            error = fma(a_low, h, error)
        return product, fma(re, low, error)
    other_h = exchanged(h)
    other = im * other_h
    total, error = _two_sum(product, other)
    error = error + (fma(re, h, -product) + fma(im, other_h, -other))
    return total, fma(re, low, fma(im, exchanged(low), error))


@inlined
def plus_sum(h, low, x, exact):
    """Return h + low + x as such a sum again."""
    if exact is None:
        return h + x, low
    total, error = _two_sum(h, x)
    return total, low + error


@inlined
def rounded_sum(h, low, exact):
    """Return h + low as one number. Where low is NaN, since h has overflowed, this is h alone."""
    if exact is None:
        return h
    return select(low == low, h + low, h)


@inlined
def conjugate_product(a, b, parts):
    """Return a conj(b)."""
    if parts is None:
        return a * b
    return fma(a, real_parts(b), exchanged(a) * conjugate(imaginary_parts(b)))
