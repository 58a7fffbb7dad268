"""WKV on the CPU, one SIMD vector of channels at a time. Here the forward pass; wkv_bwd.py has the adjoint.

The past is num, den and a running exponent p: Σ e^{k_i - age_i w} v_i = num e^p, and the same without v_i den e^p.
One exponential serves a sum of two terms, since the larger one is given the weight 1:

    d = p_{t-1} - k_t     E = e^{-|d - u|}    d >= u (the past is heavier):  y_t = (num + E v_t) / (den + E)
                                              else                           y_t = (E num + v_t) / (E den + 1)
                          E = e^{-|d - w|}    d >= w:  num += E v_t,  den += E,  p_t = p_{t-1} - w
                                              else     num = E num + v_t,  den = E den + 1,  p_t = k_t

Decay over n steps is n w, computed once: p = anchor - age w, where the anchor is the last key that was heavier than
the past. Subtracting w again and again would drift, by 1e-4 in some thousand steps. In d the anchor and the key meet
first: both may be near 60 and their difference small. Where p must become one number (a final state, a checkpoint),
the residue of its rounding goes into num and den.

The empty state has num = den = 0, and the lowest finite float32 as its anchor, so that infinities are never subtracted
from each other. k = -inf has the weight E = 0, and the rest follows.

For the backward pass the state at every few tokens is kept. Work is split over sequences and channels, never over
time: results do not depend on the number of threads.
"""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.cpu.launch import addresses, fits, fitted, run, sequence_bounds
from fastwkv.kernels.cpu.numerics import TAGS, exp, kernel, load, prefetch, store
from fastwkv.kernels.cpu.vectors import VECTOR_BYTES, absolute, fma, select
from fastwkv.kernels.cpu.wkv_bwd import wkv_bwd
from fastwkv.kernels.cpu.wkv_entry import entry_states
from fastwkv.kernels.cpu.wkv_state import (
    add,
    empty_state,
    load_packed,
    load_w,
    locate,
    ratio,
    rounded,
    store_packed,
    tokens_kept,
)
from fastwkv.kernels.cpu.wkv_step import wkv_step
from fastwkv.kernels.launch import accumulation_dtype, checkpoint_shape

__all__ = ["wkv_bwd", "wkv_fwd", "wkv_step"]


@kernel
def _wkv_fwd_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    y_ptr,  # [B, T, C]
    initial_ptr,  # [3, N, C] or 0
    final_ptr,  # [3, N, C]
    checkpoint_ptr,  # [B, 3 ceil(T / kept), C] or 0
    bounds,  # where the sequences of one batch row begin and end
    shape,  # T, C, N
    work,  # channels in a block, first and last unit of work
    storage,  # tag of k, v, y
    sums,  # tag of the rest
):
    T, C, N = shape
    width, first, last = work
    lanes, kept = VECTOR_BYTES // sums.itemsize, tokens_kept(sums.itemsize)
    grid = -(-T // kept)
    carried = np.empty(4 * width + lanes, sums.dtype)
    state = carried.ctypes.data
    state += -state % VECTOR_BYTES
    for unit in range(first, last):
        n, batch, start, stop, c_first, c_last = locate(unit, width, C, bounds)
        for row in range(start - start % kept, max(stop, start + 1), kept):  # once for an empty sequence too
            for x in range(c_first, c_last, lanes):
                # The last vector of an odd C overlaps the one before it, and writes the same numbers there.
                c, at = min(x, C - lanes), 4 * (x - c_first)
                w, u = load_w(w_ptr, c, sums), load(u_ptr, c, sums)
                minus_w = 0.0 - w
                num, den, anchor = empty_state(sums)
                age = num
                if row > start:
                    num, den, anchor = load_packed(state, at, lanes, sums)
                    age = load(state, at + 3 * lanes, sums)
                elif initial_ptr != 0:
                    num, den, anchor = load_packed(initial_ptr, n * C + c, N * C, sums)
                if checkpoint_ptr != 0 and start <= row < stop:
                    index = (batch * grid + row // kept) * 3 * C + c
                    a, b, scale = rounded(num, den, anchor, age, minus_w)
                    store_packed(checkpoint_ptr, index, C, a, b, scale, sums)
                for t in range(max(row, start), min(row + kept, stop)):
                    index = (batch * T + t) * C + c
                    k, v = load(k_ptr, index, storage), load(v_ptr, index, storage)
                    prefetch(k_ptr, index + kept * C, storage)
                    prefetch(v_ptr, index + kept * C, storage)
                    gap = fma(age, minus_w, anchor - k)
                    d = gap - u
                    a, b = add(d >= 0.0, exp(0.0 - absolute(d)), num, den, v)
                    store(y_ptr, index, ratio(a, b), storage)
                    d = gap - w
                    heavier = d >= 0.0
                    num, den = add(heavier, exp(0.0 - absolute(d)), num, den, v)
                    anchor, age = select(heavier, anchor, k), select(heavier, age + 1.0, 0.0)
                store_packed(state, at, lanes, num, den, anchor, sums)
                store(state, at + 3 * lanes, age, sums)
                if row + kept >= stop:
                    num, den, scale = rounded(num, den, anchor, age, minus_w)
                    scale = select(den == 0.0, -np.inf, scale)
                    store_packed(final_ptr, n * C + c, N * C, num, den, scale, sums)
    return carried.size  # numba frees an array after its last use, which is here


def wkv_fwd(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    edges: Tensor | None = None,  # for GPUs
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [B, T, C], the final state [3, N, C], and with ``save`` the checkpoints for the backward pass."""
    dtype = accumulation_dtype(w, u, k, v)
    B, T, C = k.shape
    if not fits(k, dtype):
        given = v.dtype
        w, u, k, v, initial, cu_seqlens = fitted(dtype, w, u, k, v, initial, cu_seqlens)
        y, final, checkpoints = wkv_fwd(w, u, k, v, initial, cu_seqlens, save)
        y, final, checkpoints = (t[..., :C].contiguous() for t in (y, final, checkpoints))
        return y.to(given), final, checkpoints
    bounds = sequence_bounds(T, cu_seqlens)
    N = B * (len(bounds) - 1)
    w, u = w.to(dtype).contiguous(), u.to(dtype).contiguous()
    if initial is not None:
        initial = entry_states(w, u, k, initial, bounds)[0].contiguous()
    y, final = torch.empty_like(v), k.new_empty((3, N, C), dtype=dtype)
    checkpoints = k.new_empty(checkpoint_shape(B, T, C, dtype) if save else (0,), dtype=dtype)
    pointers = addresses(w, u, k, v, y, initial, final, checkpoints if save else None)
    fixed = bounds, (T, C, N)
    tags = TAGS[k.dtype], TAGS[dtype]
    run(lambda work: _wkv_fwd_kernel(*pointers, *fixed, work, *tags), N, C, k.numel(), dtype)
    return y, final, checkpoints
