"""WKV on a GPU: the mathematics, the Triton kernels and their launchers.

Forward. Per channel the state after token t is (num, den, p), meaning Σ_i e^{k_i - (t-i) w} v_i = num e^p and the same
sum without v_i = den e^p. A token is weighed against the past twice, with d_t = p_{t-1} - k_t:

    y_t = (e1 num + e2 v_t) / (e1 den + e2)              e1 : e2 = e^{d_t - u} : 1     its own output
    num, den <- e1 num + e2 v_t, e1 den + e2             e1 : e2 = e^{d_t - w} : 1     the next state

Stabiliser. Of the two weights the larger is 1 and the other e^{-|d|}: one exponential for each of the two uses, never
an overflow. p is never stepped down by w: it is kept as an anchor, the key that it comes from, and its age,
p = anchor - age w, and d = fma(-age, w, anchor - k) subtracts the two keys first, which loses nothing where they are
close. Where a state leaves the registers, what the rounding of p cuts off is folded into num and den.

Absent tokens and empty states. k = -inf makes d = +inf and the weight e2 = 0. An empty state has den = 0 and, in
registers, the finite p = NO_PAST, below which no key lies; in memory p = -inf. Zero weight in all gives y = 0.

Adjoint. With the mean m = num/den and ℓ = p + log den, s_t and r_t the weights of token t in its own output and in
the next state (both sigmoids), δ_t = v_t - m_{t-1}, α_t = gy_t s_t (1-s_t) δ_t and β_t = gm r_t (1-r_t) δ_t, the
adjoints gm and gl of (m, ℓ) run backwards:

    gv_t = gy_t s_t + gm r_t                     gu += α_t
    gk_t = α_t + β_t + gl r_t                    gw += β_t - gl (1-r_t)
    gl <- gl (1-r_t) - α_t - β_t                 gm <- gm (1-r_t) + gy_t (1-s_t)

1-s and 1-r are e1 den over the sum, not subtractions. s, r, m are recomputed from a state kept every few
tokens; nothing else is stored. An empty state counts as den = 1 in 1-s and 1-r, and so does ops/wkv.py when it divides
by den: that gives the true gradient of num and den at den = 0.

Chunks. Both passes are associative along time. A sequence is one chunk where batch and channels fill the device; else
every chunk is first summarised from an empty state (the same kernel, without its outputs), the summaries are scanned
in order, and every chunk is finished from its true state. Adjoints too: over a chunk (gm, gl) <- (a gm + cm,
a gl + b gm + cl).

Memory. A program is a warp, a lane a channel. It reads tiles of ROWS tokens, 16 bytes a lane, STAGES - 1 of them on
their way while one is worked on; shared memory hands the rows to the lanes. The last tokens, and those of packed
sequences, go through a second copy of the rows, in which tokens outside of a run of one sequence are absent and take no
time: the state is replaced between runs, and the grid stays the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import negated, quotient, rows_of, tile_of
from fastwkv.kernels.config import FORWARD_REGISTERS, Launch
from fastwkv.kernels.held import start
from fastwkv.kernels.launch import accumulation_dtype, checkpoint_shape, launch_for
from fastwkv.kernels.packing import fill_idle_rows, has_row, is_end, packed_edges
from fastwkv.kernels.wkv_carry import _wkv_carry_kernel, carry_constants
from fastwkv.kernels.wkv_entry import entry_states
from fastwkv.kernels.wkv_state import (
    absorb,
    at_least_tiny,
    empty_state,
    enter,
    load_rate,
    load_state,
    row_constants,
    run_end,
    store_aged,
    weigh,
)


@triton.jit
def _fwd_rows(
    ks, vs, w, u, num, den, anchor, age, first, last,
    OUTPUT: tl.constexpr, SURE: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Run the tokens of a tile: y of each, and the state after them.

    With MASKED tokens before ``first`` and from ``last`` on are absent and do not take time: k = -inf, v = 0.
    """
    ys = ()
    for i in tl.static_range(ROWS):
        k = ks[i].to(num.dtype)
        v = vs[i].to(num.dtype)
        step = 1.0
        if MASKED:
            step = tl.where((first <= i) & (last > i), 1.0, 0.0)
        d = tl.fma(negated(age), w, anchor - k)
        if OUTPUT:
            past, now = weigh(d - u)
            total = at_least_tiny(tl.fma(past, den, now), SURE)
            ys = ys + (quotient(tl.fma(past, num, now * v), total),)
        num, den, anchor, age = absorb(num, den, anchor, age, d, w, v, 1.0, k, step)
    return ys, num, den, anchor, age


@triton.jit(do_not_specialize=["N", "T", "chunk"])
def _wkv_fwd_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    initial_ptr,  # [4, N, C], before every sequence (wkv_entry.py); None: empty
    carry_ptr,  # [3, B * chunks, C], before every chunk; None: a chunk is a sequence, or a summary is wanted
    edge_ptr,  # int32 [T], 4 n + 2 (ends) + (starts): token t's sequence n, -1 for none (packing.py); None: not packed
    y_ptr,  # [B, T, C]; None: a summary is wanted, the state after each chunk from an empty one
    checkpoint_ptr,  # [B, 3 * blocks, C], or None
    final_ptr,  # [3, N, C]; for summaries [3, B * chunks, C]
    N,
    T,
    chunk,  # tokens a program, a multiple of ROWS
    C: tl.constexpr,  # so that the rows of a block are reached by constant offsets
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = final_ptr.dtype.element_ty
    chunks = tl.cdiv(T, chunk)
    row = tl.program_id(0).to(tl.int64)  # of B * chunks
    b = row // chunks
    begin = (row % chunks).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, T)
    if y_ptr is None:  # nothing comes after the last chunk
        end = tl.where(end == T, begin, end)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C) if C % BLOCK_C else tl.full([BLOCK_C], True, tl.int1)
    field = N.to(tl.int64) * C
    carry_field = tl.num_programs(0).to(tl.int64) * C

    w = load_rate(w_ptr, c, in_c, ACC)
    u = tl.load(u_ptr + c, mask=in_c, other=0.0).to(ACC)
    SURE: tl.constexpr = initial_ptr is None
    num, den, anchor, age = empty_state(w)
    if carry_ptr is not None:
        num, den, anchor = load_state(carry_ptr + row * C + c, carry_field, in_c)
    elif (initial_ptr is not None) and ((edge_ptr is None) and (y_ptr is not None)):
        num, den, anchor = load_state(initial_ptr + b * C + c, field, in_c)

    if checkpoint_ptr is not None:
        checkpoint_ptr += (b * tl.cdiv(T, ROWS) + begin // ROWS) * 3 * C + c
    rows = tl.arange(0, ROWS)
    tile = rows[:, None] * C + c[None, :]
    origin = (b * T + begin) * C
    start = origin
    full = begin + (end - begin) // ROWS * ROWS if edge_ptr is None else begin
    for _ in tl.range(begin, full, ROWS, num_stages=STAGES):
        ks = rows_of(tl.load(k_ptr + start + tile, mask=in_c[None, :]), ROWS)
        vs = rows_of(tl.load(v_ptr + start + tile, mask=in_c[None, :]), ROWS)
        if checkpoint_ptr is not None:
            store_aged(checkpoint_ptr + (start - origin) // ROWS * 3, C, num, den, anchor, age, w, in_c)
        ys, num, den, anchor, age = _fwd_rows(
            ks, vs, w, u, num, den, anchor, age, 0, ROWS, y_ptr is not None, SURE, False, ROWS
        )
        if y_ptr is not None:
            tl.store(y_ptr + start + tile, tile_of(ys, y_ptr, ROWS), mask=in_c[None, :])
        start += ROWS * C
    at = full
    while at < end:  # the last tokens; if packed all, a run of one sequence at a time
        block = (at - begin) // ROWS
        t = begin + block * ROWS
        start = origin + block.to(tl.int64) * (ROWS * C)
        first = at - t
        last = tl.minimum(end - t, ROWS)
        if checkpoint_ptr is not None:
            if first == 0:
                store_aged(checkpoint_ptr + block.to(tl.int64) * (3 * C), C, num, den, anchor, age, w, in_c)
        if edge_ptr is not None:
            last = run_end(edge_ptr + t, rows, first, last)
            edge = tl.load(edge_ptr + at)
            num, den, anchor, age = enter(edge, initial_ptr, C, c, in_c, field, num, den, anchor, age)
        run = ((rows >= first) & (rows < last))[:, None] & in_c[None, :]
        ks = rows_of(tl.load(k_ptr + start + tile, mask=run, other=-float("inf")), ROWS)
        vs = rows_of(tl.load(v_ptr + start + tile, mask=run, other=0.0), ROWS)
        ys, num, den, anchor, age = _fwd_rows(
            ks, vs, w, u, num, den, anchor, age, first, last, y_ptr is not None, SURE, True, ROWS
        )
        if y_ptr is not None:
            tl.store(y_ptr + start + tile, tile_of(ys, y_ptr, ROWS), mask=run)
            if edge_ptr is not None:
                edge = tl.load(edge_ptr + t + last - 1)
                if is_end(edge):
                    final_at = final_ptr + (edge >> 2).to(tl.int64) * C + c
                    store_aged(final_at, field, num, den, anchor, age, w, has_row(edge, in_c))
        at = t + last
    if y_ptr is None:
        store_aged(final_ptr + row * C + c, carry_field, num, den, anchor, age, w, in_c)
    elif edge_ptr is None:
        if end == T:
            store_aged(final_ptr + b * C + c, field, num, den, anchor, age, w, in_c)


def wkv_fwd(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    edges: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass: y ``[B, T, C]``, final state ``[3, N, C]`` and, with ``save``, the checkpoints.

    ``edges`` is what :func:`packed_edges` makes of ``cu_seqlens``, where it is known.
    """
    B, T, C = k.shape
    acc = accumulation_dtype(w, u, k, v)
    launch = launch or launch_for(k)
    chunks = -(-T // launch.chunk)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(v)
    final = k.new_empty(3, N, C, dtype=acc)
    checkpoints = k.new_empty(checkpoint_shape(B, T, C, acc) if save else 0, dtype=acc)
    if cu_seqlens is not None and edges is None:
        edges = packed_edges(cu_seqlens, T)
    w, u = w.contiguous(), u.contiguous()
    entry = None if initial is None else entry_states(w, u, k, initial, cu_seqlens)
    grid = (B * chunks, -(-C // launch.block_c))
    numbers = (N, T, launch.chunk)
    kind = row_constants(launch, C, acc, FORWARD_REGISTERS)

    carry = None
    if chunks > 1:
        # Not one tensor: were C odd, the number of chunks would decide whether its second half is aligned.
        summary, carry = (k.new_empty(3, B * chunks, C, dtype=acc) for _ in range(2))
        start(_wkv_fwd_kernel, grid, (w, u, k, v, entry, None, edges, None, None, summary), numbers, kind)
        start(_wkv_carry_kernel, (B, grid[1]), (w, entry, summary, edges, carry), numbers, carry_constants(launch, C))
    saved = checkpoints if save else None
    start(_wkv_fwd_kernel, grid, (w, u, k, v, entry, carry, edges, y, saved, final), numbers, kind)
    if cu_seqlens is not None and edges is not None:
        fill_idle_rows(cu_seqlens, edges, initial, final, state=True)
    return y, final, checkpoints
