"""The linear scan between chunks: a scan over their summaries, in either direction. See linear_scan.py."""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import filled, load, plus_sum, rounded_sum, store, times_state
from fastwkv.kernels.config import CARRY_GROUP, Launch
from fastwkv.kernels.held import Constants, constants, start


@triton.jit(do_not_specialize=["T", "chunk"])
def _linear_scan_carry_kernel(
    entry_ptr,  # [N, C], the state that enters the first chunk of every batch row; None: zero
    summary_ptr,  # [2, B * chunks, C]
    edge_ptr,  # int32 [T], or None
    carry_ptr,  # [B * chunks, C], written: the state that enters every chunk
    T,
    chunk,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    BACKWARD: tl.constexpr,  # from the last chunk to the first
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = carry_ptr.dtype.element_ty
    chunks = tl.cdiv(T, chunk)
    batch = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    zero = tl.zeros([BLOCK_C], ACC)
    h = (zero, zero) if PARTS == 2 else (zero,)
    low = h
    if (entry_ptr is not None) and (edge_ptr is None):
        h = load(entry_ptr, batch * C + c, in_c, h)
    for first in range(0, chunks, GROUP):
        states = ()
        products = ()
        for j in tl.static_range(GROUP):  # all are asked for before the first is waited for
            chunk_id = batch * chunks + (chunks - 1 - first - j if BACKWARD else first + j)
            inside = in_c & (tl.zeros_like(c) + first + j < chunks)
            states = states + (load(summary_ptr, chunk_id * C + c, inside, h),)
            second = chunk_id + tl.num_programs(0).to(tl.int64) * chunks
            products = products + (load(summary_ptr, second * C + c, inside, h),)
        for j in tl.static_range(GROUP):
            if first + j < chunks:
                i = chunks - 1 - first - j if BACKWARD else first + j
                store(carry_ptr, (batch * chunks + i) * C + c, rounded_sum(h, low), in_c)
                if edge_ptr is not None:  # a chunk in which a sequence starts (backward: ends) carries nothing over
                    first_edge = tl.load(edge_ptr + i * chunk)
                    last_edge = tl.load(edge_ptr + tl.minimum((i + 1) * chunk, T) - 1)
                    resets = ((last_edge & 2) if BACKWARD else (first_edge & 1)) != 0
                    if resets | ((first_edge >> 2) != (last_edge >> 2)):
                        low = filled(0.0, h)
                        h = filled(0.0, h)
                h, low = times_state(products[j], h, low)
                h, low = plus_sum(h, low, states[j], True)


def run_carry(
    entry: Tensor | None,
    summary: Tensor | None,
    edges: Tensor | None,
    carry: Tensor | None,
    B: int,
    T: int,
    launch: Launch,
    C: int,
    parts: int,
    backward: bool,
) -> None:
    """Scan the summaries of the chunks."""
    grid = (B, -(-C // launch.block_c))
    tensors, numbers = (entry, summary, edges, carry), (T, launch.chunk)
    start(_linear_scan_carry_kernel, grid, tensors, numbers, _constants(launch, C, parts, backward))


@lru_cache
def _constants(launch: Launch, C: int, parts: int, backward: bool) -> Constants:
    return constants(PARTS=parts, BACKWARD=backward, GROUP=CARRY_GROUP, **launch.constants(C))
