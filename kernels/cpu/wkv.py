"""WKV on the CPU, one SIMD vector of channels at a time. Here the forward pass; wkv_bwd.py has the adjoint.

kernels/wkv.py holds the mathematics, kernels/notation.py explains the words. A CPU computes a step in this form:

    e = e^{-|gap - u|}    gap >= u (the past is heavier):  y_t = (num + e v_t) / (den + e)
                          else                             y_t = (e num + v_t) / (e den + 1)
    e = e^{-|gap - w|}    gap >= w:  num += e v_t,  den += e,  p_t = p_{t-1} - w
                          else       num = e num + v_t,  den = e den + 1,  p_t = k_t

One exponential serves a sum of two terms, and it is the terms that are chosen by which is heavier, not their weights:
each sum is one fused multiply-add. The empty state has den = 0 in registers too, since a division by 0 is easily
avoided here.

Work is split over sequences and channels, never over time: there are no chunks, and results do not depend on the number
of threads.
"""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.cpu.numerics import TAGS, kernel, load, prefetch, store
from fastwkv.kernels.cpu.vectors import VECTOR_BYTES, fma, select
from fastwkv.kernels.cpu.wkv_bwd import wkv_bwd
from fastwkv.kernels.cpu.wkv_entry import entry_states
from fastwkv.kernels.cpu.wkv_state import (
    absorb,
    checkpoint_rows,
    empty_state,
    fold_age,
    load_rate,
    load_state,
    locate,
    ratio,
    store_state,
    weigh,
)
from fastwkv.kernels.cpu.wkv_step import wkv_step
from fastwkv.kernels.cpu.work import addresses, fits, fitted, run, sequence_bounds
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
    checkpoint_ptr,  # [B, 3 ceil(T / rows), C] or 0
    bounds,  # where the sequences of one batch row begin and end
    shape,  # T, C, N
    work,  # channels in a block, first unit of work, the one after the last
    storage,  # tag of k, v, y
    sums,  # tag of the rest
):
    T, C, N = shape
    width, first, stop = work
    lanes, rows = VECTOR_BYTES // sums.itemsize, checkpoint_rows(sums.itemsize)
    blocks = -(-T // rows)
    carried = np.empty(4 * width + lanes, sums.dtype)
    state = carried.ctypes.data
    state += -state % VECTOR_BYTES
    for unit in range(first, stop):
        n, batch, begin, end, c_begin, c_end = locate(unit, width, C, bounds)
        for tile in range(begin - begin % rows, max(end, begin + 1), rows):  # once for an empty sequence too
            for i in range(c_begin, c_end, lanes):
                # The last vector of an odd C overlaps the one before it, and writes the same numbers there.
                c, at = min(i, C - lanes), 4 * (i - c_begin)
                w, u = load_rate(w_ptr, c, sums), load(u_ptr, c, sums)
                minus_w = 0.0 - w
                num, den, anchor = empty_state(sums)
                age = num
                if tile > begin:
                    num, den, anchor = load_state(state, at, lanes, sums)
                    age = load(state, at + 3 * lanes, sums)
                elif initial_ptr != 0:
                    num, den, anchor = load_state(initial_ptr, n * C + c, N * C, sums)
                if checkpoint_ptr != 0 and begin <= tile < end:
                    index = (batch * blocks + tile // rows) * 3 * C + c
                    store_state(checkpoint_ptr, index, C, *fold_age(num, den, anchor, age, minus_w), sums)
                for t in range(max(tile, begin), min(tile + rows, end)):
                    index = (batch * T + t) * C + c
                    k, v = load(k_ptr, index, storage), load(v_ptr, index, storage)
                    prefetch(k_ptr, index + rows * C, storage)
                    prefetch(v_ptr, index + rows * C, storage)
                    gap = fma(age, minus_w, anchor - k)
                    heavier, e = weigh(gap - u)
                    y_num, y_den = absorb(heavier, e, num, den, v)
                    store(y_ptr, index, ratio(y_num, y_den), storage)
                    heavier, e = weigh(gap - w)
                    num, den = absorb(heavier, e, num, den, v)
                    anchor, age = select(heavier, anchor, k), select(heavier, age + 1.0, 0.0)
                store_state(state, at, lanes, num, den, anchor, sums)
                store(state, at + 3 * lanes, age, sums)
                if tile + rows >= end:
                    num, den, p = fold_age(num, den, anchor, age, minus_w)
                    p = select(den == 0.0, -np.inf, p)
                    store_state(final_ptr, n * C + c, N * C, num, den, p, sums)
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
    shape, tags = (T, C, N), (TAGS[k.dtype], TAGS[dtype])
    run(lambda work: _wkv_fwd_kernel(*pointers, bounds, shape, work, *tags), N, C, k.numel(), dtype)
    return y, final, checkpoints
