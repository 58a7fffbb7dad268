"""The adjoint of the linear scan on a GPU; linear_scan.py holds the mathematics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import (
    conjugate,
    filled,
    load,
    numbers_of,
    plus,
    plus_sum,
    rounded_sum,
    store,
    tile_of_numbers,
    tile_offsets,
    times,
    times_sum,
)
from fastwkv.kernels.config import Launch
from fastwkv.kernels.held import start
from fastwkv.kernels.launch import scan_dtypes, scan_launch_for
from fastwkv.kernels.linear_scan import (
    as_parts,
    edges_of,
    gate_of,
    load_row,
    row_constants,
    store_row,
    summaries,
)
from fastwkv.kernels.linear_scan_carry import run_carry
from fastwkv.kernels.packing import fill_idle_rows, packed_edges
from fastwkv.kernels.row_sums import row_sums


@triton.jit
def _reverse_rows(
    gates, gate, pasts, ghs, initial_ptr, edge_ptr, edges, gfinal_ptr, ga_ptr, gx_ptr, at, inside, ginitial_ptr,
    q, low, product, product_low, ga_sum, b, t, end, c, in_c,
    C: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Run the adjoint over ROWS tokens from t on, the last first, and store what is wanted of each.

    ``pasts`` has h before each token, 0 before the first of all. Returns what is before the tokens.
    """
    OUTPUT: tl.constexpr = ga_ptr is not None
    gas = ()
    gxs = ()
    block_sum = filled(0.0, q)  # a sum of sums: a running sum of single terms would lose digits over a long T
    for i in tl.static_range(ROWS - 1, -1, -1):
        ga = filled(0.0, q)
        g = ga
        if (not MASKED) or (end > t + i):
            past = pasts[i] if OUTPUT else q
            if edge_ptr is not None:
                if ((edges >> (2 * i + 1)) & 1) != 0:
                    low = filled(0.0, q)
                    q = load_row(gfinal_ptr, edge_ptr + t + i, C, c, in_c, q)
                if ((edges >> (2 * i)) & 1) != 0:
                    past = load_row(initial_ptr, edge_ptr + t + i, C, c, in_c, q)
            elif (i == 0) and (initial_ptr is not None):
                if t == 0:
                    past = load(initial_ptr, b * C + c, in_c, q)
            given = gate if gates is None else gate_of(gates[i], LOG, EXACT)
            a = conjugate(given[0])
            a_low = given[1] if LOG and EXACT else None
            g, low = plus_sum(q, low, ghs[i], EXACT)
            q, q_low = times_sum(a, a_low, g, low, EXACT)
            if OUTPUT:
                g = rounded_sum(g, low) if EXACT else g
                ga = times(g, conjugate(past))
                if LOG:
                    ga = times(ga, given[0])
                if gates is None:
                    block_sum = plus(block_sum, ga)
            else:
                product, product_low = times_sum(a, a_low, product, product_low, EXACT)
            low = q_low
            if (edge_ptr is not None) and ((ginitial_ptr is not None) and OUTPUT):
                if ((edges >> (2 * i)) & 1) != 0:
                    store_row(ginitial_ptr, edge_ptr + t + i, C, c, in_c, rounded_sum(q, low))
        gas = (ga,) + gas
        gxs = (g,) + gxs
    if OUTPUT:
        tl.store(gx_ptr + at, tile_of_numbers(gxs, gx_ptr, ROWS), mask=inside)
        if gates is not None:
            tl.store(ga_ptr + at, tile_of_numbers(gas, ga_ptr, ROWS), mask=inside)
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
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    OUTPUT: tl.constexpr = ga_ptr is not None
    chunks = tl.cdiv(T, chunk)
    row = tl.program_id(0).to(tl.int64)  # of B * chunks
    b = row // chunks
    begin = (row % chunks).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, T)
    if not OUTPUT:  # nothing comes before the first chunk
        end = tl.where(begin == 0, begin, end)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C) if C % BLOCK_C else tl.full([BLOCK_C], True, tl.int1)

    zero = tl.zeros([BLOCK_C], ACC)
    q = (zero, zero) if PARTS == 2 else (zero,)
    low = q
    product = filled(1.0, q)
    product_low = q
    ga_sum = q
    gate = gate_of(load(a_ptr, c, in_c, q), LOG, EXACT) if FIXED else None
    if carry_ptr is not None:
        q = load(carry_ptr, row * C + c, in_c, q)
    elif (gfinal_ptr is not None) and ((edge_ptr is None) and OUTPUT):
        q = load(gfinal_ptr, b * C + c, in_c, q)

    rows = tl.arange(0, ROWS)
    tile, in_tile = tile_offsets(rows, tl.program_id(1), BLOCK_C, C, STEP, PARTS)
    whole = (end - begin) // ROWS
    t = begin + whole * ROWS
    start = (b * T + (t if STEP > 0 else T - 1 - t)) * (C * PARTS)
    if t < end:
        run = in_tile & (t + rows < end)[:, None]
        ghs = numbers_of(tl.load(gh_ptr + start + tile, mask=run, other=0.0), ROWS, q)
        gates = None if FIXED else numbers_of(tl.load(a_ptr + start + tile, mask=run, other=0.0), ROWS, q)
        pasts = None
        if OUTPUT:
            past = run & (t + rows > 0)[:, None]
            pasts = numbers_of(tl.load(h_ptr + start - STEP * PARTS + tile, mask=past, other=0.0), ROWS, q)
        edges = edges_of(edge_ptr + t, rows, t + rows < end) if edge_ptr is not None else 0
        q, low, product, product_low, ga_sum = _reverse_rows(
            gates, gate, pasts, ghs, initial_ptr, edge_ptr, edges, gfinal_ptr,
            ga_ptr, gx_ptr, start + tile, run, ginitial_ptr, q, low, product, product_low, ga_sum,
            b, t, end, c, in_c, C, LOG, ROWS, EXACT, True,
        )  # fmt: skip
    for _ in tl.range(0, whole, num_stages=STAGES):
        t -= ROWS
        start -= ROWS * STEP * PARTS
        ghs = numbers_of(tl.load(gh_ptr + start + tile, mask=in_tile), ROWS, q)
        gates = None if FIXED else numbers_of(tl.load(a_ptr + start + tile, mask=in_tile), ROWS, q)
        pasts = None
        if OUTPUT:
            past = in_tile & (t + rows > 0)[:, None]
            pasts = numbers_of(tl.load(h_ptr + start - STEP * PARTS + tile, mask=past, other=0.0), ROWS, q)
        edges = edges_of(edge_ptr + t, rows, rows < ROWS) if edge_ptr is not None else 0
        q, low, product, product_low, ga_sum = _reverse_rows(
            gates, gate, pasts, ghs, initial_ptr, edge_ptr, edges, gfinal_ptr,
            ga_ptr, gx_ptr, start + tile, in_tile, ginitial_ptr, q, low, product, product_low, ga_sum,
            b, t, end, c, in_c, C, LOG, ROWS, EXACT, False,
        )  # fmt: skip
    if not OUTPUT:
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
    edges: Tensor | None = None,
    launch: Launch | None = None,
    gx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward pass: ga, gx (of this dtype) and, if there is one, the gradient of the initial state."""
    B, T, C = h.shape[:3]
    state_dtype = scan_dtypes(a, h)[1]
    launch = launch or scan_launch_for(h, backward=True)
    chunks = -(-T // launch.chunk)
    gx = torch.empty_like(h, dtype=dtype) if gx is None else gx
    ga = h.new_empty(B * chunks, C, dtype=state_dtype) if a.dim() == 1 else torch.empty_like(a)
    ginitial = h.new_empty(0, dtype=state_dtype) if initial is None else torch.empty_like(initial)
    if cu_seqlens is not None and edges is None:
        edges = packed_edges(cu_seqlens, T, reverse)
    fixed = a.dim() == 1
    grid = (B * chunks, -(-C // launch.block_c))
    numbers = (T, launch.chunk)
    kind = row_constants(launch, C, h.dtype, a.is_complex(), fixed, log, reverse, edges is not None, state_dtype)
    a_in, h_in, gh, entry, gend = as_parts(a, h, gh, initial, gfinal)
    outputs = as_parts(ga, gx, None if initial is None else ginitial)
    inputs = (a_in, h_in, gh, entry)

    carry = None
    if chunks > 1:
        summary, carry = summaries(B * chunks, C, ginitial)
        start(_linear_scan_bwd_kernel, grid, (*inputs, None, edges, gend, None, None, summary), numbers, kind)
        run_carry(gend, summary, edges, carry, B, T, launch, C, kind["PARTS"], backward=True)
    start(_linear_scan_bwd_kernel, grid, (*inputs, carry, edges, gend, *outputs), numbers, kind)
    if cu_seqlens is not None and edges is not None and initial is not None:
        fill_idle_rows(cu_seqlens, edges, gfinal, ginitial, reverse)
    if fixed:
        terms, ga = ga, torch.empty_like(a)
        parts = [torch.view_as_real(t).flatten(-2) if t.is_complex() else t for t in (terms, ga)]
        row_sums(parts[0][None], parts[1])
    return ga, gx, ginitial


def linear_scan_bwd_(
    a: Tensor,
    h: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    log: bool,
    reverse: bool,
    gh: Tensor,
    gfinal: Tensor | None,
    edges: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the backward pass and write gx over gh, which is contiguous: no token is read after it has been written.

    A program reads a tile of gh once, asks ahead for others alone, and is one warp, no lane of which copies another.
    """
    given = a, h, initial, cu_seqlens, log, reverse, gh, gfinal
    ga, _, ginitial = linear_scan_bwd(*given, gh.dtype, edges, launch, gx=gh)
    return ga, ginitial
