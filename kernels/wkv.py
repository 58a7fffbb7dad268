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

1-s and 1-r are e1 den over the sum, not subtractions. s, r, m are recomputed from a state kept every CHECKPOINT_ROWS
tokens; nothing else is stored. An empty state counts as den = 1 in 1-s and 1-r, and so does ops/wkv.py when it divides
by den: that gives the true gradient of num and den at den = 0.

Chunks. Both passes are associative along time. A sequence is one chunk where batch and channels fill the device; else
every chunk is first summarised from an empty state (the same kernel, without its outputs), the summaries are scanned
in order, and every chunk is finished from its true state. Adjoints too: over a chunk (gm, gl) <- (a gm + cm,
a gl + b gm + cl). With packed sequences the state is replaced wherever one starts; the grid stays the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import before
from fastwkv.kernels.config import CHECKPOINT_ROWS, Launch
from fastwkv.kernels.launch import accumulation_dtype, checkpoint_shape, launch_for, packed_edges
from fastwkv.kernels.wkv_state import NO_PAST, absorb, enter, load_rate, load_state, ratio, store_aged, weigh


@triton.jit
def fwd_block(
    offset, w, u, k_ptr, v_ptr, initial_ptr, edge_ptr, y_ptr, checkpoint_ptr, final_ptr, num, den, anchor, age,
    t, end, c, in_c, field, C: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Run ROWS tokens from t on; with MASKED only those before ``end``. Returns the state after them."""
    if checkpoint_ptr is not None:
        store_aged(checkpoint_ptr, C, num, den, anchor, age, w, in_c)
    ks = ()
    vs = ()
    for i in tl.static_range(ROWS):  # every load is issued before the first is waited for
        in_row = before(t + i, end, c, C) if MASKED else in_c
        ks = ks + (tl.load(k_ptr + offset + i * C, mask=in_row, other=0.0).to(num.dtype),)
        vs = vs + (tl.load(v_ptr + offset + i * C, mask=in_row, other=0.0).to(num.dtype),)
    for i in tl.static_range(ROWS):
        if (not MASKED) or (end > t + i):
            if edge_ptr is not None:
                edge = tl.load(edge_ptr + t + i)
                num, den, anchor, age = enter(edge, initial_ptr, C, c, in_c, field, num, den, anchor, age)
            k = ks[i]
            v = vs[i]
            d = tl.fma(-age, w, anchor - k)
            if y_ptr is not None:
                past, now = weigh(d - u)
                y = ratio(tl.fma(past, num, now * v), tl.fma(past, den, now))
                tl.store(y_ptr + offset + i * C, y, mask=in_c)
            num, den, anchor, age = absorb(num, den, anchor, age, d, w, v, 1.0, k, 1.0)
            if (edge_ptr is not None) and (y_ptr is not None):
                if (edge & 2) != 0:
                    n = (edge >> 2).to(tl.int64)
                    store_aged(final_ptr + n * C + c, field, num, den, anchor, age, w, in_c)
    return num, den, anchor, age


@triton.jit(do_not_specialize=["N", "T", "chunk"])
def _wkv_fwd_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    initial_ptr,  # [3, N, C], before every sequence; None: empty
    carry_ptr,  # [3, B * chunks, C], before every chunk; None: a chunk is a sequence, or a summary is wanted
    edge_ptr,  # int32 [T], 4 n + 2 (ends) + (starts): token t's sequence, and whether it ends, starts; None: not packed
    y_ptr,  # [B, T, C]; None: a summary is wanted, the state after each chunk from an empty one
    checkpoint_ptr,  # [B, 3 * blocks, C], or None
    final_ptr,  # [3, N, C]; for summaries [3, B * chunks, C]
    N,
    T,
    chunk,  # tokens a program, a multiple of ROWS
    C: tl.constexpr,  # so that the rows of a block are reached by constant offsets
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = final_ptr.dtype.element_ty
    chunks = tl.cdiv(T, chunk)
    row = tl.program_id(0).to(tl.int64)  # of B * chunks
    b = row // chunks
    begin = (row % chunks).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C) if C % BLOCK_C else tl.full([BLOCK_C], True, tl.int1)
    field = N.to(tl.int64) * C
    carry_field = tl.num_programs(0).to(tl.int64) * C

    w = load_rate(w_ptr, c, in_c, ACC)
    u = tl.load(u_ptr + c, mask=in_c, other=0.0).to(ACC)
    num = tl.zeros([BLOCK_C], ACC)
    den = tl.zeros([BLOCK_C], ACC)
    anchor = tl.full([BLOCK_C], NO_PAST, ACC)
    age = tl.zeros([BLOCK_C], ACC)
    if carry_ptr is not None:
        num, den, anchor = load_state(carry_ptr + row * C + c, carry_field, in_c)
    elif (initial_ptr is not None) and (edge_ptr is None) and (y_ptr is not None):
        num, den, anchor = load_state(initial_ptr + b * C + c, field, in_c)

    if checkpoint_ptr is not None:
        checkpoint_ptr += (b * tl.cdiv(T, ROWS) + begin // ROWS) * 3 * C + c
    offset = (b * T + begin) * C + c
    full = begin + (end - begin) // ROWS * ROWS
    for t in range(begin, full, ROWS):
        num, den, anchor, age = fwd_block(
            offset, w, u, k_ptr, v_ptr, initial_ptr, edge_ptr, y_ptr, checkpoint_ptr, final_ptr,
            num, den, anchor, age, t, end, c, in_c, field, C, ROWS, False,
        )  # fmt: skip
        offset += ROWS * C
        if checkpoint_ptr is not None:
            checkpoint_ptr += 3 * C
    if full < end:
        num, den, anchor, age = fwd_block(
            offset, w, u, k_ptr, v_ptr, initial_ptr, edge_ptr, y_ptr, checkpoint_ptr, final_ptr,
            num, den, anchor, age, full, end, c, in_c, field, C, ROWS, True,
        )  # fmt: skip
    if y_ptr is None:
        store_aged(final_ptr + row * C + c, carry_field, num, den, anchor, age, w, in_c)
    elif edge_ptr is None:
        if end == T:
            store_aged(final_ptr + b * C + c, field, num, den, anchor, age, w, in_c)


@triton.jit(do_not_specialize=["N", "T", "chunk"])
def _wkv_carry_kernel(
    w_ptr,  # [C]
    initial_ptr,  # [3, N, C], or None
    summary_ptr,  # [3, B * chunks, C]
    edge_ptr,  # int32 [T], or None
    carry_ptr,  # [3, B * chunks, C], written: the state before every chunk
    N,
    T,
    chunk,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = carry_ptr.dtype.element_ty
    chunks = tl.cdiv(T, chunk)
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    field = tl.num_programs(0).to(tl.int64) * chunks * C

    w = load_rate(w_ptr, c, in_c, ACC)
    num = tl.zeros([BLOCK_C], ACC)
    den = tl.zeros([BLOCK_C], ACC)
    anchor = tl.full([BLOCK_C], NO_PAST, ACC)
    age = tl.zeros([BLOCK_C], ACC)
    if (initial_ptr is not None) and (edge_ptr is None):
        num, den, anchor = load_state(initial_ptr + b * C + c, N.to(tl.int64) * C, in_c)
    for i in range(chunks):
        offset = (b * chunks + i) * C + c
        store_aged(carry_ptr + offset, field, num, den, anchor, age, w, in_c)
        num_new, den_new, p_new = load_state(summary_ptr + offset, field, in_c)
        d = tl.fma(-age, w, anchor - p_new)
        num_all, den_all, anchor_all, age_all = absorb(
            num, den, anchor, age, d, w, num_new, den_new, p_new, chunk.to(ACC)
        )
        if edge_ptr is not None:  # a chunk in which a sequence starts carries nothing over
            first = tl.load(edge_ptr + i * chunk)
            last = tl.load(edge_ptr + tl.minimum((i + 1) * chunk, T) - 1)
            starts = ((first & 1) != 0) | ((first >> 2) != (last >> 2))
            num_all = tl.where(starts, num_new, num_all)
            den_all = tl.where(starts, den_new, den_all)
            anchor_all = tl.where(starts, p_new, anchor_all)
            age_all = tl.where(starts, 0.0, age_all)
        num = num_all
        den = den_all
        anchor = anchor_all
        age = age_all


def wkv_fwd(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass: y ``[B, T, C]``, final state ``[3, N, C]`` and, with ``save``, the checkpoints."""
    B, T, C = k.shape
    acc = accumulation_dtype(w, u, k, v)
    launch = launch or launch_for(k, acc)
    chunks = triton.cdiv(T, launch.chunk)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(v)
    final = k.new_empty(3, N, C, dtype=acc)
    checkpoints = k.new_empty(checkpoint_shape(B, T, C) if save else 0, dtype=acc)
    edges = None if cu_seqlens is None else packed_edges(cu_seqlens, T)
    w, u = w.contiguous(), u.contiguous()
    grid = (B * chunks, triton.cdiv(C, launch.block_c))
    options = launch.options(C)

    with torch.cuda.device_of(k):
        carry = None
        if chunks > 1:
            summary, carry = k.new_empty(2, 3, B * chunks, C, dtype=acc)
            _wkv_fwd_kernel[grid](
                w, u, k, v, initial, None, edges, None, None, summary, N, T, launch.chunk,
                ROWS=CHECKPOINT_ROWS, **options,
            )  # fmt: skip
            _wkv_carry_kernel[B, grid[1]](w, initial, summary, edges, carry, N, T, launch.chunk, **options)
        _wkv_fwd_kernel[grid](
            w, u, k, v, initial, carry, edges, y, checkpoints if save else None, final, N, T, launch.chunk,
            ROWS=CHECKPOINT_ROWS, **options,
        )  # fmt: skip
    return y, final, checkpoints
