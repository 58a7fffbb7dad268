"""The linear scan on the CPU, one SIMD vector of channels at a time. Here the forward pass; linear_scan_bwd.py has the
adjoint.

    h_t = a_t h_{t-1} + x_t

h is carried as a sum of two numbers that is never rounded to one: h, which is what a loop without any care would have,
and low, which is what the roundings of h have left. Both errors are known exactly, that of a product from a fused
multiply-add and that of a sum from further sums (Knuth's):

    p = a h        e = fma(a, h, -p)          a h = p + e
    s = p + x      f = the error of s         p + x = s + f          h_t = s,   low_t = a low_{t-1} + e + f

What is written is h + low, rounded once: however many steps there are, and even if none forgets anything (|a| = 1), a
result is about as exact as the last rounding. Memory is the limit, so that this costs little. Sums for 16 bits do
without it.

Complex numbers lie in vectors as real and imaginary parts by turns. With re and im the parts of a, both written twice,
a h is re h + (-im, im) (h with its parts exchanged), a sum of two products whose errors are known in the same way.

A gate e^{log a} too is a sum of two numbers: near 1, e^x - 1 is known far better than e^x can be written. With one
float32, h is wrong by 5e-5 after 8192 steps of log a = -1e-4.

Two vectors go side by side through 16 steps, since each step waits for the one before. Work is split over sequences and
channels, never over time: results do not depend on the number of threads. A fixed a is a row that is read, out of the
innermost cache, at every step.
"""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.cpu.launch import addresses, as_complex, fits, fitted, large_empty_like, run, sequence_bounds
from fastwkv.kernels.cpu.linear_scan_bwd import linear_scan_bwd
from fastwkv.kernels.cpu.linear_scan_state import ROWS, added, kind, load_multiplier, scaled, total
from fastwkv.kernels.cpu.numerics import inlined, kernel, load, prefetch, splat, store
from fastwkv.kernels.cpu.vectors import VECTOR_BYTES
from fastwkv.kernels.cpu.wkv_state import locate
from fastwkv.kernels.launch import scan_dtypes

__all__ = ["linear_scan_bwd", "linear_scan_fwd", "linear_scan_step"]


@inlined
def _token(pointers, a_index, a_ahead, index, ahead, h, low, storage, sums, pairs, exact, log):
    """Take in a token of one vector of channels, and write its result."""
    a_ptr, x_ptr, h_ptr = pointers
    re, im, a_low, _ = load_multiplier(a_ptr, a_index, False, storage, sums, pairs, log)
    x = load(x_ptr, index, storage)
    prefetch(a_ptr, a_index + a_ahead, storage)
    prefetch(x_ptr, index + ahead, storage)
    h, low = scaled(re, im, a_low, h, low, pairs, exact, log)
    h, low = added(h, low, x, exact)
    store(h_ptr, index, total(h, low, exact), storage)
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
    carried = np.empty(2 * width + 3 * lanes, sums.dtype)
    state = carried.ctypes.data
    state += -state % VECTOR_BYTES
    pointers = a_ptr, x_ptr, h_ptr
    for unit in range(first, last):
        n, batch, start, stop, c_first, c_last = locate(unit, width, C, bounds)
        token = batch * T + (start if step > 0 else stop - 1)
        for row in range(0, max(stop - start, 1), ROWS):  # once for an empty sequence too
            rows = min(ROWS, stop - start - row)
            for i in range(c_first, c_last, 2 * lanes):
                # Where there is no second vector, or only part of one, it overlaps the first, and the same numbers are
                # written twice.
                c, d, at = min(i, c_last - lanes), min(i + lanes, c_last - lanes), 2 * (i - c_first)
                low_c = low_d = h_c = h_d = splat(0.0, sums)
                if row > 0:
                    h_c, low_c = load(state, at, sums), load(state, at + lanes, sums)
                    h_d, low_d = load(state, at + 2 * lanes, sums), load(state, at + 3 * lanes, sums)
                elif initial_ptr != 0:
                    h_c, h_d = load(initial_ptr, n * C + c, sums), load(initial_ptr, n * C + d, sums)
                index, a_index = (token + row * step) * C, (token * step + row) * a_step
                ahead, a_ahead = ROWS * C * step, ROWS * a_step
                for _ in range(rows):
                    h_c, low_c = _token(
                        pointers, a_index + c, a_ahead, index + c, ahead, h_c, low_c, storage, sums, pairs, exact, log
                    )
                    h_d, low_d = _token(
                        pointers, a_index + d, a_ahead, index + d, ahead, h_d, low_d, storage, sums, pairs, exact, log
                    )
                    index += step * C
                    a_index += a_step
                store(state, at, h_c, sums)
                store(state, at + lanes, low_c, sums)
                store(state, at + 2 * lanes, h_d, sums)
                store(state, at + 3 * lanes, low_d, sums)
                if row + rows == stop - start:
                    store(final_ptr, n * C + c, total(h_c, low_c, exact), sums)
                    store(final_ptr, n * C + d, total(h_d, low_d, exact), sums)
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
    tags = kind(x, state_dtype, log)
    run(lambda work: _linear_scan_fwd_kernel(*arguments, work, *tags), N, C, B * T * C, state_dtype.to_real())
    return h, final


def linear_scan_step(a: Tensor, x: Tensor, state: Tensor, log: bool) -> Tensor:
    """Return a state + x."""
    x = as_complex(x) if x.dim() == 3 else x
    if log:
        # One number of float32 is not enough for e^{log a} near 1, here either.
        return torch.addcmul(x.double(), a.double().exp(), state.double()).to(state.dtype)
    return torch.addcmul(x.to(state.dtype), a.to(state.dtype), state)
