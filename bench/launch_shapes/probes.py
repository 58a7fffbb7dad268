"""Kernels that measure what the model of a GPU assumes: a chain of loads with two clocks beside it, and nothing."""

import triton
import triton.language as tl

from fastwkv.kernels.arithmetic import INTERPRETED


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
