"""The adjoint of the linear scan on the CPU: a scan in the other direction of time, with the conjugate of a.

    g_t = gh_t + q_{t+1}     q_t = conj(a_t) g_t          after the last token q is the gradient of the final state
    gx_t = g_t               ga_t = g_t conj(h_{t-1})     before the first token q is that of the initial state

For a = e^{log a} the gradient of log a is ga conj(a). g is carried as h is in linear_scan.py, as a sum of two numbers.

A fixed a has the sum of ga over all tokens: over 16 of them, then over a sequence, then over sequences, always in the
same order.
"""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.cpu.launch import addresses, as_complex, fits, fitted, large_empty_like, run, sequence_bounds
from fastwkv.kernels.cpu.linear_scan_state import (
    ROWS,
    added,
    conjugate_product,
    kind,
    load_multiplier,
    scaled,
    total,
)
from fastwkv.kernels.cpu.numerics import inlined, kernel, load, prefetch, splat, store
from fastwkv.kernels.cpu.vectors import VECTOR_BYTES
from fastwkv.kernels.cpu.wkv_state import locate
from fastwkv.kernels.launch import scan_dtypes


@inlined
def _token(pointers, a_index, a_step, index, step, before, q, low, storage, sums, pairs, exact, log):
    """Go back over a token of one vector of channels, with ``before`` for h_{t-1}."""
    a_ptr, h_ptr, gh_ptr, gx_ptr = pointers
    re, im, a_low, a = load_multiplier(a_ptr, a_index, True, storage, sums, pairs, log)
    gh = load(gh_ptr, index, storage)
    prefetch(a_ptr, a_index - ROWS * a_step, storage)
    prefetch(gh_ptr, index - ROWS * step, storage)
    prefetch(h_ptr, index - (ROWS + 1) * step, storage)
    q, low = added(q, low, gh, exact)
    g = total(q, low, exact)
    ga = conjugate_product(g, before, pairs)
    if log is not None:
        ga = ga * a
    store(gx_ptr, index, g, storage)
    q, low = scaled(re, im, a_low, q, low, pairs, exact, log)
    return q, low, ga


@kernel
def _linear_scan_bwd_kernel(
    a_ptr,  # [B, T, C] or [C]
    h_ptr,  # [B, T, C]
    gh_ptr,  # [B, T, C]
    initial_ptr,  # [N, C] or 0
    gfinal_ptr,  # [N, C] or 0
    gx_ptr,  # [B, T, C]
    ga_ptr,  # [B, T, C], or 0 if a is [C]
    ga_sum_ptr,  # [N, C] or 0: for a fixed a its gradient from each sequence
    ginitial_ptr,  # [N, C] or 0
    bounds,  # where the sequences of one batch row begin and end
    shape,  # T, C
    steps,  # from one token to the next in the order of the scan: rows of x (1 or -1), elements of a (0 if it is fixed)
    work,  # channels in a block, first and last unit of work
    storage,  # tag of what has a time
    sums,  # tag of the rest
    pairs,  # None if numbers are real
    exact,  # None for 16 bits
    log,  # None if a is given as it is
):
    T, C = shape
    step, a_step = steps
    width, first, last = work
    lanes = VECTOR_BYTES // sums.itemsize
    carried = np.empty(4 * width + lanes, sums.dtype)
    state = carried.ctypes.data
    state += -state % VECTOR_BYTES
    pointers = a_ptr, h_ptr, gh_ptr, gx_ptr
    for unit in range(first, last):
        n, batch, start, stop, c_first, c_last = locate(unit, width, C, bounds)
        token = batch * T + (start if step > 0 else stop - 1)
        top = max(stop - start - 1, 0) // ROWS * ROWS  # 0 for an empty sequence too
        for row in range(top, -1, -ROWS):
            rows = min(ROWS, stop - start - row)
            for i in range(c_first, c_last, lanes):
                c, at = min(i, c_last - lanes), 4 * (i - c_first)
                zero = splat(0.0, sums)
                q = low = ga = ga_low = initial = zero
                if row < top:
                    q, low = load(state, at, sums), load(state, at + lanes, sums)
                    ga, ga_low = load(state, at + 2 * lanes, sums), load(state, at + 3 * lanes, sums)
                elif gfinal_ptr != 0:
                    q = load(gfinal_ptr, n * C + c, sums)
                if initial_ptr != 0:
                    initial = load(initial_ptr, n * C + c, sums)
                block = zero
                for j in range(row + rows - 1, row - 1, -1):
                    index, a_index = (token + j * step) * C + c, (token * step + j) * a_step + c
                    before = initial
                    if j > 0:
                        before = load(h_ptr, index - step * C, storage)
                    q, low, ga_t = _token(
                        pointers, a_index, a_step, index, step * C, before, q, low, storage, sums, pairs, exact, log
                    )
                    # Here and not in the function: numba counts references to the tags of a function with branches.
                    if ga_ptr != 0:
                        store(ga_ptr, index, ga_t, storage)
                    block = block + ga_t
                ga, ga_low = added(ga, ga_low, block, exact)
                store(state, at, q, sums)
                store(state, at + lanes, low, sums)
                store(state, at + 2 * lanes, ga, sums)
                store(state, at + 3 * lanes, ga_low, sums)
                if row == 0:
                    if ga_sum_ptr != 0:
                        store(ga_sum_ptr, n * C + c, total(ga, ga_low, exact), sums)
                    if ginitial_ptr != 0:
                        store(ginitial_ptr, n * C + c, total(q, low, exact), sums)
    return carried.size  # numba frees an array after its last use, which is here


def linear_scan_bwd(
    a: Tensor,
    h: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    log: bool,
    reverse: bool,
    gh: Tensor,
    gfinal: Tensor | None,
    dtype: torch.dtype,
    edges: Tensor | None = None,  # for GPUs
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ga, gx and the gradient of the initial state, or an empty tensor where there was none.

    ``dtype`` is that of gx, which is written over gh if that is wanted and possible.
    """
    if h.dim() == 4:
        wide, total = as_complex(h), as_complex(gh)
        given = a, wide, initial, cu_seqlens, log, reverse, total, gfinal
        ga, gx, ginitial = linear_scan_bwd(*given, wide.dtype, in_place=total.data_ptr() != gh.data_ptr())  # a copy
        gx = torch.view_as_real(gx)
        return ga, gh.copy_(gx) if in_place else gx.to(dtype), ginitial
    state_dtype = scan_dtypes(a, h)[1]
    B, T, C = h.shape
    a_dtype, a = a.dtype, a.to(h.dtype)
    if not fits(h, state_dtype):
        a, h, initial, cu_seqlens, gh, gfinal = fitted(state_dtype, a, h, initial, cu_seqlens, gh, gfinal)
        results = linear_scan_bwd(a, h, initial, cu_seqlens, log, reverse, gh, gfinal, dtype)
        ga, gx, ginitial = (t[..., :C].contiguous() for t in results)
        return ga.to(a_dtype), gx, ginitial
    bounds = sequence_bounds(T, cu_seqlens)
    N = B * (len(bounds) - 1)
    a, h, gh = a.contiguous(), h.contiguous(), gh.contiguous()
    initial, gfinal = (None if t is None else t.contiguous() for t in (initial, gfinal))
    fixed = a.dim() == 1
    # The last vector of a row of channels may overlap with the one before, and would read what that has written.
    in_place &= C * state_dtype.itemsize % VECTOR_BYTES == 0
    gx = gh if in_place else large_empty_like(h)
    ga = h.new_empty((N, C), dtype=state_dtype) if fixed else large_empty_like(h)
    ginitial = h.new_empty(0 if initial is None else (N, C), dtype=state_dtype)
    C *= 2 if h.is_complex() else 1
    step = -1 if reverse else 1
    gradients = gx, None if fixed else ga, ga if fixed else None, None if initial is None else ginitial
    pointers = addresses(a, h, gh, initial, gfinal, *gradients)
    arguments = *pointers, bounds, (T, C), (step, 0 if fixed else step * C)
    tags = kind(h, state_dtype, log)
    run(lambda work: _linear_scan_bwd_kernel(*arguments, work, *tags), N, C, B * T * C, state_dtype.to_real())
    if fixed:
        # numpy adds the sequences one after the other, whatever the number of threads.
        ga = torch.from_numpy(ga.numpy().sum(0, dtype=np.complex128 if h.is_complex() else np.float64))
    return ga.to(a_dtype), gx.to(dtype), ginitial


def linear_scan_bwd_(
    a: Tensor,
    h: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    log: bool,
    reverse: bool,
    gh: Tensor,
    gfinal: Tensor | None,
    edges: Tensor | None = None,  # for GPUs
) -> tuple[Tensor, Tensor]:
    """Write gx over gh; return ga and the gradient of the initial state."""
    ga, gx, ginitial = linear_scan_bwd(
        a, h, initial, cu_seqlens, log, reverse, gh, gfinal, gh.dtype, in_place=gh.is_contiguous()
    )
    if gx.data_ptr() != gh.data_ptr():
        gh.copy_(gx)
    return ga, ginitial
