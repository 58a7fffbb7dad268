"""WKV between chunks: scans over their summaries, forward and backward. wkv.py holds the mathematics."""

from functools import lru_cache

import triton
import triton.language as tl

from fastwkv.kernels.arithmetic import negated
from fastwkv.kernels.config import CARRY_GROUP, Launch
from fastwkv.kernels.held import Constants, constants
from fastwkv.kernels.packing import is_end, is_start
from fastwkv.kernels.wkv_state import absorb, empty_state, load_adjoint, load_rate, load_state, load_sums, store_state


@triton.jit(do_not_specialize=["N", "T", "chunk"])
def _wkv_carry_kernel(
    w_ptr,  # [C]
    initial_ptr,  # [4, N, C] (wkv_entry.py), or None
    summary_ptr,  # [3, B * chunks, C]
    edge_ptr,  # int32 [T], or None
    carry_ptr,  # [3, B * chunks, C], written: the state before every chunk
    N,
    T,
    chunk,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = carry_ptr.dtype.element_ty
    chunks = tl.cdiv(T, chunk)
    batch = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    field = tl.num_programs(0).to(tl.int64) * chunks * C

    w = load_rate(w_ptr, c, in_c, ACC)
    state = empty_state(w)
    if (initial_ptr is not None) and (edge_ptr is None):
        state = load_state(initial_ptr + batch * C + c, N.to(tl.int64) * C, in_c)
    for first in range(0, chunks, GROUP):
        summaries = ()
        for j in tl.static_range(GROUP):  # all are asked for before the first is waited for
            at = summary_ptr + (batch * chunks + first + j) * C + c
            summaries = summaries + (load_sums(at, field, in_c & (tl.zeros_like(c) + first + j < chunks)),)
        for j in tl.static_range(GROUP):
            i = first + j
            inside = in_c & (tl.zeros_like(c) + i < chunks)
            store_state(carry_ptr + (batch * chunks + i) * C + c, field, state, w, inside)
            num_new, den_new, p_new = summaries[j]
            gap = tl.fma(negated(state[3]), w, state[2] - p_new)
            state = absorb(state, gap, w, summaries[j], chunk.to(ACC))
            if edge_ptr is not None:  # a chunk in which a sequence starts carries nothing over
                first_edge = tl.load(edge_ptr + tl.minimum(i * chunk, T - 1))
                last_edge = tl.load(edge_ptr + tl.minimum((i + 1) * chunk, T) - 1)
                starts = is_start(first_edge) | ((first_edge >> 2) != (last_edge >> 2))
                num, den, anchor, age = state
                num = tl.where(starts, num_new, num)
                den = tl.where(starts, den_new, den)
                anchor = tl.where(starts, p_new, anchor)
                state = (num, den, anchor, tl.where(starts, 0.0, age))


@triton.jit(do_not_specialize=["N", "T", "chunk"])
def _wkv_bwd_carry_kernel(
    gfinal_ptr,  # [2, N, C], or None
    summary_ptr,  # [4, B * chunks, C]: cm, cl, kept, mixed
    edge_ptr,  # int32 [T], or None
    carry_ptr,  # [2, B * chunks, C], written: (gm, gl) after every chunk
    N,
    T,
    chunk,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = carry_ptr.dtype.element_ty
    chunks = tl.cdiv(T, chunk)
    batch = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    field = tl.num_programs(0).to(tl.int64) * chunks * C

    gm = tl.zeros([BLOCK_C], ACC)
    gl = gm
    if gfinal_ptr is not None:
        # In a packed batch the last chunk ends a sequence and takes nothing from here, whatever is read.
        gm, gl = load_adjoint(gfinal_ptr, N.to(tl.int64) * C, batch * C, c, in_c)
    for last in range(chunks - 1, -1, -GROUP):
        summaries = ()
        for j in tl.static_range(GROUP):  # all are asked for before the first is waited for
            at = summary_ptr + (batch * chunks + last - j) * C + c
            inside = in_c & (tl.zeros_like(c) + last >= j)
            cm = tl.load(at, mask=inside, other=0.0)
            cl = tl.load(at + field, mask=inside, other=0.0)
            kept = tl.load(at + 2 * field, mask=inside, other=0.0)
            mixed = tl.load(at + 3 * field, mask=inside, other=0.0)
            summaries = summaries + ((cm, cl, kept, mixed),)
        for j in tl.static_range(GROUP):
            at = carry_ptr + (batch * chunks + last - j) * C + c
            inside = in_c & (tl.zeros_like(c) + last >= j)
            tl.store(at, gm, mask=inside)
            tl.store(at + field, gl, mask=inside)
            cm, cl, kept, mixed = summaries[j]
            gl = tl.fma(kept, gl, tl.fma(mixed, gm, cl))
            gm = tl.fma(kept, gm, cm)
            if edge_ptr is not None:  # a chunk in which a sequence ends carries nothing over, not even a NaN
                i = tl.maximum(last - j, 0)
                first_edge = tl.load(edge_ptr + i * chunk)
                last_edge = tl.load(edge_ptr + tl.minimum((i + 1) * chunk, T) - 1)
                ends = is_end(last_edge) | ((first_edge >> 2) != (last_edge >> 2))
                gl = tl.where(ends, cl, gl)
                gm = tl.where(ends, cm, gm)


@lru_cache
def carry_constants(launch: Launch, C: int) -> Constants:
    """Return what the kernels between chunks are compiled for."""
    return constants(GROUP=CARRY_GROUP, **launch.constants(C))
