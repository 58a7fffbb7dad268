"""The adjoint of the linear scan on a GPU. It is derived in linear_scan.py; here are its kernel and its launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import conjugate, filled, load, plus, plus_sum, rounded_sum, store, times, times_sum
from fastwkv.kernels.config import Launch
from fastwkv.kernels.held import start
from fastwkv.kernels.launch import scan_dtypes, scan_launch_for
from fastwkv.kernels.linear_scan_carry import run_carry
from fastwkv.kernels.linear_scan_state import (
    as_parts,
    edges_of,
    gate_of,
    load_of_sequence,
    row_constants,
    store_of_sequence,
    summaries,
)
from fastwkv.kernels.packing import fill_idle_rows, packed_edges
from fastwkv.kernels.row_sums import row_sums
from fastwkv.kernels.tiles import block_channels, chunk_span, numbers_of, tile_of_numbers, tile_offsets


@triton.jit
def _reverse_rows(
    numbers, state, initial_ptr, gfinal_ptr, ginitial_ptr, edge_ptr, ga_ptr, gx_ptr, out, place, channels,
    C: tl.constexpr, FIXED: tl.constexpr, LOG: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Run the adjoint over the rows of a tile, the last first, and store what is wanted of each.

    ``numbers`` are gates, gh and h before each row (0 before the first token of all), ``state`` is (q, low, product,
    product_low, ga_sum), ``place`` batch row, first token, the chunk's end and the edges. Return the state before the
    rows.
    """
    gates, ghs, befores = numbers
    q, low, product, product_low, ga_sum = state
    batch, t, end, edges = place
    ROWS: tl.constexpr = len(ghs)
    SUMMARY: tl.constexpr = gx_ptr is None
    gas = ()
    gxs = ()
    row_sum = filled(0.0, q)  # a sum of sums: a running sum of single terms would lose digits over a long T
    for i in tl.static_range(ROWS - 1, -1, -1):
        ga = filled(0.0, q)
        g = ga
        if (not MASKED) or (end > t + i):
            before = q if SUMMARY else befores[i]
            if edge_ptr is not None:
                if ((edges >> (2 * i + 1)) & 1) != 0:
                    low = filled(0.0, q)
                    q = load_of_sequence(gfinal_ptr, edge_ptr + t + i, C, channels, q)
                if ((edges >> (2 * i)) & 1) != 0:
                    before = load_of_sequence(initial_ptr, edge_ptr + t + i, C, channels, q)
            elif (i == 0) and (initial_ptr is not None):
                if t == 0:
                    before = load(initial_ptr, batch * C + channels[0], channels[1], q)
            gate = gates if FIXED else gate_of(gates[i], LOG, EXACT)
            a = conjugate(gate[0])
            a_low = gate[1] if LOG and EXACT else None
            g, low = plus_sum(q, low, ghs[i], EXACT)
            q, q_low = times_sum(a, a_low, g, low, EXACT)
            if not SUMMARY:
                g = rounded_sum(g, low) if EXACT else g
                ga = times(g, conjugate(before))
                if LOG:
                    ga = times(ga, gate[0])
                if FIXED:
                    row_sum = plus(row_sum, ga)
            else:
                product, product_low = times_sum(a, a_low, product, product_low, EXACT)
            low = q_low
            if (edge_ptr is not None) and ((ginitial_ptr is not None) and (not SUMMARY)):
                if ((edges >> (2 * i)) & 1) != 0:
                    store_of_sequence(ginitial_ptr, edge_ptr + t + i, C, channels, rounded_sum(q, low))
        gas = (ga,) + gas
        gxs = (g,) + gxs
    if not SUMMARY:
        at, inside = out
        tl.store(gx_ptr + at, tile_of_numbers(gxs, gx_ptr, ROWS), mask=inside)
        if not FIXED:
            tl.store(ga_ptr + at, tile_of_numbers(gas, ga_ptr, ROWS), mask=inside)
    return q, low, product, product_low, plus(ga_sum, row_sum)


@triton.jit
def _rows_before(h_ptr, offset, STEP: tl.constexpr, tile, known, ROWS: tl.constexpr, like):
    """Read h before each row of a tile, 0 where there is none."""
    return numbers_of(tl.load(h_ptr + offset - STEP + tile, mask=known, other=0.0), ROWS, like)


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
    gx_ptr,  # [B, T, C]; None: a summary is wanted
    ginitial_ptr,  # [N, C], q before every sequence; or None
    summary_ptr,  # [2, B * chunks, C], q before each chunk from zero, product of its gates; None: gradients are wanted
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
    SUMMARY: tl.constexpr = summary_ptr is not None
    chunk_id, batch, begin, end = chunk_span(T, chunk)
    if SUMMARY:  # nothing comes before the first chunk
        end = tl.where(begin == 0, begin, end)
    c, in_c = block_channels(C, BLOCK_C)

    part = tl.zeros([BLOCK_C], ACC)
    zero = (part, part) if PARTS == 2 else (part,)
    q = zero
    gate = gate_of(load(a_ptr, c, in_c, q), LOG, EXACT) if FIXED else None
    if carry_ptr is not None:
        q = load(carry_ptr, chunk_id * C + c, in_c, q)
    elif (gfinal_ptr is not None) and ((edge_ptr is None) and (not SUMMARY)):
        q = load(gfinal_ptr, batch * C + c, in_c, q)
    state = (q, zero, filled(1.0, q), zero, zero)

    rows = tl.arange(0, ROWS)
    tile, in_tile = tile_offsets(rows, tl.program_id(1), BLOCK_C, C, STEP, PARTS)
    whole = (end - begin) // ROWS
    t = begin + whole * ROWS
    offset = (batch * T + (t if STEP > 0 else T - 1 - t)) * (C * PARTS)
    if t < end:
        run = in_tile & (t + rows < end)[:, None]
        ghs = numbers_of(tl.load(gh_ptr + offset + tile, mask=run, other=0.0), ROWS, q)
        gates = gate if FIXED else numbers_of(tl.load(a_ptr + offset + tile, mask=run, other=0.0), ROWS, q)
        known = run & (t + rows > 0)[:, None]
        befores = () if SUMMARY else _rows_before(h_ptr, offset, STEP * PARTS, tile, known, ROWS, q)
        edges = edges_of(edge_ptr + t, rows, t + rows < end) if edge_ptr is not None else 0
        state = _reverse_rows(
            (gates, ghs, befores), state, initial_ptr, gfinal_ptr, ginitial_ptr, edge_ptr, ga_ptr, gx_ptr,
            (offset + tile, run), (batch, t, end, edges), (c, in_c), C, FIXED, LOG, EXACT, True,
        )  # fmt: skip
    for _ in tl.range(0, whole, num_stages=STAGES):
        t -= ROWS
        offset -= ROWS * STEP * PARTS
        ghs = numbers_of(tl.load(gh_ptr + offset + tile, mask=in_tile), ROWS, q)
        gates = gate if FIXED else numbers_of(tl.load(a_ptr + offset + tile, mask=in_tile), ROWS, q)
        known = in_tile & (t + rows > 0)[:, None]
        befores = () if SUMMARY else _rows_before(h_ptr, offset, STEP * PARTS, tile, known, ROWS, q)
        edges = edges_of(edge_ptr + t, rows, rows < ROWS) if edge_ptr is not None else 0
        state = _reverse_rows(
            (gates, ghs, befores), state, initial_ptr, gfinal_ptr, ginitial_ptr, edge_ptr, ga_ptr, gx_ptr,
            (offset + tile, in_tile), (batch, t, end, edges), (c, in_c), C, FIXED, LOG, EXACT, False,
        )  # fmt: skip
    if SUMMARY:
        store(summary_ptr, chunk_id * C + c, rounded_sum(state[0], state[1]), in_c)
        store(summary_ptr, (tl.num_programs(0) + chunk_id) * C + c, rounded_sum(state[2], state[3]), in_c)
    else:
        if FIXED:
            store(ga_ptr, chunk_id * C + c, state[4], in_c)
        if (ginitial_ptr is not None) and (edge_ptr is None):
            if begin == 0:
                store(ginitial_ptr, batch * C + c, rounded_sum(state[0], state[1]), in_c)


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
    constants = row_constants(launch, C, h.dtype, a.is_complex(), fixed, log, reverse, edges is not None, state_dtype)
    a_in, h_in, gh, entry, gfinal_in = as_parts(a, h, gh, initial, gfinal)
    outputs = as_parts(ga, gx, None if initial is None else ginitial)
    inputs = (a_in, h_in, gh, entry)

    carry = None
    if chunks > 1:
        summary, carry = summaries(B * chunks, C, ginitial)
        tensors = (*inputs, None, edges, gfinal_in, None, None, None, summary)
        start(_linear_scan_bwd_kernel, grid, tensors, numbers, constants)
        run_carry(gfinal_in, summary, edges, carry, B, T, launch, C, constants["PARTS"], backward=True)
    start(_linear_scan_bwd_kernel, grid, (*inputs, carry, edges, gfinal_in, *outputs, None), numbers, constants)
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
