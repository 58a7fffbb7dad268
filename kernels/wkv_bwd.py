"""The adjoint of WKV on a GPU. It is derived in wkv.py, under "Adjoint"; here are its kernel and its launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.config import BACKWARD_REGISTERS, Launch
from fastwkv.kernels.held import start
from fastwkv.kernels.launch import launch_for
from fastwkv.kernels.packing import fill_idle_rows, in_sequence, is_start, packed_edges
from fastwkv.kernels.row_sums import row_sums
from fastwkv.kernels.tiles import block_channels, chunk_span, tile_of
from fastwkv.kernels.wkv_bwd_rows import backward_rows
from fastwkv.kernels.wkv_carry import _wkv_bwd_carry_kernel, carry_constants
from fastwkv.kernels.wkv_entry import entry_states
from fastwkv.kernels.wkv_state import (
    enter,
    leave,
    lifted,
    load_adjoint,
    load_rate,
    load_rows,
    load_state,
    row_constants,
    run_begin,
)


@triton.jit
def _load_tiles(k_ptr, v_ptr, gy_ptr, offset, tile, mask, MASKED: tl.constexpr, ROWS: tl.constexpr):
    """Read the rows of k, v and gy. Absent ones have k = -inf and 0."""
    ks = load_rows(k_ptr + offset, tile, mask, -float("inf"), MASKED, ROWS)
    vs = load_rows(v_ptr + offset, tile, mask, 0.0, MASKED, ROWS)
    gys = load_rows(gy_ptr + offset, tile, mask, 0.0, MASKED, ROWS)
    return ks, vs, gys


@triton.jit
def _store_tiles(gk_ptr, gv_ptr, offset, tile, gks, gvs, mask, ROWS: tl.constexpr):
    """Write the rows of gk and gv, if they are wanted."""
    if gk_ptr is not None:
        tl.store(gk_ptr + offset + tile, tile_of(gks, gk_ptr, ROWS), mask=mask)
        tl.store(gv_ptr + offset + tile, tile_of(gvs, gv_ptr, ROWS), mask=mask)


@triton.jit
def _store_ginitial(ptr, lift_ptr, field, mask, adjoint):
    """Write the gradients of a state that was given."""
    gm, gl = adjoint
    tl.store(ptr, lifted(gm, lift_ptr, mask), mask=mask)
    tl.store(ptr + field, lifted(gl, lift_ptr, mask), mask=mask)


@triton.jit
def _store_ginitial_at(edge, ginitial_ptr, initial_ptr, C, c, in_c, field, adjoint):
    """Write the gradients of a given state if a packed sequence starts at this token."""
    if is_start(edge):
        at = (edge >> 2).to(tl.int64) * C
        lift_ptr = initial_ptr + 3 * field
        _store_ginitial(ginitial_ptr + at + c, lift_ptr + at + c, field, in_sequence(edge, in_c), adjoint)


@triton.jit
def _store_fields(ptr, field, values, mask):
    """Write values, each one field after the other."""
    for i in tl.static_range(len(values)):
        tl.store(ptr + i * field, values[i], mask=mask)


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
    gv_ptr,  # [B, T, C]; None: a summary is wanted
    gwu_ptr,  # [2, B * chunks, C], terms of gw and gu; None: a summary is wanted
    summary_ptr,  # [4, B * chunks, C], cm, cl, kept and mixed of each chunk; None: gradients are wanted
    ginitial_ptr,  # [2, N, C], (gm, gl) before every sequence; or None
    N,
    T,
    chunk,
    C: tl.constexpr,
    ROWS: tl.constexpr,  # tokens a checkpoint
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    SUMMARY: tl.constexpr = summary_ptr is not None
    NEVER_ZERO: tl.constexpr = initial_ptr is None
    ACC: tl.constexpr = checkpoint_ptr.dtype.element_ty
    chunk_id, batch, begin, end = chunk_span(T, chunk)
    if SUMMARY:  # nothing comes before the first chunk
        end = tl.where(begin == 0, begin, end)
    c, in_c = block_channels(C, BLOCK_C)
    field = N.to(tl.int64) * C
    carry_field = tl.num_programs(0).to(tl.int64) * C

    rates = (load_rate(w_ptr, c, in_c, ACC), tl.load(u_ptr + c, mask=in_c, other=0.0).to(ACC))
    zero = tl.zeros([BLOCK_C], ACC)
    adjoint, factors, sums = (zero, zero), (tl.full([BLOCK_C], 1.0, ACC), zero), (zero, zero)
    if carry_ptr is not None:
        adjoint = load_adjoint(carry_ptr, carry_field, chunk_id * C, c, in_c)
    elif (gfinal_ptr is not None) and ((edge_ptr is None) and (not SUMMARY)):
        adjoint = load_adjoint(gfinal_ptr, field, batch * C, c, in_c)

    rows = tl.arange(0, ROWS)
    tile = rows[:, None] * C + c[None, :]
    whole = (end - begin) // ROWS if edge_ptr is None else 0
    checkpoint_ptr += (batch * tl.cdiv(T, ROWS) + begin // ROWS) * 3 * C + c
    origin = (batch * T + begin) * C
    at = end
    while at > begin + whole * ROWS:  # the last tokens; if packed all, a run of one sequence at a time
        block = (at - 1 - begin) // ROWS
        t = begin + block * ROWS
        offset = origin + block.to(tl.int64) * (ROWS * C)
        first = 0
        stop = at - t
        state = load_state(checkpoint_ptr + block.to(tl.int64) * (3 * C), C, in_c)
        if edge_ptr is not None:
            first = run_begin(edge_ptr + t, rows, stop)
            adjoint, factors = leave(tl.load(edge_ptr + at - 1), gfinal_ptr, C, c, in_c, field, adjoint, factors)
            edge = tl.load(edge_ptr + t + first)
            state = enter(edge, initial_ptr, C, c, in_c, field, state)
        run = ((rows >= first) & (rows < stop))[:, None] & in_c[None, :]
        tiles = _load_tiles(k_ptr, v_ptr, gy_ptr, offset, tile, run, True, ROWS)
        gks, gvs, adjoint, factors, sums = backward_rows(
            tiles, rates, state, adjoint, factors, sums, first, stop, SUMMARY, NEVER_ZERO, True, ROWS
        )
        _store_tiles(gk_ptr, gv_ptr, offset, tile, gks, gvs, run, ROWS)
        if (edge_ptr is not None) and (ginitial_ptr is not None):
            _store_ginitial_at(edge, ginitial_ptr, initial_ptr, C, c, in_c, field, adjoint)
        at = t + first
    offset = origin + (ROWS * C) * tl.full([], 1, tl.int64) * whole
    checkpoint_ptr += tl.full([], 3 * C, tl.int64) * whole
    ceiling = offset
    for _ in tl.range(0, whole, num_stages=STAGES):
        offset = tl.minimum(offset - ROWS * C, ceiling)  # hides from LLVM that it could keep 20 addresses in registers
        checkpoint_ptr -= 3 * C
        tiles = _load_tiles(k_ptr, v_ptr, gy_ptr, offset, tile, in_c[None, :], False, ROWS)
        state = load_state(checkpoint_ptr, C, in_c)
        gks, gvs, adjoint, factors, sums = backward_rows(
            tiles, rates, state, adjoint, factors, sums, 0, ROWS, SUMMARY, NEVER_ZERO, False, ROWS
        )
        _store_tiles(gk_ptr, gv_ptr, offset, tile, gks, gvs, in_c[None, :], ROWS)

    if SUMMARY:
        _store_fields(summary_ptr + chunk_id * C + c, carry_field, adjoint + factors, in_c)
    else:
        _store_fields(gwu_ptr + chunk_id * C + c, carry_field, sums, in_c)
        if (ginitial_ptr is not None) and (edge_ptr is None):
            if begin == 0:
                lift_ptr = initial_ptr + 3 * field + batch * C + c
                _store_ginitial(ginitial_ptr + batch * C + c, lift_ptr, field, in_c, adjoint)


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
    constants = row_constants(launch, C, acc, BACKWARD_REGISTERS)
    entry = None if initial is None else entry_states(*rates, k, initial, cu_seqlens)
    inputs = (*rates, k, v, gy, checkpoints, entry, edges, gfinal)

    carry = None
    if chunks > 1:
        summary = k.new_empty(4, B * chunks, C, dtype=acc)
        carry = k.new_empty(2, B * chunks, C, dtype=acc)
        start(_wkv_bwd_kernel, grid, (*inputs, None, None, None, None, summary, None), numbers, constants)
        ends = (gfinal, summary, edges, carry)
        start(_wkv_bwd_carry_kernel, (B, grid[1]), ends, numbers, carry_constants(launch, C))
    outputs = (gk, gv, gwu, None, None if initial is None else ginitial)
    start(_wkv_bwd_kernel, grid, (*inputs, carry, *outputs), numbers, constants)
    if cu_seqlens is not None and edges is not None and initial is not None:
        fill_idle_rows(cu_seqlens, edges, gfinal, ginitial)
    gw, gu = torch.empty_like(rates[0]), torch.empty_like(rates[1])
    row_sums(gwu, gw, gu)
    return gw, gu, gk, gv, ginitial
