"""The adjoint of the linear scan on the CPU. It is derived in kernels/linear_scan.py, under "Adjoint".

For a fixed a, ga is summed over 16 tokens, then over a sequence, then over sequences, always in the same order.
"""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.cpu.linear_scan_state import (
    ROWS,
    conjugate_product,
    load_gate,
    plus_sum,
    rounded_sum,
    scan_constants,
    times_sum,
)
from fastwkv.kernels.cpu.numerics import inlined, kernel, load, prefetch, splat, store
from fastwkv.kernels.cpu.vectors import VECTOR_BYTES
from fastwkv.kernels.cpu.wkv_state import locate
from fastwkv.kernels.cpu.work import addresses, as_complex, fits, fitted, large_empty_like, run, sequence_bounds
from fastwkv.kernels.launch import scan_dtypes


@inlined
def _token(pointers, a_index, a_step, index, step, before, q, low, storage, sums, parts, exact, log):
    """Go back over a token of one vector of channels, with ``before`` for h_{t-1}."""
    a_ptr, h_ptr, gh_ptr, gx_ptr = pointers
    re, im, a_low, a = load_gate(a_ptr, a_index, True, storage, sums, parts, log)
    gh = load(gh_ptr, index, storage)
    prefetch(a_ptr, a_index - ROWS * a_step, storage)
    prefetch(gh_ptr, index - ROWS * step, storage)
    prefetch(h_ptr, index - (ROWS + 1) * step, storage)
    q, low = plus_sum(q, low, gh, exact)
    g = rounded_sum(q, low, exact)
    ga = conjugate_product(g, before, parts)
    if log is not None:
        ga = ga * a
    store(gx_ptr, index, g, storage)
    q, low = times_sum(re, im, a_low, q, low, parts, exact, log)
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
    work,  # channels in a block, first unit of work, the one after the last
    storage,  # tag of what has a time
    sums,  # tag of the rest
    parts,  # None if numbers are real, 2 if they are complex
    exact,  # None for 16 bits
    log,  # None if a is given as it is
):
    T, C = shape
    step, a_step = steps
    width, first, stop = work
    lanes = VECTOR_BYTES // sums.itemsize
    carried = np.empty(4 * width + lanes, sums.dtype)
    state = carried.ctypes.data
    state += -state % VECTOR_BYTES
    pointers = a_ptr, h_ptr, gh_ptr, gx_ptr
    for unit in range(first, stop):
        n, batch, begin, end, c_begin, c_end = locate(unit, width, C, bounds)
        token = batch * T + (begin if step > 0 else end - 1)
        top = max(end - begin - 1, 0) // ROWS * ROWS  # 0 for an empty sequence too
        for t in range(top, -1, -ROWS):
            rows = min(ROWS, end - begin - t)
            for i in range(c_begin, c_end, lanes):
                c, at = min(i, c_end - lanes), 4 * (i - c_begin)
                zero = splat(0.0, sums)
                q = low = ga = ga_low = initial = zero
                if t < top:
                    q, low = load(state, at, sums), load(state, at + lanes, sums)
                    ga, ga_low = load(state, at + 2 * lanes, sums), load(state, at + 3 * lanes, sums)
                elif gfinal_ptr != 0:
                    q = load(gfinal_ptr, n * C + c, sums)
                if initial_ptr != 0:
                    initial = load(initial_ptr, n * C + c, sums)
                ga_rows = zero
                for j in range(t + rows - 1, t - 1, -1):
                    index, a_index = (token + j * step) * C + c, (token * step + j) * a_step + c
                    before = initial
                    if j > 0:
                        before = load(h_ptr, index - step * C, storage)
                    q, low, ga_t = _token(
                        pointers, a_index, a_step, index, step * C, before, q, low, storage, sums, parts, exact, log
                    )
                    # Here and not in the function: numba counts references to the tags of a function with branches.
                    if ga_ptr != 0:
                        store(ga_ptr, index, ga_t, storage)
                    ga_rows = ga_rows + ga_t
                ga, ga_low = plus_sum(ga, ga_low, ga_rows, exact)
                store(state, at, q, sums)
                store(state, at + lanes, low, sums)
                store(state, at + 2 * lanes, ga, sums)
                store(state, at + 3 * lanes, ga_low, sums)
                if t == 0:
                    if ga_sum_ptr != 0:
                        store(ga_sum_ptr, n * C + c, rounded_sum(ga, ga_low, exact), sums)
                    if ginitial_ptr != 0:
                        store(ginitial_ptr, n * C + c, rounded_sum(q, low, exact), sums)
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
        wide_h, wide_gh = as_complex(h), as_complex(gh)
        given = a, wide_h, initial, cu_seqlens, log, reverse, wide_gh, gfinal
        copied = wide_gh.data_ptr() != gh.data_ptr()
        ga, gx, ginitial = linear_scan_bwd(*given, wide_h.dtype, in_place=copied)
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
    constants = scan_constants(h, state_dtype, log)
    run(lambda work: _linear_scan_bwd_kernel(*arguments, work, *constants), N, C, B * T * C, state_dtype.to_real())
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
