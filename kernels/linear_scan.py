"""The diagonal linear recurrence on a GPU: the mathematics, and the forward pass. linear_scan_bwd.py has the adjoint.

Forward. Per channel, real or complex, h_t = a_t h_{t-1} + x_t. Time here is the order of the scan; in memory it runs
backwards where the scan does (STEP = -C).

Adjoint. With q_t the gradient of h_t that comes from later tokens, q of the last one being that of the final state:

    g_t = gh_t + q_t        gx_t = g_t        ga_t = g_t conj(h_{t-1})        q_{t-1} = conj(a_t) g_t

in reverse order; q before the first token is the gradient of the initial state. ga of an `a` that is the same at every
token is summed over them and over the batch, in a fixed order. Where log a is given, a = e^{log a} is computed on chip
and its gradient is ga a. Nothing is stored for this pass: it reads h again, and x not at all.

Exactness. At |a| = 1 nothing is forgotten, rounding errors least of all. Where numbers of 32 bits or more come in or
go out, the state is an unevaluated sum h + low: products give their rounding error by one fused multiply-add, sums by
six additions. So every h_t is the exact result rounded about once, whatever T; that costs arithmetic where bandwidth
is the limit. A gate e^{log a} is such a sum too: near 1 its own rounding would count at every token. 16-bit results
need none of this.

Chunks. Both passes are affine along time. A sequence is one chunk where batch and channels fill the device; else every
chunk is first summarised (the same kernel without its outputs: what it makes of a zero state, and the product of its
a), the summaries are scanned in order, and every chunk is finished from its true state. With packed sequences the
state is replaced wherever one starts; the grid stays the same.

Tiles. A program is one warp, a lane one channel. Tiles of 8 or 16 tokens are read ahead, 16 bytes a lane, and handed
over through shared memory: the state's chain of dependent operations never waits for memory. A complex number is a
pair in memory, of 16 bits a part where x is given as pairs, and two registers.

Source: arXiv 2303.06349, section 3.2; the adjoint is derived here.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import (
    LOG2_E,
    exp_sum,
    filled,
    load,
    numbers_of,
    plus_sum,
    rounded_sum,
    store,
    tile_of_numbers,
    tile_offsets,
    times_sum,
)
from fastwkv.kernels.config import Launch, scan_rows
from fastwkv.kernels.held import Constants, constants, start
from fastwkv.kernels.launch import scan_dtypes, scan_launch_for
from fastwkv.kernels.linear_scan_carry import run_carry
from fastwkv.kernels.linear_scan_step import linear_scan_step
from fastwkv.kernels.packing import fill_idle_rows, has_row, packed_edges

__all__ = ["linear_scan_fwd", "linear_scan_step"]


@triton.jit
def edges_of(edge_ptr, rows, inside):
    """Return in which of these tokens, 16 at most, a sequence starts (bit 2 i of the result) or ends (bit 2 i + 1).

    One number for all of them: the loads of a tile would wait for each of 16.
    """
    return tl.sum((tl.load(edge_ptr + rows, mask=inside, other=0) & 3) << (2 * rows), 0)


@triton.jit
def load_row(row_ptr, edge_ptr, C: tl.constexpr, c, in_c, like):
    """Read the row of a token's sequence, zeros if there are no rows; NaN for a token that belongs to none."""
    edge = tl.load(edge_ptr)
    if row_ptr is not None:
        at = (edge >> 2).to(tl.int64) * C + c
        return load(row_ptr, at, has_row(edge, in_c), like, float("nan"))
    else:
        part = tl.where(edge < 0, float("nan"), tl.zeros_like(like[0]))
        return (part, part) if len(like) == 2 else (part,)


@triton.jit
def store_row(row_ptr, edge_ptr, C: tl.constexpr, c, in_c, z):
    """Write the row of a token's sequence, if it belongs to one."""
    edge = tl.load(edge_ptr)
    store(row_ptr, (edge >> 2).to(tl.int64) * C + c, z, has_row(edge, in_c))


@triton.jit
def gate_of(a, LOG: tl.constexpr, EXACT: tl.constexpr):
    """Return a of what a_ptr has, and with LOG and EXACT what its rounding cuts off: a tuple of one number, or two.

    Not None for the second: Triton below 3.7 lets no function return one beside a tensor.
    """
    if not LOG:
        return (a,)
    elif EXACT:
        high, low = exp_sum(a[0])
        return (high,), (low,)
    else:
        # Triton's exp2 is one instruction; its exp adds three that keep subnormal results, which nothing would miss.
        return ((tl.exp2(a[0] * LOG2_E),),)


@triton.jit
def _forward_rows(
    gates, gate, xs, initial_ptr, edge_ptr, edges, h_ptr, at, inside, final_ptr, h, low, product, product_low,
    t, end, c, in_c, C: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Run ROWS tokens from t on; with MASKED only those before ``end``. Returns the state after them.

    h of each is stored here, where it is wanted: Triton 3.3 returns no tuples of tuples of numbers.
    """
    hs = ()
    for i in tl.static_range(ROWS):
        if (not MASKED) or (end > t + i):
            if edge_ptr is not None:
                if ((edges >> (2 * i)) & 1) != 0:
                    low = filled(0.0, h)
                    h = load_row(initial_ptr, edge_ptr + t + i, C, c, in_c, h)
            a = gate if gates is None else gate_of(gates[i], LOG, EXACT)
            a_low = a[1] if LOG and EXACT else None
            h, low = times_sum(a[0], a_low, h, low, EXACT)
            h, low = plus_sum(h, low, xs[i], EXACT)
            if h_ptr is None:
                product, product_low = times_sum(a[0], a_low, product, product_low, EXACT)
            elif edge_ptr is not None:
                if ((edges >> (2 * i + 1)) & 1) != 0:
                    store_row(final_ptr, edge_ptr + t + i, C, c, in_c, rounded_sum(h, low))
        if h_ptr is not None:
            hs = hs + (rounded_sum(h, low) if EXACT else h,)
    if h_ptr is not None:
        tl.store(h_ptr + at, tile_of_numbers(hs, h_ptr, ROWS), mask=inside)
    return h, low, product, product_low


@triton.jit(do_not_specialize=["T", "chunk"])
def _linear_scan_fwd_kernel(
    a_ptr,  # [C] or [B, T, C]
    x_ptr,  # [B, T, C]
    initial_ptr,  # [N, C], before every sequence; None: zero
    carry_ptr,  # [B * chunks, C], before every chunk; None: a chunk is a sequence, or a summary is wanted
    edge_ptr,  # int32 [T], 4 n + 2 (ends) + (starts): token t's sequence n, -1 for none (packing.py); None: not packed
    h_ptr,  # [B, T, C]; None: a summary is wanted
    final_ptr,  # [N, C]; for summaries [2, B * chunks, C], state after each chunk from zero and product of its a
    T,
    chunk,  # tokens a program, a multiple of ROWS
    C: tl.constexpr,  # so that the rows of a block are reached by constant offsets
    STEP: tl.constexpr,  # from one token to the next, C or -C
    PARTS: tl.constexpr,  # 2 for complex numbers, else 1
    EXACT: tl.constexpr,  # what roundings cut off is carried along
    FIXED: tl.constexpr,  # a is [C]
    LOG: tl.constexpr,  # a_ptr has log a
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = final_ptr.dtype.element_ty
    OUTPUT: tl.constexpr = h_ptr is not None
    chunks = tl.cdiv(T, chunk)
    row = tl.program_id(0).to(tl.int64)  # of B * chunks
    b = row // chunks
    begin = (row % chunks).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, T)
    if not OUTPUT:  # nothing comes after the last chunk
        end = tl.where(end == T, begin, end)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C) if C % BLOCK_C else tl.full([BLOCK_C], True, tl.int1)

    zero = tl.zeros([BLOCK_C], ACC)
    h = (zero, zero) if PARTS == 2 else (zero,)
    low = h
    product = filled(1.0, h)
    product_low = h
    gate = gate_of(load(a_ptr, c, in_c, h), LOG, EXACT) if FIXED else None
    if carry_ptr is not None:
        h = load(carry_ptr, row * C + c, in_c, h)
    elif (initial_ptr is not None) and ((edge_ptr is None) and OUTPUT):
        h = load(initial_ptr, b * C + c, in_c, h)

    rows = tl.arange(0, ROWS)
    tile, in_tile = tile_offsets(rows, tl.program_id(1), BLOCK_C, C, STEP, PARTS)
    start = (b * T + (begin if STEP > 0 else T - 1 - begin)) * (C * PARTS)
    full = begin + (end - begin) // ROWS * ROWS
    for t in tl.range(begin, full, ROWS, num_stages=STAGES):
        xs = numbers_of(tl.load(x_ptr + start + tile, mask=in_tile), ROWS, h)
        gates = None if FIXED else numbers_of(tl.load(a_ptr + start + tile, mask=in_tile), ROWS, h)
        edges = edges_of(edge_ptr + t, rows, rows < ROWS) if edge_ptr is not None else 0
        h, low, product, product_low = _forward_rows(
            gates, gate, xs, initial_ptr, edge_ptr, edges, h_ptr, start + tile, in_tile, final_ptr,
            h, low, product, product_low, t, end, c, in_c, C, LOG, ROWS, EXACT, False,
        )  # fmt: skip
        start += ROWS * STEP * PARTS
    if full < end:
        run = in_tile & (full + rows < end)[:, None]
        xs = numbers_of(tl.load(x_ptr + start + tile, mask=run, other=0.0), ROWS, h)
        gates = None if FIXED else numbers_of(tl.load(a_ptr + start + tile, mask=run, other=0.0), ROWS, h)
        edges = edges_of(edge_ptr + full, rows, full + rows < end) if edge_ptr is not None else 0
        h, low, product, product_low = _forward_rows(
            gates, gate, xs, initial_ptr, edge_ptr, edges, h_ptr, start + tile, run, final_ptr,
            h, low, product, product_low, full, end, c, in_c, C, LOG, ROWS, EXACT, True,
        )  # fmt: skip
    if not OUTPUT:
        store(final_ptr, row * C + c, rounded_sum(h, low), in_c)
        store(final_ptr, (tl.num_programs(0) + row) * C + c, rounded_sum(product, product_low), in_c)
    elif edge_ptr is None:
        if end == T:
            store(final_ptr, b * C + c, rounded_sum(h, low), in_c)


def linear_scan_fwd(
    a: Tensor,
    x: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    log: bool,
    reverse: bool,
    edges: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the forward pass: h ``[B, T, C]`` and the final state ``[N, C]``.

    ``edges`` is what :func:`packed_edges` makes of ``cu_seqlens``, where it is known.
    """
    B, T, C = x.shape[:3]
    dtype, state_dtype = scan_dtypes(a, x)
    launch = launch or scan_launch_for(x)
    chunks = -(-T // launch.chunk)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h, final = torch.empty_like(x, dtype=dtype), x.new_empty(N, C, dtype=state_dtype)
    if cu_seqlens is not None and edges is None:
        edges = packed_edges(cu_seqlens, T, reverse)
    grid = (B * chunks, -(-C // launch.block_c))
    numbers = (T, launch.chunk)
    kind = row_constants(launch, C, h.dtype, a.is_complex(), a.dim() == 1, log, reverse, edges is not None)
    a_in, x_in, entry, h_out, final_out = as_parts(a, x, initial, h, final)

    carry = None
    if chunks > 1:
        summary, carry = summaries(B * chunks, C, final)
        start(_linear_scan_fwd_kernel, grid, (a_in, x_in, entry, None, edges, None, summary), numbers, kind)
        run_carry(entry, summary, edges, carry, B, T, launch, C, kind["PARTS"], backward=False)
    start(_linear_scan_fwd_kernel, grid, (a_in, x_in, entry, carry, edges, h_out, final_out), numbers, kind)
    if cu_seqlens is not None and edges is not None:
        fill_idle_rows(cu_seqlens, edges, initial, final, reverse)
    return h, final


@lru_cache
def row_constants(
    launch: Launch,
    C: int,
    dtype: torch.dtype,
    is_complex: bool,
    fixed: bool,
    log: bool,
    reverse: bool,
    packed: bool,
    state_dtype: torch.dtype | None = None,
) -> Constants:
    """Return what a pass is compiled for; ``dtype`` is that of h, and ``state_dtype`` None in the forward pass.

    The backward kernel, some of whose states may be absent, is told their dtype.
    """
    parts, exact = 2 if is_complex else 1, dtype.itemsize >= 4
    itemsize = 8 if dtype in (torch.float64, torch.complex128) else 4
    backward = state_dtype is not None
    accumulator = {}
    if state_dtype is not None:
        accumulator["ACC"] = tl.float64 if state_dtype.to_real() == torch.float64 else tl.float32
    return constants(
        STEP=-C if reverse else C,
        PARTS=parts,
        EXACT=exact,
        FIXED=fixed,
        LOG=log,
        ROWS=scan_rows(itemsize, parts, exact, packed, backward),
        STAGES=launch.stages,
        **accumulator,
        **launch.options(C),
    )


def as_parts(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return what the kernels take complex tensors as."""
    return [torch.view_as_real(t) if t is not None and t.is_complex() else t for t in tensors]


def summaries(chunks: int, C: int, like: Tensor) -> list[Tensor | None]:
    """Return memory for what comes out of every chunk and what goes into it."""
    return as_parts(like.new_empty(2, chunks, C), like.new_empty(chunks, C))
