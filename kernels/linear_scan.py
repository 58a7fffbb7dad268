"""The diagonal linear recurrence: the mathematics for every device; here the forward pass on a GPU.

notation.py explains the words.

Forward. Per channel, real or complex, h_t = a_t h_{t-1} + x_t. Time here is the order of the scan; in memory it runs
backwards where the scan does (STEP = -C).

Adjoint. Let q_t be the gradient of h_t that comes from later tokens; for the last token it is the gradient of the final
state. With that from its own output the whole gradient of h_t is g_t = gh_t + q_t. The derivative of h_t is 1 by x_t,
h_{t-1} by a_t and a_t by h_{t-1}, and the gradient of a complex number takes conjugates of derivatives. So, from the
last token to the first,

    g_t = gh_t + q_t        gx_t = g_t        ga_t = g_t conj(h_{t-1})        q_{t-1} = conj(a_t) g_t

and q before the first token is the gradient of the initial state. If a is the same at every token, ga is summed over
tokens and batch in a fixed order. If log a is given, a = e^{log a} is computed on chip, is real, and the gradient of
log a is ga a. The forward pass keeps nothing for this one: it reads h again, and x not at all.

Exactness. At |a| = 1 nothing is forgotten, rounding errors least of all. Where numbers of 32 bits or more come in or
go out, the state is an unevaluated sum h + low: the rounding error of a product is known from one fused multiply-add,
that of a sum from six additions. So every h_t is the exact result rounded about once, whatever T is; that costs
arithmetic where bandwidth is the limit. A gate e^{log a} is such a sum too: near 1 its own rounding would count at
every token, and at log a = -1e-4 a gate of one float32 makes h wrong by 5e-5 after 8192 tokens. 16-bit results need
none of this.

Chunks. Both passes are affine along time. A sequence is one chunk where batch and channels fill the device. Else every
chunk is first summarised by the same kernel without its outputs: what it makes of a zero state, and the product of its
gates. Then the summaries are scanned in order (linear_scan_carry.py), and every chunk is finished from its true state.
With packed sequences the state is replaced wherever one starts; the grid stays the same.

Tiles. A program is one warp, a lane one channel. Tiles of 8 or 16 tokens are read ahead, 16 bytes a lane, and handed
over through shared memory: the state's chain of dependent operations never waits for memory. A complex number is two
parts in memory, of 16 bits each where x is given as pairs, and two registers.

Source: arXiv 2303.06349, section 3.2; the adjoint is derived here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import filled, load, plus_sum, rounded_sum, store, times_sum
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
from fastwkv.kernels.linear_scan_step import linear_scan_step
from fastwkv.kernels.packing import fill_idle_rows, packed_edges
from fastwkv.kernels.tiles import block_channels, chunk_span, numbers_of, tile_of_numbers, tile_offsets

__all__ = ["linear_scan_fwd", "linear_scan_step"]


@triton.jit
def _forward_rows(
    numbers, state, initial_ptr, final_ptr, edge_ptr, h_ptr, out, place, channels,
    C: tl.constexpr, FIXED: tl.constexpr, LOG: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Run the rows of a tile; with MASKED only the tokens before the chunk's end. Return the state after them.

    ``numbers`` are gates and x of the rows, ``place`` the first token, the chunk's end and the edges, ``out`` where h
    goes. h is stored here, where it is wanted: Triton 3.3 lets no function return tuples of tuples of numbers.
    """
    gates, xs = numbers
    h, low, product, product_low = state
    t, end, edges = place
    ROWS: tl.constexpr = len(xs)
    hs = ()
    for i in tl.static_range(ROWS):
        if (not MASKED) or (end > t + i):
            if edge_ptr is not None:
                if ((edges >> (2 * i)) & 1) != 0:
                    low = filled(0.0, h)
                    h = load_of_sequence(initial_ptr, edge_ptr + t + i, C, channels, h)
            a = gates if FIXED else gate_of(gates[i], LOG, EXACT)
            a_low = a[1] if LOG and EXACT else None
            h, low = times_sum(a[0], a_low, h, low, EXACT)
            h, low = plus_sum(h, low, xs[i], EXACT)
            if h_ptr is None:
                product, product_low = times_sum(a[0], a_low, product, product_low, EXACT)
            elif edge_ptr is not None:
                if ((edges >> (2 * i + 1)) & 1) != 0:
                    store_of_sequence(final_ptr, edge_ptr + t + i, C, channels, rounded_sum(h, low))
        if h_ptr is not None:
            hs = hs + (rounded_sum(h, low) if EXACT else h,)
    if h_ptr is not None:
        at, inside = out
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
    final_ptr,  # [N, C], after every sequence; None: a summary is wanted
    summary_ptr,  # [2, B * chunks, C], state after each chunk from zero and product of its gates; None: h is wanted
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
    SUMMARY: tl.constexpr = summary_ptr is not None
    ACC: tl.constexpr = summary_ptr.dtype.element_ty if SUMMARY else final_ptr.dtype.element_ty
    chunk_id, batch, begin, end = chunk_span(T, chunk)
    if SUMMARY:  # nothing comes after the last chunk
        end = tl.where(end == T, begin, end)
    c, in_c = block_channels(C, BLOCK_C)

    part = tl.zeros([BLOCK_C], ACC)
    zero = (part, part) if PARTS == 2 else (part,)
    h = zero
    gate = gate_of(load(a_ptr, c, in_c, h), LOG, EXACT) if FIXED else None
    if carry_ptr is not None:
        h = load(carry_ptr, chunk_id * C + c, in_c, h)
    elif (initial_ptr is not None) and ((edge_ptr is None) and (not SUMMARY)):
        h = load(initial_ptr, batch * C + c, in_c, h)
    state = (h, zero, filled(1.0, h), zero)

    rows = tl.arange(0, ROWS)
    tile, in_tile = tile_offsets(rows, tl.program_id(1), BLOCK_C, C, STEP, PARTS)
    offset = (batch * T + (begin if STEP > 0 else T - 1 - begin)) * (C * PARTS)
    full = begin + (end - begin) // ROWS * ROWS
    for t in tl.range(begin, full, ROWS, num_stages=STAGES):
        xs = numbers_of(tl.load(x_ptr + offset + tile, mask=in_tile), ROWS, h)
        gates = gate if FIXED else numbers_of(tl.load(a_ptr + offset + tile, mask=in_tile), ROWS, h)
        edges = edges_of(edge_ptr + t, rows, rows < ROWS) if edge_ptr is not None else 0
        state = _forward_rows(
            (gates, xs), state, initial_ptr, final_ptr, edge_ptr, h_ptr, (offset + tile, in_tile), (t, end, edges),
            (c, in_c), C, FIXED, LOG, EXACT, False,
        )  # fmt: skip
        offset += ROWS * STEP * PARTS
    if full < end:
        run = in_tile & (full + rows < end)[:, None]
        xs = numbers_of(tl.load(x_ptr + offset + tile, mask=run, other=0.0), ROWS, h)
        gates = gate if FIXED else numbers_of(tl.load(a_ptr + offset + tile, mask=run, other=0.0), ROWS, h)
        edges = edges_of(edge_ptr + full, rows, full + rows < end) if edge_ptr is not None else 0
        state = _forward_rows(
            (gates, xs), state, initial_ptr, final_ptr, edge_ptr, h_ptr, (offset + tile, run), (full, end, edges),
            (c, in_c), C, FIXED, LOG, EXACT, True,
        )  # fmt: skip
    if SUMMARY:
        store(summary_ptr, chunk_id * C + c, rounded_sum(state[0], state[1]), in_c)
        store(summary_ptr, (tl.num_programs(0) + chunk_id) * C + c, rounded_sum(state[2], state[3]), in_c)
    elif edge_ptr is None:
        if end == T:
            store(final_ptr, batch * C + c, rounded_sum(state[0], state[1]), in_c)


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
    constants = row_constants(launch, C, h.dtype, a.is_complex(), a.dim() == 1, log, reverse, edges is not None)
    a_in, x_in, entry, h_out, final_out = as_parts(a, x, initial, h, final)

    carry = None
    if chunks > 1:
        summary, carry = summaries(B * chunks, C, final)
        inputs = (a_in, x_in, entry, None, edges)
        start(_linear_scan_fwd_kernel, grid, (*inputs, None, None, summary), numbers, constants)
        run_carry(entry, summary, edges, carry, B, T, launch, C, constants["PARTS"], backward=False)
    tensors = (a_in, x_in, entry, carry, edges, h_out, final_out, None)
    start(_linear_scan_fwd_kernel, grid, tensors, numbers, constants)
    if cu_seqlens is not None and edges is not None:
        fill_idle_rows(cu_seqlens, edges, initial, final, reverse)
    return h, final
