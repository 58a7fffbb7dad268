"""The adjoint of the linear scan on a GPU; linear_scan.py holds the mathematics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import (
    before,
    conjugate,
    filled,
    load,
    plus,
    plus_sum,
    rounded_sum,
    store,
    times,
    times_sum,
)
from fastwkv.kernels.config import SCAN_BACKWARD_ROWS, Launch
from fastwkv.kernels.launch import packed_edges, scan_dtypes, scan_launch_for
from fastwkv.kernels.linear_scan import as_parts, load_gate, options, run_carry, summaries


@triton.jit
def _reverse_rows(
    offset, a_ptr, gate, h_ptr, gh_ptr, initial_ptr, edge_ptr, gfinal_ptr, ga_ptr, gx_ptr, ginitial_ptr,
    q, low, product, product_low, ga_sum, b, t, end, c, in_c,
    C: tl.constexpr, STEP: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Run the adjoint over ROWS tokens from t on, the last first. Returns what is before them."""
    gates = ()
    hs = ()
    ghs = ()
    for i in tl.static_range(ROWS):
        in_row = before(t + i, end, c, C) if MASKED else in_c
        gates = gates + (load_gate(a_ptr, offset + i * STEP, in_row, q, LOG, EXACT) if gate is None else gate,)
        ghs = ghs + (load(gh_ptr, offset + i * STEP, in_row, q),)
        if ga_ptr is not None:  # h of the token before; before the first one, nothing
            in_row = before(0, t, c, C) if i == 0 else in_row
            hs = hs + (load(h_ptr, offset + i * STEP - STEP, in_row, q),)
    block_sum = filled(0.0, q)  # a sum of sums: a running sum of single terms would lose digits over a long T
    for i in tl.static_range(ROWS - 1, -1, -1):
        if (not MASKED) or (end > t + i):
            h_past = hs[i] if ga_ptr is not None else q
            if edge_ptr is not None:
                edge = tl.load(edge_ptr + t + i)
                n = (edge >> 2).to(tl.int64)
                if (edge & 2) != 0:
                    low = filled(0.0, q)
                    q = filled(0.0, q)
                    if gfinal_ptr is not None:
                        q = load(gfinal_ptr, n * C + c, in_c, q)
                if (edge & 1) != 0:
                    h_past = filled(0.0, q)
                    if initial_ptr is not None:
                        h_past = load(initial_ptr, n * C + c, in_c, q)
            elif (i == 0) and (initial_ptr is not None):
                if t == 0:
                    h_past = load(initial_ptr, b * C + c, in_c, q)
            a = conjugate(gates[i][0])
            a_low = gates[i][1] if LOG and EXACT else None
            g, low = plus_sum(q, low, ghs[i], EXACT)
            if ga_ptr is not None:
                gx = rounded_sum(g, low) if EXACT else g
                store(gx_ptr, offset + i * STEP, gx, in_c)
                ga = times(gx, conjugate(h_past))
                if LOG:
                    ga = times(ga, gates[i][0])
                if gate is None:
                    store(ga_ptr, offset + i * STEP, ga, in_c)
                else:
                    block_sum = plus(block_sum, ga)
            else:
                product, product_low = times_sum(a, a_low, product, product_low, EXACT)
            q, low = times_sum(a, a_low, g, low, EXACT)
            if (edge_ptr is not None) and ((ginitial_ptr is not None) and (ga_ptr is not None)):
                if (edge & 1) != 0:
                    store(ginitial_ptr, n * C + c, rounded_sum(q, low), in_c)
    return q, low, product, product_low, plus(ga_sum, block_sum)


@triton.jit(do_not_specialize=["T", "chunk"])
def _linear_scan_bwd_kernel(
    a_ptr,  # [C] or [B, T, C]
    h_ptr,  # [B, T, C]
    gh_ptr,  # [B, T, C]
    initial_ptr,  # [N, C], or None
    carry_ptr,  # [B * chunks, C], q after every chunk; None: a chunk is a sequence, or a summary is wanted
    edge_ptr,  # int32 [T], or None
    gfinal_ptr,  # [N, C], q after every sequence; None: zero
    ga_ptr,  # [B, T, C], or terms of the sum [B * chunks, C]; None: a summary is wanted
    gx_ptr,  # [B, T, C]
    ginitial_ptr,  # [N, C], q before every sequence, or None; for summaries [2, B * chunks, C]
    T,
    chunk,
    C: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    EXACT: tl.constexpr,
    FIXED: tl.constexpr,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    chunks = tl.cdiv(T, chunk)
    row = tl.program_id(0).to(tl.int64)  # of B * chunks
    b = row // chunks
    begin = (row % chunks).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C) if C % BLOCK_C else tl.full([BLOCK_C], True, tl.int1)

    zero = tl.zeros([BLOCK_C], ACC)
    q = (zero, zero) if PARTS == 2 else (zero,)
    low = q
    product = filled(1.0, q)
    product_low = q
    ga_sum = q
    gate = load_gate(a_ptr, c, in_c, q, LOG, EXACT) if FIXED else None
    if carry_ptr is not None:
        q = load(carry_ptr, row * C + c, in_c, q)
    elif (gfinal_ptr is not None) and ((edge_ptr is None) and (ga_ptr is not None)):
        q = load(gfinal_ptr, b * C + c, in_c, q)

    full = begin + (end - begin) // ROWS * ROWS
    offset = (b * T + (full if STEP > 0 else T - 1 - full)) * C + c
    if full < end:
        q, low, product, product_low, ga_sum = _reverse_rows(
            offset, a_ptr, gate, h_ptr, gh_ptr, initial_ptr, edge_ptr, gfinal_ptr, ga_ptr, gx_ptr, ginitial_ptr,
            q, low, product, product_low, ga_sum, b, full, end, c, in_c, C, STEP, LOG, ROWS, EXACT, True,
        )  # fmt: skip
    for t in range(full - ROWS, begin - 1, -ROWS):
        offset -= ROWS * STEP
        q, low, product, product_low, ga_sum = _reverse_rows(
            offset, a_ptr, gate, h_ptr, gh_ptr, initial_ptr, edge_ptr, gfinal_ptr, ga_ptr, gx_ptr, ginitial_ptr,
            q, low, product, product_low, ga_sum, b, t, end, c, in_c, C, STEP, LOG, ROWS, EXACT, False,
        )  # fmt: skip
    if ga_ptr is None:
        store(ginitial_ptr, row * C + c, rounded_sum(q, low), in_c)
        store(ginitial_ptr, (tl.num_programs(0) + row) * C + c, rounded_sum(product, product_low), in_c)
    else:
        if FIXED:
            store(ga_ptr, row * C + c, ga_sum, in_c)
        if (ginitial_ptr is not None) and (edge_ptr is None):
            if begin == 0:
                store(ginitial_ptr, b * C + c, rounded_sum(q, low), in_c)


def linear_scan_bwd(
    a: Tensor,
    h: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    log: bool,
    reverse: bool,
    gh: Tensor,
    gfinal: Tensor | None,
    dtype: torch.dtype,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward pass: ga, gx (of this dtype) and, if there is one, the gradient of the initial state."""
    B, T, C = h.shape
    state_dtype = scan_dtypes(h.dtype, h.dtype)[1]
    launch = launch or scan_launch_for(h)
    chunks = triton.cdiv(T, launch.chunk)
    gx = torch.empty_like(h, dtype=dtype)
    ga = h.new_empty(B * chunks, C, dtype=state_dtype) if a.dim() == 1 else torch.empty_like(a)
    ginitial = h.new_empty(0, dtype=state_dtype) if initial is None else torch.empty_like(initial)
    edges = None if cu_seqlens is None else packed_edges(cu_seqlens, T, reverse)
    grid = (B * chunks, triton.cdiv(C, launch.block_c))
    kind = options(launch, a, h.dtype, C, log, reverse)
    parts = kind["PARTS"]
    kind |= {"ROWS": SCAN_BACKWARD_ROWS, "ACC": tl.float64 if state_dtype.to_real() == torch.float64 else tl.float32}
    a_in, h_in, gh, initial, gfinal = as_parts(a, h, gh, initial, gfinal)
    outputs = as_parts(ga, gx, None if initial is None else ginitial)

    with torch.cuda.device_of(h):
        carry = None
        if chunks > 1:
            summary, carry = summaries(B * chunks, C, ginitial)
            _linear_scan_bwd_kernel[grid](
                a_in, h_in, gh, initial, None, edges, gfinal, None, None, summary, T, launch.chunk, **kind
            )
            run_carry(gfinal, summary, edges, carry, B, T, launch, C, PARTS=parts, BACKWARD=True)
        _linear_scan_bwd_kernel[grid](a_in, h_in, gh, initial, carry, edges, gfinal, *outputs, T, launch.chunk, **kind)
        if a.dim() == 1:
            ga = ga.sum(0).to(a.dtype)
    return ga, gx, ginitial
