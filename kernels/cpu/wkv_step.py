"""One token of WKV on the CPU, for text that is generated.

The formulas are those of kernels/cpu/wkv.py, but the state that comes back must hold p - w in one float32, token after
token. Rounding it at |p| = 60 loses 2e-6 a step, which adds up to 1e-3 in 8192 tokens of a small w; the residue moved
into num and den is itself rounded there, always in the same direction, and adds up to 1e-5. So the state is kept at
a scale near e^0, where float32 resolves p to 1e-10: any scale will do, since only num e^p and den e^p mean anything.
With it a token is added as E = e^{k - p} even if it is heavier than the past, up to e^64, and num and den change only
by what the tokens bring.
"""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.cpu.launch import addresses, fits, fitted, run
from fastwkv.kernels.cpu.numerics import TAGS, exp, inlined, kernel, load, splat, store
from fastwkv.kernels.cpu.vectors import VECTOR_BYTES, absolute, any_true, fma, select
from fastwkv.kernels.cpu.wkv_state import LOWEST, add, load_state, load_w, locate, ratio, rounded, store_packed

# Scales are moved, and tokens heavier than the past added to it, up to e^64 = 6e27.
REACH = 64.0
# Larger values would overflow where tokens are added with weights up to e^64.
MODERATE = 1e6
# A max below this stays as it is: half a unit in its last place, 8192 times, is 2e-6.
FINE = 2.0**-7
# Bounds of what is moved, far enough from overflow for the next tokens.
LARGEST, SMALLEST = 1e30, 1e-30
LN_2 = 0.6931471805599453
ONE_TOKEN = np.array((0, 1))


@inlined
def _difference(a, b):
    """Return a - b rounded, and what the rounding left."""
    high = a - b
    back = high - a
    low = (a - (high - back)) - (b + back)
    return high, select(absolute(low) < 1.0, low, 0.0)


@inlined
def _weight(d, low, v):
    """Return whether the past keeps its scale, and the weight of the token, or else of the past."""
    near = select(absolute(v) < MODERATE, d, select(d >= 0.0, d, -2.0 * REACH)) >= -REACH
    E = exp(select(near, 0.0 - d, d))
    return near, fma(E, select(near, 0.0 - low, low), E)


@inlined
def _weighed(num, den, scale, sums):
    """Return a state whose exponent says what it weighs: very small sums are made larger, and where they are 0 it is
    the lowest there is. kernels/wkv_entry.py says why.
    """
    digits = 64 if sums.itemsize == 4 else 512
    few = select(den > 0.0, den, 1.0) < 0.5**digits
    lower, rest = _difference(scale, digits * LN_2)
    num, den = select(few, fma(rest, num, num) * 2.0**digits, num), select(few, fma(rest, den, den) * 2.0**digits, den)
    scale = select(absolute(num) + absolute(den) == 0.0, LOWEST, scale)
    return num, den, select(few, lower, scale)


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
    work,  # channels in a block, first and last unit of work
    storage,  # tag of k, v, y
    sums,  # tag of the rest
):
    C, B = shape
    width, first, last = work
    lanes = VECTOR_BYTES // sums.itemsize
    for unit in range(first, last):
        n, _, _, _, c_first, c_last = locate(unit, width, C, bounds)
        for x in range(c_first, c_last, lanes):
            # The last vector of an odd C overlaps the one before it, and writes the same numbers there.
            c = min(x, C - lanes)
            index = n * C + c
            w, u = load_w(w_ptr, c, sums), load(u_ptr, c, sums)
            k, v = load(k_ptr, index, storage), load(v_ptr, index, storage)
            num, den, scale = load_state(num_ptr, den_ptr, max_ptr, index, sums)
            if any_true(den < (0.5**64 if sums.itemsize == 4 else 0.5**512)):  # hardly ever
                num, den, scale = _weighed(num, den, scale, sums)
            gap, gap_low = _difference(scale, k)
            d, low = _difference(gap, u)
            near, E = _weight(d, gap_low + low, v)
            a, b = add(near, E, num, den, v)
            store(y_ptr, index, ratio(a, b), storage)

            d, low = _difference(gap, w)
            near, E = _weight(d, gap_low + low, v)
            num, den = add(near, E, num, den, v)
            one = splat(1.0, sums)
            num, den, scale = rounded(num, den, select(near, scale, k), select(near, one, 0.0), 0.0 - w)
            shift = select(absolute(scale) > FINE, scale, 0.0)
            shift = select(absolute(shift) < REACH, shift, 0.0)
            factor = exp(shift)
            a, b = num * factor, den * factor
            movable = absolute(select(b < LARGEST, select(b > SMALLEST, a, LARGEST), LARGEST)) < LARGEST
            num, den = select(movable, a, num), select(movable, b, den)
            scale = select(den == 0.0, -np.inf, select(movable, scale - shift, scale))
            store_packed(state_ptr, index, B * C, num, den, scale, sums)


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
