"""One token of WKV on the CPU, for text that is generated.

The formulas are those of kernels/cpu/wkv.py, but the state that comes back must hold p - w in one float32, token after
token. Rounding it at |p| = 60 loses 2e-6 a step, which adds up to 1e-3 in 8192 tokens of a small w; the residue moved
into num and den is itself rounded there, always in the same direction, and adds up to 1e-5. So the state is kept at
a scale near e^0, where float32 resolves p to 1e-10: any scale will do, since only num e^p and den e^p mean anything.
With it a token is added as E = e^{k - p} even if it is heavier than the past, up to e^60, and num and den change only
by what the tokens bring.
"""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.cpu.launch import fits, fitted, run
from fastwkv.kernels.cpu.numerics import (
    TAGS,
    VECTOR_BYTES,
    absolute,
    exp,
    fma,
    inlined,
    kernel,
    load,
    select,
    splat,
    store,
)
from fastwkv.kernels.cpu.wkv_state import (
    add,
    load_state,
    load_w,
    ratio,
    rounded,
    store_state,
)

# Scales are moved, and tokens heavier than the past added to it, up to e^60 = 1e26.
REACH = 60.0
# A max below this stays as it is: half a unit in its last place, 8192 times, is 2e-6.
FINE = 2.0**-7
# Bounds of what is moved, far enough from overflow for the next tokens.
LARGEST, SMALLEST = 1e30, 1e-30


@inlined
def _difference(a, b):
    """Return a - b rounded, and what the rounding left."""
    high = a - b
    back = high - a
    low = (a - (high - back)) - (b + back)
    return high, select(absolute(low) < 1.0, low, 0.0)


@inlined
def _weight(d, low):
    """Return whether the past keeps its scale, and the weight of the token, or else of the past."""
    near = d >= -REACH
    E = exp(select(near, 0.0 - d, d))
    return near, fma(E, select(near, 0.0 - low, low), E)


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
    shape,  # 1, C, B
    work,  # vectors in a block of channels, first and last unit: one sequence of one block
    storage,
    sums,
):
    _, C, B = shape
    width, first, last = work
    lanes = VECTOR_BYTES // sums.itemsize
    blocks = -(-C // (width * lanes))
    for unit in range(first, last):
        n, c_first = unit // blocks, unit % blocks * width * lanes
        for c in range(c_first, min(c_first + width * lanes, C), lanes):
            c = min(c, C - lanes)
            index = n * C + c
            w, u = load_w(w_ptr, c, sums), load(u_ptr, c, sums)
            k, v = load(k_ptr, index, storage), load(v_ptr, index, storage)
            num, den, scale = load_state(num_ptr, den_ptr, max_ptr, index, sums)
            gap, gap_low = _difference(scale, k)
            d, low = _difference(gap, u)
            near, E = _weight(d, gap_low + low)
            a, b = add(near, E, num, den, v)
            store(y_ptr, index, ratio(a, b), storage)

            d, low = _difference(gap, w)
            near, E = _weight(d, gap_low + low)
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
            store_state(state_ptr, index, B * C, num, den, scale, sums)


def wkv_step(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, num: Tensor, den: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y_t [B, C] and the next state [3, B, C]."""
    dtype = num.dtype
    if not fits(k, dtype):
        y, state = wkv_step(*fitted(dtype, w, u, k, v, num, den, scale))
        C = k.shape[-1]
        return y[..., :C].to(v.dtype).contiguous(), state[..., :C].contiguous()
    B, C = k.shape
    w, u = w.to(dtype).contiguous(), u.to(dtype).contiguous()
    y, state = torch.empty_like(v), num.new_empty((3, B, C))
    pointers = [t.data_ptr() for t in (w, u, k, v, num, den, scale, y, state)]
    tags = TAGS[k.dtype], TAGS[dtype]
    run(
        B,
        C,
        k.numel(),
        dtype,
        lambda share: _wkv_step_kernel(*pointers, (1, C, B), share, *tags),
    )
    return y, state
