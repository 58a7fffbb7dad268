"""The adjoint of WKV on the CPU. It is derived in kernels/wkv.py, under "Adjoint".

The forward pass has kept its state at every few tokens. From there the rows are computed once more, into scratch that
stays in the innermost cache, and then gone through backwards.

gw and gu are summed over these rows, then over a sequence, then over sequences, always in the same order.
"""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.cpu.numerics import TAGS, inlined, kernel, load, prefetch, splat, store
from fastwkv.kernels.cpu.vectors import VECTOR_BYTES, any_true, fma, select
from fastwkv.kernels.cpu.wkv_entry import entry_states, with_lift
from fastwkv.kernels.cpu.wkv_state import absorb, checkpoint_rows, empty_state, load_rate, load_state, locate, weigh
from fastwkv.kernels.cpu.work import addresses, fits, fitted, run, sequence_bounds
from fastwkv.kernels.launch import accumulation_dtype

# Vectors in scratch for each row, in this order: r, kept, slope, α, gy s, gy (1 - s), den.
ROW_VALUES = 7


@inlined
def _recompute_rows(k_ptr, v_ptr, gy_ptr, index, rows, C, w, u, num, den, anchor, scratch, storage, sums):
    """Fill scratch with what the reverse pass needs of some rows."""
    lanes = VECTOR_BYTES // sums.itemsize
    minus_w, age, ahead = 0.0 - w, splat(0.0, sums), checkpoint_rows(sums.itemsize)
    weight = select(den == 0.0, 1.0, den)
    inverse = 1.0 / weight
    for i in range(rows):
        k, v, gy = load(k_ptr, index, storage), load(v_ptr, index, storage), load(gy_ptr, index, storage)
        prefetch(k_ptr, index - ahead * C, storage)
        prefetch(v_ptr, index - ahead * C, storage)
        prefetch(gy_ptr, index - ahead * C, storage)
        delta = v - num * inverse
        gap = fma(age, minus_w, anchor - k)
        at = i * ROW_VALUES * lanes

        heavier, e = weigh(gap - u)
        now, past = select(heavier, e, 1.0), select(heavier, 1.0, e)
        both = fma(past, den, now)
        inverse_both = select(both == 0.0, 0.0, 1.0 / both)
        s, gy_past = now * inverse_both, gy * (past * weight * inverse_both)
        store(scratch, at + 3 * lanes, gy_past * s * delta, sums)
        store(scratch, at + 4 * lanes, gy * s, sums)
        store(scratch, at + 5 * lanes, gy_past, sums)
        store(scratch, at + 6 * lanes, den, sums)

        heavier, e = weigh(gap - w)
        now, past = select(heavier, e, 1.0), select(heavier, 1.0, e) * weight
        num, den = absorb(heavier, e, num, den, v)
        anchor, age = select(heavier, anchor, k), select(heavier, age + 1.0, 0.0)
        weight = select(den == 0.0, 1.0, den)
        inverse = 1.0 / weight
        r, kept = now * inverse, past * inverse
        # Thousands of these are multiplied with each other: without this correction, where nothing is added they
        # would be den (1 / den), which is often 1 - 6e-8 (and gw ten times less accurate at T = 8192).
        kept = fma(fma(0.0 - kept, weight, past), inverse, kept)
        store(scratch, at, r, sums)
        store(scratch, at + lanes, kept, sums)
        store(scratch, at + 2 * lanes, r * kept * delta, sums)
        index += C


@inlined
def _reverse_rows(gk_ptr, gv_ptr, index, rows, C, gm, gl, gw, gu, never_zero, scratch, storage, sums):
    """Go back over the rows in scratch. ``never_zero`` says that the past has a den > 0 at all of them."""
    lanes = VECTOR_BYTES // sums.itemsize
    gw_rows, gu_rows = splat(0.0, sums), splat(0.0, sums)
    for i in range(rows - 1, -1, -1):
        at, out = i * ROW_VALUES * lanes, index + i * C
        r, kept = load(scratch, at, sums), load(scratch, at + lanes, sums)
        alpha, beta = load(scratch, at + 3 * lanes, sums), gm * load(scratch, at + 2 * lanes, sums)
        gl_past = gl * kept
        both, gw_term, gu_term = alpha + beta, beta - gl_past, alpha
        gl_next = gl_past - both
        if not never_zero:  # that an empty state counts as den = 1 is for num and den alone
            unseen = load(scratch, at + 6 * lanes, sums) == 0.0
            both, gw_term = select(unseen, 0.0, both), select(unseen, 0.0, gw_term)
            gu_term = select(unseen, 0.0, gu_term)
        store(gk_ptr, out, fma(gl, r, both), storage)
        store(gv_ptr, out, fma(gm, r, load(scratch, at + 4 * lanes, sums)), storage)
        gw_rows, gu_rows = gw_rows + gw_term, gu_rows + gu_term
        gl, gm = gl_next, fma(gm, kept, load(scratch, at + 5 * lanes, sums))
    return gm, gl, gw + gw_rows, gu + gu_rows


@inlined
def _load_four(ptr, at, stride, sums):
    return (
        load(ptr, at, sums),
        load(ptr, at + stride, sums),
        load(ptr, at + 2 * stride, sums),
        load(ptr, at + 3 * stride, sums),
    )


@inlined
def _store_pair(ptr, at, stride, a, b, sums):
    store(ptr, at, a, sums)
    store(ptr, at + stride, b, sums)


@kernel
def _wkv_bwd_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    initial_ptr,  # [3, N, C] or 0
    checkpoint_ptr,  # [B, 3 ceil(T / rows), C]
    gy_ptr,  # [B, T, C]
    gfinal_ptr,  # [2, N, C] or 0: gm and gl
    gwu_ptr,  # [2, N, C]: gw and gu of each sequence
    gk_ptr,  # [B, T, C]
    gv_ptr,  # [B, T, C]
    ginitial_ptr,  # [2, N, C]: gm and gl
    bounds,  # where the sequences of one batch row begin and end
    shape,  # T, C, N
    work,  # channels in a block, first unit of work, the one after the last
    storage,  # tag of k, v, gy, gk, gv
    sums,  # tag of the rest
):
    T, C, N = shape
    width, first, stop = work
    lanes, tile_rows = VECTOR_BYTES // sums.itemsize, checkpoint_rows(sums.itemsize)
    blocks = -(-T // tile_rows)
    carried = np.empty(4 * width + (tile_rows * ROW_VALUES + 1) * lanes, sums.dtype)
    state = carried.ctypes.data
    state += -state % VECTOR_BYTES
    scratch = state + 4 * width * sums.itemsize
    for unit in range(first, stop):
        n, batch, begin, end, c_begin, c_end = locate(unit, width, C, bounds)
        top = max(end - 1, begin) // tile_rows  # an empty sequence has no rows there, but adjoints that go through
        for j in range(top, begin // tile_rows - 1, -1):
            t = max(j * tile_rows, begin)
            rows = min((j + 1) * tile_rows, end) - t
            for i in range(c_begin, c_end, lanes):
                # The last vector of an odd C overlaps the one before it, and writes the same numbers there.
                c, at = min(i, C - lanes), 4 * (i - c_begin)
                w, u, index = load_rate(w_ptr, c, sums), load(u_ptr, c, sums), (batch * T + t) * C + c
                num, den, anchor = empty_state(sums)
                if t > begin:
                    num, den, anchor = load_state(checkpoint_ptr, (batch * blocks + j) * 3 * C + c, C, sums)
                elif initial_ptr != 0:
                    num, den, anchor = load_state(initial_ptr, n * C + c, N * C, sums)
                _recompute_rows(k_ptr, v_ptr, gy_ptr, index, rows, C, w, u, num, den, anchor, scratch, storage, sums)
                gm = gl = gw = gu = splat(0.0, sums)
                if j < top:
                    gm, gl, gw, gu = _load_four(state, at, lanes, sums)
                elif gfinal_ptr != 0:
                    gm, gl = load(gfinal_ptr, n * C + c, sums), load(gfinal_ptr, (N + n) * C + c, sums)
                out = gk_ptr, gv_ptr, index, rows, C
                if initial_ptr != 0 and any_true(den == 0.0):
                    gm, gl, gw, gu = _reverse_rows(*out, gm, gl, gw, gu, False, scratch, storage, sums)
                else:
                    gm, gl, gw, gu = _reverse_rows(*out, gm, gl, gw, gu, True, scratch, storage, sums)
                _store_pair(state, at, lanes, gm, gl, sums)
                _store_pair(state, at + 2 * lanes, lanes, gw, gu, sums)
                if t == begin:
                    _store_pair(gwu_ptr, n * C + c, N * C, gw, gu, sums)
                    if initial_ptr != 0:
                        _store_pair(ginitial_ptr, n * C + c, N * C, gm, gl, sums)
    return carried.size  # numba frees an array after its last use, which is here


def wkv_bwd(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    gy: Tensor,
    gfinal: Tensor | None,
    edges: Tensor | None = None,  # for GPUs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gw, gu, gk, gv and (gm, gl) [2, N, C] of the initial state, or an empty tensor where there was none.

    ``gfinal`` is (gm, gl) of the final state.
    """
    dtype = accumulation_dtype(w, u, k, v)
    B, T, C = k.shape
    if not fits(k, dtype):
        results = wkv_bwd(*fitted(dtype, w, u, k, v, initial, cu_seqlens, checkpoints, gy, gfinal))
        gw, gu, gk, gv, ginitial = (t[..., :C].contiguous() for t in results)
        return gw.to(w.dtype), gu.to(u.dtype), gk.to(k.dtype), gv.to(v.dtype), ginitial
    bounds = sequence_bounds(T, cu_seqlens)
    N = B * (len(bounds) - 1)
    rates = w.to(dtype).contiguous(), u.to(dtype).contiguous()
    lift = None
    if initial is not None:
        initial, lift = entry_states(*rates, k, initial, bounds)
    gy, checkpoints = gy.contiguous(), checkpoints.contiguous()
    initial, gfinal = (None if t is None else t.contiguous() for t in (initial, gfinal))
    gwu, gk, gv = k.new_empty((2, N, C), dtype=dtype), torch.empty_like(k), torch.empty_like(v)
    ginitial = gwu.new_empty(0 if initial is None else (2, N, C))
    pointers = addresses(*rates, k, v, initial, checkpoints, gy, gfinal, gwu, gk, gv, ginitial)
    shape, tags = (T, C, N), (TAGS[k.dtype], TAGS[dtype])
    run(lambda work: _wkv_bwd_kernel(*pointers, bounds, shape, work, *tags), N, C, k.numel(), dtype)
    # numpy adds the sequences one after the other, whatever the number of threads.
    gw, gu = (torch.from_numpy(g.numpy().sum(0, dtype=np.float64)) for g in gwu)
    return gw.to(w.dtype), gu.to(u.dtype), gk, gv, with_lift(ginitial, lift)
