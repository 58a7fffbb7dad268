"""The adjoint of WKV on a GPU; wkv.py holds the mathematics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import before
from fastwkv.kernels.config import BACKWARD_ROWS, CHECKPOINT_ROWS, Launch
from fastwkv.kernels.launch import launch_for, packed_edges
from fastwkv.kernels.wkv import fwd_block
from fastwkv.kernels.wkv_state import absorb, enter, load_rate, load_state, tiny, weigh


@triton.jit
def _or_one(den):
    return tl.where(den < tiny(den), 1.0, den)


@triton.jit
def _quotient(a, b, inverse):
    """Return a / b, rounded once: thousands of factors 1-r multiply, and where nothing is added they must be 1."""
    q = a * inverse
    return tl.fma(tl.fma(-q, b, a), inverse, q)


@triton.jit
def _recompute(
    offset, w, u, k_ptr, v_ptr, gy_ptr, initial_ptr, edge_ptr, num, den, anchor, age,
    t, end, c, in_c, field, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute what the adjoint needs of ROWS tokens from t on. Tokens from ``end`` on count as absent."""
    ks = ()
    vs = ()
    gys = ()
    for i in tl.static_range(ROWS):
        in_row = before(t + i, end, c, C)
        ks = ks + (tl.load(k_ptr + offset + i * C, mask=in_row, other=-float("inf")).to(w.dtype),)
        vs = vs + (tl.load(v_ptr + offset + i * C, mask=in_row, other=0.0).to(w.dtype),)
        gys = gys + (tl.load(gy_ptr + offset + i * C, mask=in_row, other=0.0).to(w.dtype),)

    mean = num / _or_one(den)
    alphas = ()
    gys_now = ()  # gy s
    gys_past = ()  # gy (1-s)
    rs = ()
    decays = ()  # 1-r
    slopes = ()  # r (1-r) δ
    not_empty = ()
    for i in tl.static_range(ROWS):
        if edge_ptr is not None:
            edge = tl.load(edge_ptr + t + i, mask=end > t + i, other=0)
            num, den, anchor, age = enter(edge, initial_ptr, C, c, in_c, field, num, den, anchor, age)
            if (edge & 1) != 0:
                mean = num / _or_one(den)
        # Without an initial state nothing is asked of an empty past, and den = 0 does no harm.
        den_past = den if initial_ptr is None else _or_one(den)
        not_empty = not_empty + (den >= tiny(den),)
        delta = vs[i] - mean
        d = tl.fma(-age, w, anchor - ks[i])

        past, now = weigh(d - u)
        total = tl.fma(past, den, now)
        inverse = tl.where(total < tiny(total), 0.0, 1.0 / total)
        s = now * inverse
        gy_past = gys[i] * (past * den_past * inverse)
        alphas = alphas + (gy_past * s * delta,)
        gys_now = gys_now + (gys[i] * s,)
        gys_past = gys_past + (gy_past,)

        past, now = weigh(d - w)
        num, den, anchor, age = absorb(num, den, anchor, age, d, w, vs[i], 1.0, ks[i], 1.0)
        inverse = 1.0 / _or_one(den)
        r = now * inverse
        decay = _quotient(past * den_past, _or_one(den), inverse)
        mean = num * inverse
        rs = rs + (r,)
        decays = decays + (decay,)
        slopes = slopes + (r * decay * delta,)
    return alphas, gys_now, gys_past, rs, decays, slopes, not_empty


@triton.jit
def _reverse(
    offset, alphas, gys_now, gys_past, rs, decays, slopes, not_empty,
    initial_ptr, edge_ptr, gfinal_ptr, gk_ptr, gv_ptr, ginitial_ptr,
    gm, gl, a, b, gw, gu, t, end, c, in_c, field, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Run the adjoint over the recomputed tokens, the last first."""
    gw_block = tl.zeros_like(gw)  # a sum of sums: a running sum of single terms would lose digits over a long T
    gu_block = tl.zeros_like(gu)
    for i in tl.static_range(ROWS - 1, -1, -1):
        in_row = before(t + i, end, c, C)
        if edge_ptr is not None:
            edge = tl.load(edge_ptr + t + i, mask=end > t + i, other=0)
            n = (edge >> 2).to(tl.int64)
            if (edge & 2) != 0:
                gm = tl.zeros_like(gm)
                gl = tl.zeros_like(gl)
                a = tl.zeros_like(a)
                b = tl.zeros_like(b)
                if gfinal_ptr is not None:
                    gm = tl.load(gfinal_ptr + n * C + c, mask=in_c, other=0.0)
                    gl = tl.load(gfinal_ptr + field + n * C + c, mask=in_c, other=0.0)
        decay = tl.where(in_row, decays[i], 1.0)
        both = tl.fma(gm, slopes[i], alphas[i])  # α + β
        gl_past = gl * decay
        if gk_ptr is not None:
            gk_past = both
            gw_term = tl.where(in_row, tl.fma(gm, slopes[i], -gl_past), 0.0)
            gu_term = alphas[i]
            if initial_ptr is not None:  # that an empty state counts as den = 1 is for num and den alone
                gk_past = tl.where(not_empty[i], gk_past, 0.0)
                gw_term = tl.where(not_empty[i], gw_term, 0.0)
                gu_term = tl.where(not_empty[i], gu_term, 0.0)
            tl.store(gv_ptr + offset + i * C, tl.fma(gm, rs[i], gys_now[i]), mask=in_row)
            tl.store(gk_ptr + offset + i * C, tl.fma(gl, rs[i], gk_past), mask=in_row)
            gw_block += gw_term
            gu_block += gu_term
        else:
            b = tl.fma(-slopes[i], a, decay * b)
            a = decay * a
        gl = gl_past - both
        gm = tl.fma(gm, decay, gys_past[i])
        if (edge_ptr is not None) and (ginitial_ptr is not None):
            if (edge & 1) != 0:
                tl.store(ginitial_ptr + n * C + c, gm, mask=in_c)
                tl.store(ginitial_ptr + field + n * C + c, gl, mask=in_c)
    return gm, gl, a, b, gw + gw_block, gu + gu_block


@triton.jit(do_not_specialize=["N", "T", "chunk"])
def _wkv_bwd_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    gy_ptr,  # [B, T, C]
    checkpoint_ptr,  # [B, 3 * blocks, C]
    initial_ptr,  # [3, N, C], where packed sequences start; or None
    edge_ptr,  # int32 [T], or None
    gfinal_ptr,  # [2, N, C], (gm, gl) after every sequence; None: zero
    carry_ptr,  # [2, B * chunks, C], (gm, gl) after every chunk; None: a chunk is a sequence, or a summary is wanted
    gk_ptr,  # [B, T, C]; None: a summary is wanted
    gv_ptr,  # [B, T, C]
    gwu_ptr,  # [2, B * chunks, C], terms of gw and gu; for summaries [4, B * chunks, C], cm, cl, a, b
    ginitial_ptr,  # [2, N, C], (gm, gl) before every sequence; or None
    N,
    T,
    chunk,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,  # tokens a checkpoint, a multiple of ROWS
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = gwu_ptr.dtype.element_ty
    chunks = tl.cdiv(T, chunk)
    row = tl.program_id(0).to(tl.int64)  # of B * chunks
    batch = row // chunks
    begin = (row % chunks).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C) if C % BLOCK_C else tl.full([BLOCK_C], True, tl.int1)
    field = N.to(tl.int64) * C
    carry_field = tl.num_programs(0).to(tl.int64) * C

    w = load_rate(w_ptr, c, in_c, ACC)
    u = tl.load(u_ptr + c, mask=in_c, other=0.0).to(ACC)
    gm = tl.zeros([BLOCK_C], ACC)
    gl = tl.zeros([BLOCK_C], ACC)
    if carry_ptr is not None:
        gm = tl.load(carry_ptr + row * C + c, mask=in_c, other=0.0)
        gl = tl.load(carry_ptr + carry_field + row * C + c, mask=in_c, other=0.0)
    elif (gfinal_ptr is not None) and (edge_ptr is None) and (gk_ptr is not None):
        gm = tl.load(gfinal_ptr + batch * C + c, mask=in_c, other=0.0)
        gl = tl.load(gfinal_ptr + field + batch * C + c, mask=in_c, other=0.0)
    a = tl.full([BLOCK_C], 1.0, ACC)
    b = tl.zeros([BLOCK_C], ACC)
    gw = tl.zeros([BLOCK_C], ACC)
    gu = tl.zeros([BLOCK_C], ACC)

    last = (end - 1) // ROWS * ROWS
    offset = (batch * T + last) * C + c
    checkpoint_ptr += batch * tl.cdiv(T, KEPT) * 3 * C + c
    for t in range(last, begin - 1, -ROWS):
        kept = t // KEPT
        num, den, anchor = load_state(checkpoint_ptr + kept * tl.full([], 3 * C, tl.int64), C, in_c)
        age = tl.zeros([BLOCK_C], ACC)
        for s in range(kept * KEPT, t, ROWS):
            num, den, anchor, age = fwd_block(
                offset - (t - s) * C, w, u, k_ptr, v_ptr, initial_ptr, edge_ptr, None, None, None,
                num, den, anchor, age, s, end, c, in_c, field, C, ROWS, False,
            )  # fmt: skip
        tokens = _recompute(
            offset, w, u, k_ptr, v_ptr, gy_ptr, initial_ptr, edge_ptr, num, den, anchor, age,
            t, end, c, in_c, field, C, ROWS,
        )  # fmt: skip
        gm, gl, a, b, gw, gu = _reverse(
            offset, *tokens, initial_ptr, edge_ptr, gfinal_ptr, gk_ptr, gv_ptr, ginitial_ptr,
            gm, gl, a, b, gw, gu, t, end, c, in_c, field, C, ROWS,
        )  # fmt: skip
        offset -= ROWS * C

    out_ptr = gwu_ptr + row * C + c
    if gk_ptr is None:
        tl.store(out_ptr, gm, mask=in_c)
        tl.store(out_ptr + carry_field, gl, mask=in_c)
        tl.store(out_ptr + 2 * carry_field, a, mask=in_c)
        tl.store(out_ptr + 3 * carry_field, b, mask=in_c)
    else:
        tl.store(out_ptr, gw, mask=in_c)
        tl.store(out_ptr + carry_field, gu, mask=in_c)
        if (ginitial_ptr is not None) and (edge_ptr is None):
            if begin == 0:
                tl.store(ginitial_ptr + batch * C + c, gm, mask=in_c)
                tl.store(ginitial_ptr + field + batch * C + c, gl, mask=in_c)


@triton.jit(do_not_specialize=["N", "chunks"])
def _wkv_bwd_carry_kernel(
    gfinal_ptr,  # [2, N, C], or None
    summary_ptr,  # [4, B * chunks, C]: cm, cl, a, b
    carry_ptr,  # [2, B * chunks, C], written: (gm, gl) after every chunk
    N,
    chunks,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = carry_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    field = tl.num_programs(0).to(tl.int64) * chunks * C

    gm = tl.zeros([BLOCK_C], ACC)
    gl = tl.zeros([BLOCK_C], ACC)
    if gfinal_ptr is not None:
        # In a packed batch the last chunk ends a sequence and takes nothing from here, whatever is read.
        gm = tl.load(gfinal_ptr + b * C + c, mask=in_c, other=0.0)
        gl = tl.load(gfinal_ptr + N.to(tl.int64) * C + b * C + c, mask=in_c, other=0.0)
    for i in range(chunks - 1, -1, -1):
        offset = (b * chunks + i) * C + c
        tl.store(carry_ptr + offset, gm, mask=in_c)
        tl.store(carry_ptr + field + offset, gl, mask=in_c)
        cm = tl.load(summary_ptr + offset, mask=in_c, other=0.0)
        cl = tl.load(summary_ptr + field + offset, mask=in_c, other=0.0)
        past = tl.load(summary_ptr + 2 * field + offset, mask=in_c, other=0.0)
        mixed = tl.load(summary_ptr + 3 * field + offset, mask=in_c, other=0.0)
        gl = tl.fma(past, gl, tl.fma(mixed, gm, cl))
        gm = tl.fma(past, gm, cm)


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
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward pass: gw, gu, gk, gv and, if there is an initial state, its (gm, gl) ``[2, N, C]``."""
    B, T, C = k.shape
    acc = checkpoints.dtype
    launch = launch or launch_for(k, acc)
    chunks = triton.cdiv(T, launch.chunk)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gk, gv = torch.empty_like(k), torch.empty_like(v)
    gwu = k.new_empty(2, B * chunks, C, dtype=acc)
    ginitial = k.new_empty((2, N, C) if initial is not None else 0, dtype=acc)
    edges = None if cu_seqlens is None else packed_edges(cu_seqlens, T)
    rates = (w.contiguous(), u.contiguous())
    grid = (B * chunks, triton.cdiv(C, launch.block_c))
    options = launch.options(C)
    rows = {"ROWS": BACKWARD_ROWS, "KEPT": CHECKPOINT_ROWS}
    inputs = (*rates, k, v, gy, checkpoints, initial, edges, gfinal)

    with torch.cuda.device_of(k):
        carry = None
        if chunks > 1:
            summary = k.new_empty(4, B * chunks, C, dtype=acc)
            carry = k.new_empty(2, B * chunks, C, dtype=acc)
            _wkv_bwd_kernel[grid](*inputs, None, None, None, summary, None, N, T, launch.chunk, **rows, **options)
            _wkv_bwd_carry_kernel[B, grid[1]](gfinal, summary, carry, N, chunks, **options)
        _wkv_bwd_kernel[grid](
            *inputs, carry, gk, gv, gwu, None if initial is None else ginitial, N, T, launch.chunk, **rows, **options
        )
        gw, gu = (terms.sum(0) for terms in gwu)  # each in a storage of its own
    return gw.to(w.dtype), gu.to(u.dtype), gk, gv, ginitial
