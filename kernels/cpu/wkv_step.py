"""One token of WKV on the CPU, for sequences that are generated. kernels/wkv_step.py says why p is kept near 0."""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.cpu.numerics import TAGS, exp, inlined, kernel, load, splat, store
from fastwkv.kernels.cpu.vectors import VECTOR_BYTES, absolute, any_true, fma, select
from fastwkv.kernels.cpu.wkv_state import absorb, fold_age, load_fields, load_rate, locate, ratio, store_state
from fastwkv.kernels.cpu.work import addresses, fits, fitted, run
from fastwkv.kernels.notation import (
    FINE,
    LARGEST,
    LN2,
    MODERATE,
    NO_PAST,
    RAISED_BITS_FLOAT32,
    RAISED_BITS_FLOAT64,
    REACH,
    SMALL_FLOAT32,
    SMALL_FLOAT64,
    SMALLEST,
)

ONE_TOKEN = np.array((0, 1))


@inlined
def _difference(a, b):
    """Return a - b rounded, and what the rounding cut off."""
    high = a - b
    back = high - a
    low = (a - (high - back)) - (b + back)
    return high, select(absolute(low) < 1.0, low, 0.0)


@inlined
def _weigh(d, low, v):
    """Return whether the past keeps its scale, and the weight of the token; where it does not, that of the past.

    The exponent of the past is larger than that of the token by d + low. A token heavier than the past has a weight up
    to e^64 where the past keeps its scale.
    """
    near = select(absolute(v) < MODERATE, d, select(d >= 0.0, d, -2.0 * REACH)) >= -REACH
    e = exp(select(near, 0.0 - d, d))
    return near, fma(e, select(near, 0.0 - low, low), e)


@inlined
def _raised(num, den, p, sums):
    """Give a state whose sums are very small larger ones, and an exponent to match; an empty one has p = NO_PAST.

    kernels/wkv_entry.py says why.
    """
    bits = RAISED_BITS_FLOAT32 if sums.itemsize == 4 else RAISED_BITS_FLOAT64
    small = select(den > 0.0, den, 1.0) < (SMALL_FLOAT32 if sums.itemsize == 4 else SMALL_FLOAT64)
    lower, rest = _difference(p, bits * LN2)
    num, den = select(small, fma(rest, num, num) * 2.0**bits, num), select(small, fma(rest, den, den) * 2.0**bits, den)
    p = select(absolute(num) + absolute(den) == 0.0, NO_PAST, p)
    return num, den, select(small, lower, p)


@kernel
def _wkv_step_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, C]
    v_ptr,  # [B, C]
    num_ptr,  # [B, C]
    den_ptr,  # [B, C]
    max_ptr,  # [B, C]
    y_ptr,  # [B, C]
    state_ptr,  # [3, B, C]
    bounds,  # of one token
    shape,  # C, B
    work,  # channels in a block, first unit of work, the one after the last
    storage,  # tag of k, v, y
    sums,  # tag of the rest
):
    C, B = shape
    width, first, stop = work
    lanes = VECTOR_BYTES // sums.itemsize
    for unit in range(first, stop):
        n, _, _, _, c_begin, c_end = locate(unit, width, C, bounds)
        for i in range(c_begin, c_end, lanes):
            # The last vector of an odd C overlaps the one before it, and writes the same numbers there.
            c = min(i, C - lanes)
            index = n * C + c
            w, u = load_rate(w_ptr, c, sums), load(u_ptr, c, sums)
            k, v = load(k_ptr, index, storage), load(v_ptr, index, storage)
            num, den, p = load_fields(num_ptr, den_ptr, max_ptr, index, sums)
            if any_true(den < (SMALL_FLOAT32 if sums.itemsize == 4 else SMALL_FLOAT64)):  # hardly ever
                num, den, p = _raised(num, den, p, sums)
            gap, gap_low = _difference(p, k)
            d, low = _difference(gap, u)
            near, e = _weigh(d, gap_low + low, v)
            y_num, y_den = absorb(near, e, num, den, v)
            store(y_ptr, index, ratio(y_num, y_den), storage)

            d, low = _difference(gap, w)
            near, e = _weigh(d, gap_low + low, v)
            num, den = absorb(near, e, num, den, v)
            one = splat(1.0, sums)
            num, den, p = fold_age(num, den, select(near, p, k), select(near, one, 0.0), 0.0 - w)
            shift = select(absolute(p) > FINE, p, 0.0)
            shift = select(absolute(shift) < REACH, shift, 0.0)
            factor = exp(shift)
            num_moved, den_moved = num * factor, den * factor
            bounded = select(den_moved < LARGEST, select(den_moved > SMALLEST, num_moved, LARGEST), LARGEST)
            moves = absolute(bounded) < LARGEST
            num, den = select(moves, num_moved, num), select(moves, den_moved, den)
            p = select(den == 0.0, -np.inf, select(moves, p - shift, p))
            store_state(state_ptr, index, B * C, num, den, p, sums)


def wkv_step(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, num: Tensor, den: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y_t [B, C] and the next state [3, B, C]."""
    dtype = num.dtype
    B, C = k.shape
    if not fits(k, dtype):
        y, state = wkv_step(*fitted(dtype, w, u, k, v, num, den, scale))
        return y[..., :C].contiguous().to(v.dtype), state[..., :C].contiguous()
    w, u = w.to(dtype).contiguous(), u.to(dtype).contiguous()
    y, state = torch.empty_like(v), num.new_empty((3, B, C))
    pointers = addresses(w, u, k, v, num, den, scale, y, state)
    tags = TAGS[k.dtype], TAGS[dtype]
    run(lambda work: _wkv_step_kernel(*pointers, ONE_TOKEN, (C, B), work, *tags), B, C, B * C, dtype)
    return y, state
