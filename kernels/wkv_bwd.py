"""The adjoint of WKV on a GPU; wkv.py holds the mathematics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import negated, quotient, rows_of, tile_of
from fastwkv.kernels.config import BACKWARD_REGISTERS, Launch
from fastwkv.kernels.held import start
from fastwkv.kernels.launch import launch_for
from fastwkv.kernels.packing import fill_idle_rows, has_row, is_start, packed_edges
from fastwkv.kernels.row_sums import row_sums
from fastwkv.kernels.wkv_carry import _wkv_bwd_carry_kernel, carry_constants
from fastwkv.kernels.wkv_entry import entry_states
from fastwkv.kernels.wkv_state import (
    absorb,
    at_least_tiny,
    enter,
    leave,
    lifted,
    load_rate,
    load_state,
    row_constants,
    run_begin,
    tiny,
    weigh,
)


@triton.jit
def _or_one(den):
    return tl.where(den <= tiny(den), 1.0, den)


@triton.jit
def _quotient(a, b, inverse):
    """Return a / b, rounded once: thousands of factors 1-r multiply, and where nothing is added they must be 1."""
    q = a * inverse
    return tl.fma(tl.fma(negated(q), b, a), inverse, q)


@triton.jit
def _bwd_rows(
    ks, vs, gys, w, u, num, den, anchor, age, gm, gl, a, b, gw, gu, first, last,
    GRADIENTS: tl.constexpr, SURE: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Go through the tokens of a tile once more, then back: gk and gv of each, and the adjoints before them.

    The state is that before the tile. With MASKED tokens before ``first`` and from ``last`` on are absent and do not
    take time: k = -inf, v = 0, gy = 0.
    """
    weight = den if SURE else _or_one(den)
    mean = num / weight
    alphas = ()
    gys_now = ()  # gy s
    gys_past = ()  # gy (1-s)
    rs = ()
    decays = ()  # 1-r
    slopes = ()  # r (1-r) δ
    seen = tl.zeros_like(den).to(tl.int32)  # bit i: the past of token i has weight
    for i in tl.static_range(ROWS):
        k = ks[i].to(w.dtype)
        v = vs[i].to(w.dtype)
        gy = gys[i].to(w.dtype)
        step = 1.0
        if MASKED:
            step = tl.where((first <= i) & (last > i), 1.0, 0.0)
        if not SURE:
            seen |= (den > tiny(den)).to(tl.int32) << i
        delta = v - mean
        d = tl.fma(negated(age), w, anchor - k)

        past, now = weigh(d - u)
        total = tl.fma(past, den, now)
        if not SURE:  # without any weight y is 0, whatever the state
            gy = tl.where(total <= tiny(total), 0.0, gy)
            total = at_least_tiny(total, False)
        s = quotient(now, total)
        gy_past = gy * quotient(past * weight, total)
        alphas = alphas + (gy_past * s * delta,)
        gys_now = gys_now + (gy * s,)
        gys_past = gys_past + (gy_past,)

        past, now = weigh(d - step * w)
        past *= weight
        num, den, anchor, age = absorb(num, den, anchor, age, d, w, v, 1.0, k, step)
        weight = den if SURE else _or_one(den)
        inverse = quotient(1.0, weight)
        r = now * inverse
        decay = _quotient(past, weight, inverse)
        mean = num * inverse
        rs = rs + (r,)
        decays = decays + (decay,)
        slopes = slopes + (r * decay * delta,)

    gks = ()
    gvs = ()
    gw_rows = tl.zeros_like(gw)  # a sum of sums: a running sum of single terms would lose digits over a long T
    gu_rows = tl.zeros_like(gu)
    for i in tl.static_range(ROWS - 1, -1, -1):
        both = tl.fma(gm, slopes[i], alphas[i])  # α + β
        gl_past = gl * decays[i]
        if GRADIENTS:
            gk = both
            gw_term = tl.fma(gm, slopes[i], negated(gl_past))
            gu_term = alphas[i]
            if MASKED:
                gw_term = tl.where((first <= i) & (last > i), gw_term, 0.0)
            if not SURE:  # that an empty state counts as den = 1 is for num and den alone
                weighs = (seen & (1 << i)) != 0
                gk = tl.where(weighs, gk, 0.0)
                gw_term = tl.where(weighs, gw_term, 0.0)
                gu_term = tl.where(weighs, gu_term, 0.0)
            gvs = (tl.fma(gm, rs[i], gys_now[i]),) + gvs
            gks = (tl.fma(gl, rs[i], gk),) + gks
            gw_rows += gw_term
            gu_rows += gu_term
        else:
            b = tl.fma(negated(slopes[i]), a, decays[i] * b)
            a = decays[i] * a
        gl = gl_past - both
        gm = tl.fma(gm, decays[i], gys_past[i])
    return gks, gvs, gm, gl, a, b, gw + gw_rows, gu + gu_rows


@triton.jit(do_not_specialize=["N", "T", "chunk"])
def _wkv_bwd_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    gy_ptr,  # [B, T, C]
    checkpoint_ptr,  # [B, 3 * blocks, C]
    initial_ptr,  # [4, N, C], before every sequence (wkv_entry.py); or None
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
    ROWS: tl.constexpr,  # tokens a checkpoint
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = gwu_ptr.dtype.element_ty
    chunks = tl.cdiv(T, chunk)
    row = tl.program_id(0).to(tl.int64)  # of B * chunks
    batch = row // chunks
    begin = (row % chunks).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, T)
    if gk_ptr is None:  # nothing comes before the first chunk
        end = tl.where(begin == 0, begin, end)
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
    elif (gfinal_ptr is not None) and ((edge_ptr is None) and (gk_ptr is not None)):
        gm = tl.load(gfinal_ptr + batch * C + c, mask=in_c, other=0.0)
        gl = tl.load(gfinal_ptr + field + batch * C + c, mask=in_c, other=0.0)
    a = tl.full([BLOCK_C], 1.0, ACC)
    b = tl.zeros([BLOCK_C], ACC)
    gw = tl.zeros([BLOCK_C], ACC)
    gu = tl.zeros([BLOCK_C], ACC)

    rows = tl.arange(0, ROWS)
    tile = rows[:, None] * C + c[None, :]
    whole = (end - begin) // ROWS if edge_ptr is None else 0
    checkpoint_ptr += (batch * tl.cdiv(T, ROWS) + begin // ROWS) * 3 * C + c
    origin = (batch * T + begin) * C
    stop = end
    while stop > begin + whole * ROWS:  # the last tokens; if packed all, a run of one sequence at a time
        block = (stop - 1 - begin) // ROWS
        t = begin + block * ROWS
        start = origin + block.to(tl.int64) * (ROWS * C)
        first = 0
        last = stop - t
        num, den, anchor = load_state(checkpoint_ptr + block.to(tl.int64) * (3 * C), C, in_c)
        age = tl.zeros_like(den)
        if edge_ptr is not None:
            first = run_begin(edge_ptr + t, rows, last)
            edge = tl.load(edge_ptr + stop - 1)
            gm, gl, a, b = leave(edge, gfinal_ptr, C, c, in_c, field, gm, gl, a, b)
            edge = tl.load(edge_ptr + t + first)
            num, den, anchor, age = enter(edge, initial_ptr, C, c, in_c, field, num, den, anchor, age)
        run = ((rows >= first) & (rows < last))[:, None] & in_c[None, :]
        ks = rows_of(tl.load(k_ptr + start + tile, mask=run, other=-float("inf")), ROWS)
        vs = rows_of(tl.load(v_ptr + start + tile, mask=run, other=0.0), ROWS)
        gys = rows_of(tl.load(gy_ptr + start + tile, mask=run, other=0.0), ROWS)
        gks, gvs, gm, gl, a, b, gw, gu = _bwd_rows(
            ks, vs, gys, w, u, num, den, anchor, age, gm, gl, a, b, gw, gu, first, last,
            gk_ptr is not None, initial_ptr is None, True, ROWS,
        )  # fmt: skip
        if gk_ptr is not None:
            tl.store(gk_ptr + start + tile, tile_of(gks, gk_ptr, ROWS), mask=run)
            tl.store(gv_ptr + start + tile, tile_of(gvs, gv_ptr, ROWS), mask=run)
        if (edge_ptr is not None) and (ginitial_ptr is not None):
            if is_start(edge):
                at = ginitial_ptr + (edge >> 2).to(tl.int64) * C + c
                lift_ptr = initial_ptr + 3 * field + (edge >> 2).to(tl.int64) * C + c
                tl.store(at, lifted(gm, lift_ptr, has_row(edge, in_c)), mask=has_row(edge, in_c))
                tl.store(at + field, lifted(gl, lift_ptr, has_row(edge, in_c)), mask=has_row(edge, in_c))
        stop = t + first
    start = origin + (ROWS * C) * tl.full([], 1, tl.int64) * whole
    checkpoint_ptr += tl.full([], 3 * C, tl.int64) * whole
    ceiling = start
    for _ in tl.range(0, whole, num_stages=STAGES):
        start = tl.minimum(start - ROWS * C, ceiling)  # hides from LLVM that it could keep 20 addresses in registers
        checkpoint_ptr -= 3 * C
        ks = rows_of(tl.load(k_ptr + start + tile, mask=in_c[None, :]), ROWS)
        vs = rows_of(tl.load(v_ptr + start + tile, mask=in_c[None, :]), ROWS)
        gys = rows_of(tl.load(gy_ptr + start + tile, mask=in_c[None, :]), ROWS)
        num, den, anchor = load_state(checkpoint_ptr, C, in_c)
        gks, gvs, gm, gl, a, b, gw, gu = _bwd_rows(
            ks, vs, gys, w, u, num, den, anchor, tl.zeros_like(den), gm, gl, a, b, gw, gu, 0, ROWS,
            gk_ptr is not None, initial_ptr is None, False, ROWS,
        )  # fmt: skip
        if gk_ptr is not None:
            tl.store(gk_ptr + start + tile, tile_of(gks, gk_ptr, ROWS), mask=in_c[None, :])
            tl.store(gv_ptr + start + tile, tile_of(gvs, gv_ptr, ROWS), mask=in_c[None, :])

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
                lift_ptr = initial_ptr + 3 * field + batch * C + c
                tl.store(ginitial_ptr + batch * C + c, lifted(gm, lift_ptr, in_c), mask=in_c)
                tl.store(ginitial_ptr + field + batch * C + c, lifted(gl, lift_ptr, in_c), mask=in_c)


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
    edges: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward pass: gw, gu, gk, gv and, if there is an initial state, its (gm, gl) ``[2, N, C]``."""
    B, T, C = k.shape
    acc = checkpoints.dtype
    launch = launch or launch_for(k, backward=True)
    chunks = -(-T // launch.chunk)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gk, gv = torch.empty_like(k), torch.empty_like(v)
    gwu = k.new_empty(2, B * chunks, C, dtype=acc)
    ginitial = k.new_empty((2, N, C) if initial is not None else 0, dtype=acc)
    if cu_seqlens is not None and edges is None:
        edges = packed_edges(cu_seqlens, T)
    rates = (w.contiguous(), u.contiguous())
    grid = (B * chunks, -(-C // launch.block_c))
    numbers = (N, T, launch.chunk)
    kind = row_constants(launch, C, acc, BACKWARD_REGISTERS)
    entry = None if initial is None else entry_states(*rates, k, initial, cu_seqlens)
    inputs = (*rates, k, v, gy, checkpoints, entry, edges, gfinal)

    carry = None
    if chunks > 1:
        summary = k.new_empty(4, B * chunks, C, dtype=acc)
        carry = k.new_empty(2, B * chunks, C, dtype=acc)
        start(_wkv_bwd_kernel, grid, (*inputs, None, None, None, summary, None), numbers, kind)
        ends = (gfinal, summary, edges, carry)
        start(_wkv_bwd_carry_kernel, (B, grid[1]), ends, numbers, carry_constants(launch, C))
    outputs = (gk, gv, gwu, None if initial is None else ginitial)
    start(_wkv_bwd_kernel, grid, (*inputs, carry, *outputs), numbers, kind)
    if cu_seqlens is not None and edges is not None and initial is not None:
        fill_idle_rows(cu_seqlens, edges, gfinal, ginitial)
    gw, gu = torch.empty_like(rates[0]), torch.empty_like(rates[1])
    row_sums(gwu, gw, gu)
    return gw, gu, gk, gv, ginitial
