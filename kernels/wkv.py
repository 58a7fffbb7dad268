"""WKV: the mathematics for every device; here the forward pass on a GPU. notation.py explains the words.

Forward. Per channel the state after token t is (num, den, p), meaning Σ_i e^{k_i - (t-i) w} v_i = num e^p and the same
sum without v_i = den e^p. A token is weighed against the past twice, with gap_t = p_{t-1} - k_t:

    y_t = (e1 num + e2 v_t) / (e1 den + e2)              e1 : e2 = e^{gap_t - u} : 1     its own output
    num, den <- e1 num + e2 v_t, e1 den + e2             e1 : e2 = e^{gap_t - w} : 1     the next state

Stabiliser. Of two weights whose exponents differ by d the larger is 1 and the other e^{-|d|}: one exponential for each
of the two uses, never an overflow. p is never stepped down by w, which would drift by 1e-4 in some thousand tokens. It
is kept as an anchor, the key that it comes from, and its age, p = anchor - age w. gap = fma(-age, w, anchor - k)
subtracts the two keys first, which loses nothing where they are close. Where a state leaves the registers, what the
rounding of p cuts off is folded into num and den.

Absent tokens and empty states. A token with k = -inf is absent: its gap is +inf and its weight 0. In memory an empty
state has den = 0 and p = -inf. In registers it has num = 0 and p = NO_PAST, which is finite, so that infinities are
never subtracted from each other, and no key lies below it. Its den there is the smallest normal number on a GPU, and 0
on a CPU. So on a GPU no sum of weights is 0, unless an initial state is given, and divisions need no guard. Where all
weights are 0, y is 0.

Adjoint. Let m = num/den be the mean of the past values and l = p + log den the logarithm of their weight. With the
sigmoids s_t = σ(k_t + u - l_{t-1}) and r_t = σ(k_t + w - l_{t-1}), the weights of token t in its own output and in the
next state, and δ_t = v_t - m_{t-1}, a step is

    y_t = m_{t-1} + s_t δ_t          m_t = m_{t-1} + r_t δ_t          l_t = l_{t-1} - w - log(1-r_t)

The derivative of s_t by k_t and by u is s_t (1-s_t), that of r_t by k_t and by w is r_t (1-r_t), and by l_{t-1} both
have the opposite sign. So the derivative of l_t is r_t by k_t, -(1-r_t) by w, and 1-r_t by l_{t-1}. Let gm and gl be
the gradients of m_t and l_t that come from later tokens, α_t = gy_t s_t (1-s_t) δ_t and β_t = gm r_t (1-r_t) δ_t. By
the chain rule, from the last token to the first,

    gv_t = gy_t s_t + gm r_t                     gu += α_t
    gk_t = α_t + β_t + gl r_t                    gw += β_t - gl (1-r_t)
    gl <- gl (1-r_t) - α_t - β_t                 gm <- gm (1-r_t) + gy_t (1-s_t)

The gradients of num, den and p of the first and the last state follow from those of m and l (ops/wkv.py). Every factor
lies between 0 and 1, and 1-s and 1-r are e1 den over the sum, not subtractions. s, r, m are computed again from a state
kept every few tokens; nothing else is stored. An empty state counts as den = 1 in 1-s and 1-r, and so it does in
ops/wkv.py: gm and gl are then the gradients of num and den themselves, and those of k, w and u are not to see them.

Chunks. Both passes are associative along time. A sequence is one chunk where batch and channels fill the device. Else
every chunk is first summarised from an empty state (by the same kernel, without its outputs), the summaries are scanned
in order (wkv_carry.py), and every chunk is finished from its true state. The adjoint of a chunk is affine:
(gm, gl) <- (kept gm + cm, kept gl + mixed gm + cl), where kept is the product of all 1-r, and (cm, cl) the result for
gm = gl = 0.

Memory. A program is a warp, a lane a channel. It reads tiles of ROWS tokens, 16 bytes a lane, STAGES - 1 of them on
their way while one is worked on; shared memory hands the rows to the lanes. The last tokens, and those of packed
sequences, go through a second copy of the rows. In it tokens outside of a run of one sequence are absent and take no
time: the state is replaced between runs, and the grid stays the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import negated, quotient
from fastwkv.kernels.config import FORWARD_REGISTERS, Launch
from fastwkv.kernels.held import start
from fastwkv.kernels.launch import accumulation_dtype, checkpoint_shape, launch_for
from fastwkv.kernels.packing import fill_idle_rows, in_sequence, is_end, packed_edges
from fastwkv.kernels.tiles import block_channels, chunk_span, tile_of
from fastwkv.kernels.wkv_carry import _wkv_carry_kernel, carry_constants
from fastwkv.kernels.wkv_entry import entry_states
from fastwkv.kernels.wkv_state import (
    absorb,
    at_least_tiny,
    empty_state,
    enter,
    load_rate,
    load_rows,
    load_state,
    row_constants,
    run_end,
    store_state,
    weigh,
)


@triton.jit
def _forward_rows(
    ks, vs, rates, state, first, stop,
    SUMMARY: tl.constexpr, NEVER_ZERO: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Run the rows of a tile: y of each, and the state after them.

    With MASKED, rows before ``first`` and from ``stop`` on are absent and take no time: their k is -inf, their v 0.
    """
    w, u = rates
    ys = ()
    for i in tl.static_range(ROWS):
        num, den, anchor, age = state
        k = ks[i].to(num.dtype)
        v = vs[i].to(num.dtype)
        step = 1.0
        if MASKED:
            step = tl.where((first <= i) & (stop > i), 1.0, 0.0)
        gap = tl.fma(negated(age), w, anchor - k)
        if not SUMMARY:
            past, now = weigh(gap - u)
            weight = at_least_tiny(tl.fma(past, den, now), NEVER_ZERO)
            ys = ys + (quotient(tl.fma(past, num, now * v), weight),)
        state = absorb(state, gap, w, (v, 1.0, k), step)
    return ys, state


@triton.jit
def _store_final(edge, final_ptr, C, c, in_c, field, state, w):
    """Write the state after a token if a packed sequence ends there."""
    if is_end(edge):
        at = final_ptr + (edge >> 2).to(tl.int64) * C + c
        store_state(at, field, state, w, in_sequence(edge, in_c))


@triton.jit(do_not_specialize=["N", "T", "chunk"])
def _wkv_fwd_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    initial_ptr,  # [4, N, C], before every sequence (wkv_entry.py); None: empty
    carry_ptr,  # [3, B * chunks, C], before every chunk; None: a chunk is a sequence, or a summary is wanted
    edge_ptr,  # int32 [T], 4 n + 2 (ends) + (starts): token t's sequence n, -1 for none (packing.py); None: not packed
    y_ptr,  # [B, T, C]; None: a summary is wanted
    checkpoint_ptr,  # [B, 3 * blocks, C], or None
    final_ptr,  # [3, N, C], after every sequence; None: a summary is wanted
    summary_ptr,  # [3, B * chunks, C], the state after each chunk from an empty one; None: y is wanted
    N,
    T,
    chunk,  # tokens a program, a multiple of ROWS
    C: tl.constexpr,  # so that the rows of a block are reached by constant offsets
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    SUMMARY: tl.constexpr = summary_ptr is not None
    NEVER_ZERO: tl.constexpr = initial_ptr is None
    ACC: tl.constexpr = summary_ptr.dtype.element_ty if SUMMARY else final_ptr.dtype.element_ty
    chunk_id, batch, begin, end = chunk_span(T, chunk)
    if SUMMARY:  # nothing comes after the last chunk
        end = tl.where(end == T, begin, end)
    c, in_c = block_channels(C, BLOCK_C)
    field = N.to(tl.int64) * C
    carry_field = tl.num_programs(0).to(tl.int64) * C

    w = load_rate(w_ptr, c, in_c, ACC)
    rates = (w, tl.load(u_ptr + c, mask=in_c, other=0.0).to(ACC))
    state = empty_state(w)
    if carry_ptr is not None:
        state = load_state(carry_ptr + chunk_id * C + c, carry_field, in_c)
    elif (initial_ptr is not None) and ((edge_ptr is None) and (not SUMMARY)):
        state = load_state(initial_ptr + batch * C + c, field, in_c)

    if checkpoint_ptr is not None:
        checkpoint_ptr += (batch * tl.cdiv(T, ROWS) + begin // ROWS) * 3 * C + c
    rows = tl.arange(0, ROWS)
    tile = rows[:, None] * C + c[None, :]
    origin = (batch * T + begin) * C
    offset = origin
    at = begin + (end - begin) // ROWS * ROWS if edge_ptr is None else begin
    for _ in tl.range(begin, at, ROWS, num_stages=STAGES):
        ks = load_rows(k_ptr + offset, tile, in_c[None, :], 0.0, False, ROWS)
        vs = load_rows(v_ptr + offset, tile, in_c[None, :], 0.0, False, ROWS)
        if checkpoint_ptr is not None:
            store_state(checkpoint_ptr + (offset - origin) // ROWS * 3, C, state, w, in_c)
        ys, state = _forward_rows(ks, vs, rates, state, 0, ROWS, SUMMARY, NEVER_ZERO, False, ROWS)
        if not SUMMARY:
            tl.store(y_ptr + offset + tile, tile_of(ys, y_ptr, ROWS), mask=in_c[None, :])
        offset += ROWS * C
    while at < end:  # the last tokens; if packed all, a run of one sequence at a time
        block = (at - begin) // ROWS
        t = begin + block * ROWS
        offset = origin + block.to(tl.int64) * (ROWS * C)
        first = at - t
        stop = tl.minimum(end - t, ROWS)
        if checkpoint_ptr is not None:
            if first == 0:
                store_state(checkpoint_ptr + block.to(tl.int64) * (3 * C), C, state, w, in_c)
        if edge_ptr is not None:
            stop = run_end(edge_ptr + t, rows, first, stop)
            state = enter(tl.load(edge_ptr + at), initial_ptr, C, c, in_c, field, state)
        run = ((rows >= first) & (rows < stop))[:, None] & in_c[None, :]
        ks = load_rows(k_ptr + offset, tile, run, -float("inf"), True, ROWS)
        vs = load_rows(v_ptr + offset, tile, run, 0.0, True, ROWS)
        ys, state = _forward_rows(ks, vs, rates, state, first, stop, SUMMARY, NEVER_ZERO, True, ROWS)
        if not SUMMARY:
            tl.store(y_ptr + offset + tile, tile_of(ys, y_ptr, ROWS), mask=run)
            if edge_ptr is not None:
                _store_final(tl.load(edge_ptr + t + stop - 1), final_ptr, C, c, in_c, field, state, w)
        at = t + stop
    if SUMMARY:
        store_state(summary_ptr + chunk_id * C + c, carry_field, state, w, in_c)
    elif edge_ptr is None:
        if end == T:
            store_state(final_ptr + batch * C + c, field, state, w, in_c)


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
    constants = row_constants(launch, C, acc, FORWARD_REGISTERS)

    carry = None
    if chunks > 1:
        # Not one tensor: were C odd, the number of chunks would decide whether its second half is aligned.
        summary, carry = (k.new_empty(3, B * chunks, C, dtype=acc) for _ in range(2))
        inputs = (w, u, k, v, entry, None, edges)
        start(_wkv_fwd_kernel, grid, (*inputs, None, None, None, summary), numbers, constants)
        start(_wkv_carry_kernel, (B, grid[1]), (w, entry, summary, edges, carry), numbers, carry_constants(launch, C))
    saved = checkpoints if save else None
    start(_wkv_fwd_kernel, grid, (w, u, k, v, entry, carry, edges, y, saved, final, None), numbers, constants)
    if cu_seqlens is not None and edges is not None:
        fill_idle_rows(cu_seqlens, edges, initial, final, state=True)
    return y, final, checkpoints
