"""WKV on the CPU, forward and backward, one SIMD vector of channels at a time.

Forward. The past is num, den and a running exponent p: Σ e^{k_i - age_i w} v_i = num e^p, and without v_i den e^p.
One exponential serves a sum of two terms, since the larger one is given the weight 1:

    d = p_{t-1} - k_t     E = e^{-|d - u|}    d >= u (the past is heavier):  y_t = (num + E v_t) / (den + E)
                                              else                           y_t = (E num + v_t) / (E den + 1)
                          E = e^{-|d - w|}    d >= w:  num += E v_t,  den += E,  p_t = p_{t-1} - w
                                              else     num = E num + v_t,  den = E den + 1,  p_t = k_t

Decay over n steps is n w, computed once: p = anchor - age w, where the anchor is the last key that was heavier than
the past. Subtracting w again and again would drift, by 1e-4 in some thousand steps. The empty state has num = den = 0
and the lowest finite float32 as its anchor, so that infinities are never subtracted from each other. Where p must
become one number (a final state, a checkpoint), the residue of its rounding goes into num and den.

Backward. With the mean of the past m = num / den, the logarithm of its weight l = p + log den, δ_t = v_t - m_{t-1},
s_t the weight of a token in its own output and r_t its weight in the next state,

    α_t = gy_t s_t (1 - s_t) δ_t           gv_t = gy_t s_t + gm r_t              gu += α_t
    β_t = gm r_t (1 - r_t) δ_t             gk_t = α_t + β_t + gl r_t             gw += β_t - gl (1 - r_t)
    gl <- gl (1 - r_t) - α_t - β_t         gm <- gm (1 - r_t) + gy_t (1 - s_t)

backwards from gm = den gnum, gl = num gnum + den gden of the final state, to gnum = gm / den,
gden = (gl - gm m) / den, gmax = gl of the initial state. 1 - s and 1 - r come from the other addend of their sums,
never from a subtraction. The forward pass keeps its state before every 16th token; the backward pass computes the
16 rows that follow once more, into scratch that stays in the innermost cache.

A past without weight (den = 0) has 1 - s = 1 - r = 0, and yet a gradient if its exponent is an ordinary number: a
learnable initial state that begins as zeros. There gm and gl stand for the gradients with respect to num and den
themselves, as though den were 1, and gk, gw, gu do not see them.

Work is split over sequences and channels, never over time: results do not depend on the number of threads.
"""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.config import CHECKPOINT_ROWS
from fastwkv.kernels.cpu.launch import fits, fitted, run, sum_dtype
from fastwkv.kernels.cpu.numerics import (
    TAGS,
    VECTOR_BYTES,
    absolute,
    any_true,
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
    empty_state,
    load_packed,
    load_w,
    ratio,
    rounded,
    store_state,
)
from fastwkv.kernels.cpu.wkv_step import wkv_step

__all__ = ["wkv_bwd", "wkv_fwd", "wkv_step"]

# What the backward pass keeps of a row: r, 1 - r, r (1 - r) δ, α, gy s, gy (1 - s), den.
ROW_VALUES = 7


@kernel
def _wkv_fwd_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    y_ptr,  # [B, T, C]
    initial_ptr,  # [3, N, C] or 0
    final_ptr,  # [3, N, C]
    checkpoint_ptr,  # [B, ceil(T / 16), 3, C] or 0
    bounds,  # where the sequences of one batch row begin and end
    shape,  # T, C, N
    work,  # vectors in a block of channels, first and last unit: one sequence of one block
    storage,
    sums,
):
    T, C, N = shape
    width, first, last = work
    lanes = VECTOR_BYTES // sums.itemsize
    sequences, blocks, grid = (
        len(bounds) - 1,
        -(-C // (width * lanes)),
        -(-T // CHECKPOINT_ROWS),
    )
    carried = np.empty(4 * width * lanes, sums.dtype)
    state = carried.ctypes.data
    for unit in range(first, last):
        n, block = unit // blocks, unit % blocks
        batch, sequence = n // sequences, n % sequences
        start, stop = bounds[sequence], bounds[sequence + 1]
        c_first, c_last = block * width * lanes, min((block + 1) * width * lanes, C)
        vectors = -(-(c_last - c_first) // lanes)
        for row in range(start - start % CHECKPOINT_ROWS, stop, CHECKPOINT_ROWS):
            for x in range(vectors):
                # The last vector of an odd C overlaps the one before it, and writes the same numbers there.
                c, at = min(c_first + x * lanes, C - lanes), 4 * x * lanes
                w, u = load_w(w_ptr, c, sums), load(u_ptr, c, sums)
                minus_w = 0.0 - w
                if row > start:
                    num, den, anchor = load_packed(state, at, lanes, sums)
                    age = load(state, at + 3 * lanes, sums)
                else:
                    num, den, anchor = empty_state(sums)
                    age = num
                    if initial_ptr != 0:
                        num, den, anchor = load_packed(initial_ptr, n * C + c, N * C, sums)
                if checkpoint_ptr != 0 and row >= start:
                    index = (batch * grid + row // CHECKPOINT_ROWS) * 3 * C + c
                    a, b, scale = rounded(num, den, anchor, age, minus_w)
                    store_state(checkpoint_ptr, index, C, a, b, scale, sums)
                for t in range(max(row, start), min(row + CHECKPOINT_ROWS, stop)):
                    index = (batch * T + t) * C + c
                    k, v = load(k_ptr, index, storage), load(v_ptr, index, storage)
                    gap = fma(age, minus_w, anchor - k)
                    d = gap - u
                    a, b = add(d >= 0.0, exp(0.0 - absolute(d)), num, den, v)
                    store(y_ptr, index, ratio(a, b), storage)
                    d = gap - w
                    heavier = d >= 0.0
                    num, den = add(heavier, exp(0.0 - absolute(d)), num, den, v)
                    anchor, age = (
                        select(heavier, anchor, k),
                        select(heavier, age + 1.0, 0.0),
                    )
                store_state(state, at, lanes, num, den, anchor, sums)
                store(state, at + 3 * lanes, age, sums)
                if row + CHECKPOINT_ROWS >= stop:
                    num, den, scale = rounded(num, den, anchor, age, minus_w)
                    scale = select(den == 0.0, -np.inf, scale)
                    store_state(final_ptr, n * C + c, N * C, num, den, scale, sums)


@inlined
def _recompute(k_ptr, v_ptr, gy_ptr, index, rows, C, w, u, num, den, anchor, scratch, storage, sums):
    """Fill scratch with what the reverse pass needs of some rows."""
    lanes = VECTOR_BYTES // sums.itemsize
    minus_w, age = 0.0 - w, splat(0.0, sums)
    unit = select(den == 0.0, 1.0, den)
    inverse = 1.0 / unit
    for i in range(rows):
        k, v, gy = (
            load(k_ptr, index, storage),
            load(v_ptr, index, storage),
            load(gy_ptr, index, storage),
        )
        delta = v - num * inverse
        gap = fma(age, minus_w, anchor - k)
        at = i * ROW_VALUES * lanes

        d = gap - u
        heavier, E = d >= 0.0, exp(0.0 - absolute(d))
        now, past = select(heavier, E, 1.0), select(heavier, 1.0, E)
        total = fma(past, den, now)
        share = select(total == 0.0, 0.0, gy / total)
        gy_s, gy_past, s = (
            share * now,
            share * past * unit,
            select(total == 0.0, 0.0, now / total),
        )
        store(scratch, at + 3 * lanes, gy_past * s * delta, sums)
        store(scratch, at + 4 * lanes, gy_s, sums)
        store(scratch, at + 5 * lanes, gy_past, sums)
        store(scratch, at + 6 * lanes, den, sums)

        d = gap - w
        heavier, E = d >= 0.0, exp(0.0 - absolute(d))
        now, past = select(heavier, E, 1.0), select(heavier, 1.0, E)
        num, den = add(heavier, E, num, den, v)
        anchor, age = select(heavier, anchor, k), select(heavier, age + 1.0, 0.0)
        past = past * unit
        unit = select(den == 0.0, 1.0, den)
        inverse = 1.0 / unit
        r, kept = now * inverse, past * inverse
        store(scratch, at, r, sums)
        store(scratch, at + lanes, kept, sums)
        store(scratch, at + 2 * lanes, r * kept * delta, sums)
        index += C


@inlined
def _reverse(gk_ptr, gv_ptr, index, rows, C, gm, gl, gw, gu, weightless, scratch, storage, sums):
    """Go back over some rows. ``weightless``: the past may have den = 0."""
    lanes = VECTOR_BYTES // sums.itemsize
    gw_rows, gu_rows = splat(0.0, sums), splat(0.0, sums)
    for i in range(rows - 1, -1, -1):
        at = i * ROW_VALUES * lanes
        r, kept = load(scratch, at, sums), load(scratch, at + lanes, sums)
        alpha = load(scratch, at + 3 * lanes, sums)
        beta = gm * load(scratch, at + 2 * lanes, sums)
        gl_kept = gl * kept
        both, gw_row, gu_row = alpha + beta, beta - gl_kept, alpha
        gl_next = gl_kept - both
        if weightless:
            empty = load(scratch, at + 6 * lanes, sums) == 0.0
            both, gw_row = select(empty, 0.0, both), select(empty, 0.0, gw_row)
            gu_row = select(empty, 0.0, gu_row)
        store(gk_ptr, index + i * C, fma(gl, r, both), storage)
        store(
            gv_ptr,
            index + i * C,
            fma(gm, r, load(scratch, at + 4 * lanes, sums)),
            storage,
        )
        gw_rows, gu_rows = gw_rows + gw_row, gu_rows + gu_row
        gl, gm = gl_next, fma(gm, kept, load(scratch, at + 5 * lanes, sums))
    return gm, gl, gw + gw_rows, gu + gu_rows


@kernel
def _wkv_bwd_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    initial_ptr,  # [3, N, C] or 0
    checkpoint_ptr,  # [B, ceil(T / 16), 3, C]
    gy_ptr,  # [B, T, C]
    gfinal_ptr,  # [2, N, C] or 0: gm and gl
    gwu_ptr,  # [2, N, C]: gw and gu of each sequence
    gk_ptr,  # [B, T, C]
    gv_ptr,  # [B, T, C]
    ginitial_ptr,  # [2, N, C]: gm and gl
    bounds,  # as in the forward kernel
    shape,
    work,
    storage,
    sums,
):
    T, C, N = shape
    width, first, last = work
    lanes = VECTOR_BYTES // sums.itemsize
    sequences, blocks, grid = (
        len(bounds) - 1,
        -(-C // (width * lanes)),
        -(-T // CHECKPOINT_ROWS),
    )
    carried = np.empty((4 * width + CHECKPOINT_ROWS * ROW_VALUES) * lanes, sums.dtype)
    state = carried.ctypes.data
    scratch = state + 4 * width * VECTOR_BYTES
    for unit in range(first, last):
        n, block = unit // blocks, unit % blocks
        batch, sequence = n // sequences, n % sequences
        start, stop = bounds[sequence], bounds[sequence + 1]
        c_first, c_last = block * width * lanes, min((block + 1) * width * lanes, C)
        vectors = -(-(c_last - c_first) // lanes)
        top = (stop - 1) // CHECKPOINT_ROWS
        for j in range(top, start // CHECKPOINT_ROWS - 1, -1):
            row = max(j * CHECKPOINT_ROWS, start)
            rows = min((j + 1) * CHECKPOINT_ROWS, stop) - row
            for x in range(vectors):
                c, at = min(c_first + x * lanes, C - lanes), 4 * x * lanes
                w, u, index = (
                    load_w(w_ptr, c, sums),
                    load(u_ptr, c, sums),
                    (batch * T + row) * C + c,
                )
                if row > start:
                    num, den, anchor = load_packed(checkpoint_ptr, (batch * grid + j) * 3 * C + c, C, sums)
                elif initial_ptr != 0:
                    num, den, anchor = load_packed(initial_ptr, n * C + c, N * C, sums)
                else:
                    num, den, anchor = empty_state(sums)
                _recompute(
                    k_ptr,
                    v_ptr,
                    gy_ptr,
                    index,
                    rows,
                    C,
                    w,
                    u,
                    num,
                    den,
                    anchor,
                    scratch,
                    storage,
                    sums,
                )
                if j < top:
                    gm, gl = load(state, at, sums), load(state, at + lanes, sums)
                    gw, gu = (
                        load(state, at + 2 * lanes, sums),
                        load(state, at + 3 * lanes, sums),
                    )
                else:
                    gm = gl = gw = gu = splat(0.0, sums)
                    if gfinal_ptr != 0:
                        gm, gl = (
                            load(gfinal_ptr, n * C + c, sums),
                            load(gfinal_ptr, (N + n) * C + c, sums),
                        )
                if initial_ptr != 0 and any_true(den == 0.0):
                    gm, gl, gw, gu = _reverse(
                        gk_ptr,
                        gv_ptr,
                        index,
                        rows,
                        C,
                        gm,
                        gl,
                        gw,
                        gu,
                        True,
                        scratch,
                        storage,
                        sums,
                    )
                else:
                    gm, gl, gw, gu = _reverse(
                        gk_ptr,
                        gv_ptr,
                        index,
                        rows,
                        C,
                        gm,
                        gl,
                        gw,
                        gu,
                        False,
                        scratch,
                        storage,
                        sums,
                    )
                store(state, at, gm, sums)
                store(state, at + lanes, gl, sums)
                store(state, at + 2 * lanes, gw, sums)
                store(state, at + 3 * lanes, gu, sums)
                if row == start:
                    store(gwu_ptr, n * C + c, gw, sums)
                    store(gwu_ptr, (N + n) * C + c, gu, sums)
                    if initial_ptr != 0:
                        store(ginitial_ptr, n * C + c, gm, sums)
                        store(ginitial_ptr, (N + n) * C + c, gl, sums)


def wkv_fwd(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [B, T, C], the final state [3, N, C], and with ``save`` the checkpoints for the backward pass."""
    dtype = sum_dtype(w, u, k, v)
    if not fits(k, dtype):
        C = k.shape[-1]
        results = wkv_fwd(*fitted(dtype, w, u, k, v, initial), cu_seqlens, save)
        y, final, checkpoints = (t[..., :C].contiguous() for t in results)
        return y.to(v.dtype), final, checkpoints
    B, T, C = k.shape
    bounds = _bounds(T, cu_seqlens)
    N = B * (len(bounds) - 1)
    w, u = w.to(dtype).contiguous(), u.to(dtype).contiguous()
    initial = None if initial is None else initial.contiguous()
    y, final = torch.empty_like(v), k.new_empty((3, N, C), dtype=dtype)
    checkpoints = k.new_empty((B, -(-T // CHECKPOINT_ROWS), 3, C) if save else (0,), dtype=dtype)
    pointers = _pointers(w, u, k, v, y, initial, final, checkpoints if save else None)
    tags = TAGS[k.dtype], TAGS[dtype]
    run(
        N,
        C,
        k.numel(),
        dtype,
        lambda share: _wkv_fwd_kernel(*pointers, bounds, (T, C, N), share, *tags),
    )
    return y, final, checkpoints


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gw, gu, gk, gv and (gm, gl) [2, N, C] of the initial state, or an empty tensor where there was none.

    ``gfinal`` is (gm, gl) of the final state.
    """
    dtype = sum_dtype(w, u, k, v)
    if not fits(k, dtype):
        C = k.shape[-1]
        tensors = fitted(dtype, w, u, k, v, initial, checkpoints, gy, gfinal)
        results = wkv_bwd(*tensors[:5], cu_seqlens, *tensors[5:])
        gw, gu, gk, gv, ginitial = (t[..., :C].contiguous() for t in results)
        return gw.to(w.dtype), gu.to(u.dtype), gk.to(k.dtype), gv.to(v.dtype), ginitial
    B, T, C = k.shape
    bounds = _bounds(T, cu_seqlens)
    N = B * (len(bounds) - 1)
    rates, bonus = w.to(dtype).contiguous(), u.to(dtype).contiguous()
    initial, gfinal = (None if t is None else t.contiguous() for t in (initial, gfinal))
    gy, checkpoints = gy.contiguous(), checkpoints.contiguous()
    gwu, gk, gv = (
        k.new_empty((2, N, C), dtype=dtype),
        torch.empty_like(k),
        torch.empty_like(v),
    )
    ginitial = gwu.new_empty((2, N, C) if initial is not None else (0,))
    pointers = _pointers(rates, bonus, k, v, initial, checkpoints, gy, gfinal, gwu, gk, gv, ginitial)
    tags = TAGS[k.dtype], TAGS[dtype]
    run(
        N,
        C,
        k.numel(),
        dtype,
        lambda share: _wkv_bwd_kernel(*pointers, bounds, (T, C, N), share, *tags),
    )
    # numpy adds the sequences one after the other, whatever the number of threads.
    gw, gu = (torch.from_numpy(g.numpy().sum(0, dtype=np.float64)) for g in gwu)
    return gw.to(w.dtype), gu.to(u.dtype), gk, gv, ginitial


def _pointers(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _bounds(T: int, cu_seqlens: Tensor | None) -> np.ndarray:
    return np.array((0, T)) if cu_seqlens is None else cu_seqlens.to(torch.int64).numpy()
