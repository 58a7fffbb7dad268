"""The adjoint of WKV on the CPU.

With the mean of the past m = num / den, the logarithm of its weight l = p + log den (p is the running exponent of
wkv.py), δ_t = v_t - m_{t-1}, s_t the weight of a token in its own output and r_t its weight in the next state,

    α_t = gy_t s_t (1 - s_t) δ_t           gv_t = gy_t s_t + gm r_t              gu += α_t
    β_t = gm r_t (1 - r_t) δ_t             gk_t = α_t + β_t + gl r_t             gw += β_t - gl (1 - r_t)
    gl <- gl (1 - r_t) - α_t - β_t         gm <- gm (1 - r_t) + gy_t (1 - s_t)

backwards over t. 1 - s and 1 - r come from the other addend of their sums, never from a subtraction. The forward pass
has kept its state at every few tokens: from there the rows are computed once more, into scratch that stays in
the innermost cache, and then gone through backwards.

A past without weight (den = 0) has 1 - s = 1 - r = 0, and yet a gradient if its exponent is an ordinary number: a
learnable initial state that begins as zeros. There gm and gl stand for the gradients with respect to num and den
themselves, as though den were 1, and gk, gw, gu do not see them.

gw and gu are summed over these rows, then over a sequence, then over sequences, always in the same order.
"""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.cpu.launch import addresses, fits, fitted, run, sequence_bounds
from fastwkv.kernels.cpu.numerics import TAGS, exp, inlined, kernel, load, prefetch, splat, store
from fastwkv.kernels.cpu.vectors import VECTOR_BYTES, absolute, any_true, fma, select
from fastwkv.kernels.cpu.wkv_entry import entry_states, with_lift
from fastwkv.kernels.cpu.wkv_state import add, empty_state, load_packed, load_w, locate, tokens_kept
from fastwkv.kernels.launch import accumulation_dtype

# Vectors in scratch for each row: r, 1 - r, r (1 - r) δ, α, gy s, gy (1 - s), den.
ROW_VALUES = 7


@inlined
def _recompute(k_ptr, v_ptr, gy_ptr, index, rows, C, w, u, num, den, anchor, scratch, storage, sums):
    """Fill scratch with what the reverse pass needs of some rows."""
    lanes = VECTOR_BYTES // sums.itemsize
    minus_w, age, ahead = 0.0 - w, splat(0.0, sums), tokens_kept(sums.itemsize)
    unit = select(den == 0.0, 1.0, den)
    inverse = 1.0 / unit
    for i in range(rows):
        k, v, gy = load(k_ptr, index, storage), load(v_ptr, index, storage), load(gy_ptr, index, storage)
        prefetch(k_ptr, index - ahead * C, storage)
        prefetch(v_ptr, index - ahead * C, storage)
        prefetch(gy_ptr, index - ahead * C, storage)
        delta = v - num * inverse
        gap = fma(age, minus_w, anchor - k)
        row = i * ROW_VALUES * lanes

        d = gap - u
        heavier, E = d >= 0.0, exp(0.0 - absolute(d))
        now, past = select(heavier, E, 1.0), select(heavier, 1.0, E)
        total = fma(past, den, now)
        inverse_total = select(total == 0.0, 0.0, 1.0 / total)
        s, gy_past = now * inverse_total, gy * (past * unit * inverse_total)
        store(scratch, row + 3 * lanes, gy_past * s * delta, sums)
        store(scratch, row + 4 * lanes, gy * s, sums)
        store(scratch, row + 5 * lanes, gy_past, sums)
        store(scratch, row + 6 * lanes, den, sums)

        d = gap - w
        heavier, E = d >= 0.0, exp(0.0 - absolute(d))
        now, past = select(heavier, E, 1.0), select(heavier, 1.0, E) * unit
        num, den = add(heavier, E, num, den, v)
        anchor, age = select(heavier, anchor, k), select(heavier, age + 1.0, 0.0)
        unit = select(den == 0.0, 1.0, den)
        inverse = 1.0 / unit
        r, kept = now * inverse, past * inverse
        # Thousands of these are multiplied with each other: without this correction, where nothing is added they
        # would be den (1 / den), which is often 1 - 6e-8 (and gw ten times less accurate at T = 8192).
        kept = fma(fma(0.0 - kept, unit, past), inverse, kept)
        store(scratch, row, r, sums)
        store(scratch, row + lanes, kept, sums)
        store(scratch, row + 2 * lanes, r * kept * delta, sums)
        index += C


@inlined
def _reverse(gk_ptr, gv_ptr, index, rows, C, gm, gl, gw, gu, weightless, scratch, storage, sums):
    """Go back over the rows in scratch. ``weightless``: the past may have den = 0 there."""
    lanes = VECTOR_BYTES // sums.itemsize
    gw_rows, gu_rows = splat(0.0, sums), splat(0.0, sums)
    for i in range(rows - 1, -1, -1):
        row, out = i * ROW_VALUES * lanes, index + i * C
        r, kept = load(scratch, row, sums), load(scratch, row + lanes, sums)
        alpha, beta = load(scratch, row + 3 * lanes, sums), gm * load(scratch, row + 2 * lanes, sums)
        gl_kept = gl * kept
        both, gw_row, gu_row = alpha + beta, beta - gl_kept, alpha
        gl_next = gl_kept - both
        if weightless:
            nothing = load(scratch, row + 6 * lanes, sums) == 0.0
            both, gw_row = select(nothing, 0.0, both), select(nothing, 0.0, gw_row)
            gu_row = select(nothing, 0.0, gu_row)
        store(gk_ptr, out, fma(gl, r, both), storage)
        store(gv_ptr, out, fma(gm, r, load(scratch, row + 4 * lanes, sums)), storage)
        gw_rows, gu_rows = gw_rows + gw_row, gu_rows + gu_row
        gl, gm = gl_next, fma(gm, kept, load(scratch, row + 5 * lanes, sums))
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
    checkpoint_ptr,  # [B, 3 ceil(T / kept), C]
    gy_ptr,  # [B, T, C]
    gfinal_ptr,  # [2, N, C] or 0: gm and gl
    gwu_ptr,  # [2, N, C]: gw and gu of each sequence
    gk_ptr,  # [B, T, C]
    gv_ptr,  # [B, T, C]
    ginitial_ptr,  # [2, N, C]: gm and gl
    bounds,  # where the sequences of one batch row begin and end
    shape,  # T, C, N
    work,  # channels in a block, first and last unit of work
    storage,  # tag of k, v, gy, gk, gv
    sums,  # tag of the rest
):
    T, C, N = shape
    width, first, last = work
    lanes, kept = VECTOR_BYTES // sums.itemsize, tokens_kept(sums.itemsize)
    grid = -(-T // kept)
    carried = np.empty(4 * width + (kept * ROW_VALUES + 1) * lanes, sums.dtype)
    state = carried.ctypes.data
    state += -state % VECTOR_BYTES
    scratch = state + 4 * width * sums.itemsize
    for unit in range(first, last):
        n, batch, start, stop, c_first, c_last = locate(unit, width, C, bounds)
        top = max(stop - 1, start) // kept  # an empty sequence has no rows there, but adjoints that go through
        for j in range(top, start // kept - 1, -1):
            row = max(j * kept, start)
            rows = min((j + 1) * kept, stop) - row
            for x in range(c_first, c_last, lanes):
                # The last vector of an odd C overlaps the one before it, and writes the same numbers there.
                c, at = min(x, C - lanes), 4 * (x - c_first)
                w, u, index = load_w(w_ptr, c, sums), load(u_ptr, c, sums), (batch * T + row) * C + c
                num, den, anchor = empty_state(sums)
                if row > start:
                    num, den, anchor = load_packed(checkpoint_ptr, (batch * grid + j) * 3 * C + c, C, sums)
                elif initial_ptr != 0:
                    num, den, anchor = load_packed(initial_ptr, n * C + c, N * C, sums)
                _recompute(k_ptr, v_ptr, gy_ptr, index, rows, C, w, u, num, den, anchor, scratch, storage, sums)
                gm = gl = gw = gu = splat(0.0, sums)
                if j < top:
                    gm, gl, gw, gu = _load_four(state, at, lanes, sums)
                elif gfinal_ptr != 0:
                    gm, gl = load(gfinal_ptr, n * C + c, sums), load(gfinal_ptr, (N + n) * C + c, sums)
                out = gk_ptr, gv_ptr, index, rows, C
                if initial_ptr != 0 and any_true(den == 0.0):
                    gm, gl, gw, gu = _reverse(*out, gm, gl, gw, gu, True, scratch, storage, sums)
                else:
                    gm, gl, gw, gu = _reverse(*out, gm, gl, gw, gu, False, scratch, storage, sums)
                _store_pair(state, at, lanes, gm, gl, sums)
                _store_pair(state, at + 2 * lanes, lanes, gw, gu, sums)
                if row == start:
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
    rates, bonus = w.to(dtype).contiguous(), u.to(dtype).contiguous()
    lift = None
    if initial is not None:
        initial, lift = entry_states(rates, bonus, k, initial, bounds)
    gy, checkpoints = gy.contiguous(), checkpoints.contiguous()
    initial, gfinal = (None if t is None else t.contiguous() for t in (initial, gfinal))
    gwu, gk, gv = k.new_empty((2, N, C), dtype=dtype), torch.empty_like(k), torch.empty_like(v)
    ginitial = gwu.new_empty(0 if initial is None else (2, N, C))
    pointers = addresses(rates, bonus, k, v, initial, checkpoints, gy, gfinal, gwu, gk, gv, ginitial)
    fixed = bounds, (T, C, N)
    tags = TAGS[k.dtype], TAGS[dtype]
    run(lambda work: _wkv_bwd_kernel(*pointers, *fixed, work, *tags), N, C, k.numel(), dtype)
    # numpy adds the sequences one after the other, whatever the number of threads.
    gw, gu = (torch.from_numpy(g.numpy().sum(0, dtype=np.float64)) for g in gwu)
    return gw.to(w.dtype), gu.to(u.dtype), gk, gv, with_lift(ginitial, lift)
