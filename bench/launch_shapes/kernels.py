"""Kernels that measure a device: access patterns without arithmetic, a chain of loads beside two clocks, nothing.

The patterns are those of the operators, and so the ceiling of each shape of program.
"""

import triton
import triton.language as tl

from fastwkv.kernels.arithmetic import INTERPRETED


@triton.jit(do_not_specialize=["T", "chunk"])
def forward_pattern(
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    y_ptr,  # [B, T, C]; None: a summary is wanted
    final_ptr,  # [B * chunks, C]
    T,
    chunk,  # tokens a program, a multiple of ROWS
    C: tl.constexpr,  # a multiple of BLOCK_C
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Read two streams and write their sum; as a summary write the sum over each chunk alone."""
    chunks = T // chunk
    row = tl.program_id(0).to(tl.int64)  # of B * chunks
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tl.arange(0, ROWS)[:, None] * C + c[None, :]
    start = (row // chunks * T + row % chunks * chunk) * C
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for _ in tl.range(0, chunk, ROWS, num_stages=STAGES):
        both = tl.load(k_ptr + start + tile).to(tl.float32) + tl.load(v_ptr + start + tile).to(tl.float32)
        if y_ptr is None:
            total += both
        else:
            tl.store(y_ptr + start + tile, both.to(y_ptr.dtype.element_ty))
        start += ROWS * C
    if y_ptr is None:
        tl.store(final_ptr + row * C + c, tl.sum(total, 0))


@triton.jit(do_not_specialize=["T"])
def backward_pattern(
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    gy_ptr,  # [B, T, C]
    checkpoint_ptr,  # [B, 3 * T / ROWS, C]
    gk_ptr,  # [B, T, C]
    gv_ptr,  # [B, T, C]
    T,  # a multiple of ROWS
    C: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Read three streams from the last token to the first, and three numbers a tile; write two streams."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tl.arange(0, ROWS)[:, None] * C + c[None, :]
    start = (b + 1) * T * C
    checkpoint_ptr += (b + 1) * (T // ROWS) * 3 * C + c
    for _ in tl.range(0, T, ROWS, num_stages=STAGES):
        start -= ROWS * C
        checkpoint_ptr -= 3 * C
        state = tl.load(checkpoint_ptr) + tl.load(checkpoint_ptr + C) + tl.load(checkpoint_ptr + 2 * C)
        both = tl.load(k_ptr + start + tile).to(tl.float32) + tl.load(v_ptr + start + tile).to(tl.float32)
        gy = tl.load(gy_ptr + start + tile).to(tl.float32)
        tl.store(gk_ptr + start + tile, (both + state[None, :]).to(gk_ptr.dtype.element_ty))
        tl.store(gv_ptr + start + tile, (both * gy).to(gv_ptr.dtype.element_ty))


@triton.jit
def _counter(NAME: tl.constexpr):
    """Return a counter of the GPU: clocks of this multiprocessor, or nanoseconds. An interpreter has none: 0."""
    if INTERPRETED:
        return tl.full([], 0, tl.int64)
    elif NAME == "clock":  # noqa: RET505  Triton knows no return after an if that has returned
        return tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    else:
        return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["first", "steps"])
def chase_kernel(
    next_ptr,  # int32, at every index where the chain comes by the next one
    end_ptr,  # int32 [1], written: where it ends
    counter_ptr,  # int64 [2], written: clocks and nanoseconds
    first,
    steps,
):
    """Follow a chain of loads, each of which has to be answered before the next can be asked for."""
    clocks = _counter("clock")
    nanoseconds = _counter("nanoseconds")
    at = first
    for _ in range(steps):
        at = tl.load(next_ptr + at)
    tl.store(end_ptr, at)
    tl.store(counter_ptr, _counter("clock") - clocks)
    tl.store(counter_ptr + 1, _counter("nanoseconds") - nanoseconds)


@triton.jit
def empty_kernel(ptr):
    """Do nothing."""
