"""The linear scan on the CPU, one SIMD vector of channels at a time. Here the forward pass; linear_scan_bwd.py has the
adjoint.

kernels/linear_scan.py holds the mathematics, kernels/notation.py explains the words. On a CPU two things differ.

Complex numbers lie in vectors as real and imaginary parts by turns. With re and im the parts of a, both written twice,
a h is re h + (-im, im) (h with its parts exchanged), a sum of two products whose errors are known like those of others.

Two vectors go side by side through 16 steps, since each step waits for the one before. Work is split over sequences and
channels, never over time: there are no chunks, and results do not depend on the number of threads. A fixed a is a row
that is read, out of the innermost cache, at every step.
"""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.cpu.linear_scan_bwd import linear_scan_bwd
from fastwkv.kernels.cpu.linear_scan_state import ROWS, load_gate, plus_sum, rounded_sum, scan_constants, times_sum
from fastwkv.kernels.cpu.numerics import inlined, kernel, load, prefetch, splat, store
from fastwkv.kernels.cpu.vectors import VECTOR_BYTES
from fastwkv.kernels.cpu.wkv_state import locate
from fastwkv.kernels.cpu.work import addresses, as_complex, fits, fitted, large_empty_like, run, sequence_bounds
from fastwkv.kernels.launch import scan_dtypes

__all__ = ["linear_scan_bwd", "linear_scan_fwd", "linear_scan_step"]


@inlined
def _token(pointers, a_index, a_ahead, index, ahead, h, low, storage, sums, parts, exact, log):
    """Take in a token of one vector of channels, and write its result."""
    a_ptr, x_ptr, h_ptr = pointers
    re, im, a_low, _ = load_gate(a_ptr, a_index, False, storage, sums, parts, log)
    x = load(x_ptr, index, storage)
    prefetch(a_ptr, a_index + a_ahead, storage)
    prefetch(x_ptr, index + ahead, storage)
    h, low = times_sum(re, im, a_low, h, low, parts, exact, log)
    h, low = plus_sum(h, low, x, exact)
    store(h_ptr, index, rounded_sum(h, low, exact), storage)
    return h, low


@kernel
def _linear_scan_fwd_kernel(
    a_ptr,  # [B, T, C] or [C]
    x_ptr,  # [B, T, C]
    h_ptr,  # [B, T, C]
    initial_ptr,  # [N, C] or 0
    final_ptr,  # [N, C]
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
    carried = np.empty(2 * width + 3 * lanes, sums.dtype)
    state = carried.ctypes.data
    state += -state % VECTOR_BYTES
    pointers = a_ptr, x_ptr, h_ptr
    for unit in range(first, stop):
        n, batch, begin, end, c_begin, c_end = locate(unit, width, C, bounds)
        token = batch * T + (begin if step > 0 else end - 1)
        for t in range(0, max(end - begin, 1), ROWS):  # once for an empty sequence too
            rows = min(ROWS, end - begin - t)
            for i in range(c_begin, c_end, 2 * lanes):
                # Where there is no second vector, or only part of one, it overlaps the first, and the same numbers are
                # written twice.
                c, d, at = min(i, c_end - lanes), min(i + lanes, c_end - lanes), 2 * (i - c_begin)
                low_c = low_d = h_c = h_d = splat(0.0, sums)
                if t > 0:
                    h_c, low_c = load(state, at, sums), load(state, at + lanes, sums)
                    h_d, low_d = load(state, at + 2 * lanes, sums), load(state, at + 3 * lanes, sums)
                elif initial_ptr != 0:
                    h_c, h_d = load(initial_ptr, n * C + c, sums), load(initial_ptr, n * C + d, sums)
                index, a_index = (token + t * step) * C, (token * step + t) * a_step
                ahead, a_ahead = ROWS * C * step, ROWS * a_step
                for _ in range(rows):
                    h_c, low_c = _token(
                        pointers, a_index + c, a_ahead, index + c, ahead, h_c, low_c, storage, sums, parts, exact, log
                    )
                    h_d, low_d = _token(
                        pointers, a_index + d, a_ahead, index + d, ahead, h_d, low_d, storage, sums, parts, exact, log
                    )
                    index += step * C
                    a_index += a_step
                store(state, at, h_c, sums)
                store(state, at + lanes, low_c, sums)
                store(state, at + 2 * lanes, h_d, sums)
                store(state, at + 3 * lanes, low_d, sums)
                if t + rows == end - begin:
                    store(final_ptr, n * C + c, rounded_sum(h_c, low_c, exact), sums)
                    store(final_ptr, n * C + d, rounded_sum(h_d, low_d, exact), sums)
    return carried.size  # numba frees an array after its last use, which is here


def linear_scan_fwd(
    a: Tensor,
    x: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    log: bool,
    reverse: bool,
    edges: Tensor | None = None,  # for GPUs
) -> tuple[Tensor, Tensor]:
    """Return h [B, T, C] and the final state [N, C]."""
    if x.dim() == 4:
        h, final = linear_scan_fwd(a, as_complex(x), initial, cu_seqlens, log, reverse)
        return torch.view_as_real(h).to(x.dtype), final
    dtype, state_dtype = scan_dtypes(a, x)
    B, T, C = x.shape
    a, x = a.to(dtype), x.to(dtype)
    if not fits(x, state_dtype):
        a, x, initial, cu_seqlens = fitted(state_dtype, a, x, initial, cu_seqlens)
        h, final = linear_scan_fwd(a, x, initial, cu_seqlens, log, reverse)
        return h[..., :C].to(dtype).contiguous(), final[..., :C].contiguous()
    bounds = sequence_bounds(T, cu_seqlens)
    a, x, initial = a.contiguous(), x.contiguous(), None if initial is None else initial.contiguous()
    N = B * (len(bounds) - 1)
    h, final = large_empty_like(x), x.new_empty((N, C), dtype=state_dtype)
    C *= 2 if x.is_complex() else 1
    step = -1 if reverse else 1
    arguments = *addresses(a, x, h, initial, final), bounds, (T, C), (step, 0 if a.dim() == 1 else step * C)
    constants = scan_constants(x, state_dtype, log)
    run(lambda work: _linear_scan_fwd_kernel(*arguments, work, *constants), N, C, B * T * C, state_dtype.to_real())
    return h, final


def linear_scan_step(a: Tensor, x: Tensor, state: Tensor, log: bool) -> Tensor:
    """Return a state + x."""
    x = as_complex(x) if x.dim() == 3 else x
    if log:
        # One number of float32 is not enough for e^{log a} near 1, here either.
        return torch.addcmul(x.double(), a.double().exp(), state.double()).to(state.dtype)
    return torch.addcmul(x.to(state.dtype), a.to(state.dtype), state)
