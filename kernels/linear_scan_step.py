"""One token of the linear recurrence on a GPU, for sequences that are generated: h_t = a_t h_{t-1} + x_t."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import exp_sum, filled, load, plus_sum, rounded_sum, store, times_sum
from fastwkv.kernels.config import FP_FUSION
from fastwkv.kernels.held import Constants, constants, start

BLOCK = 128  # channels a program of four warps: a step is so short that only its latency counts


@triton.jit(do_not_specialize=["size"])
def _linear_scan_step_kernel(
    a_ptr,  # [C] or [B, C]
    x_ptr,  # [B, C], or [B, C, 2] beside a complex state
    state_ptr,  # [B, C]
    h_ptr,  # [B, C]
    size,  # B * C
    C: tl.constexpr,
    PARTS: tl.constexpr,  # 2 for complex numbers, else 1
    FIXED: tl.constexpr,  # a is [C]
    LOG: tl.constexpr,  # a_ptr has log a
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    zero = tl.zeros([BLOCK], state_ptr.dtype.element_ty)
    like = (zero, zero) if PARTS == 2 else (zero,)
    a = load(a_ptr, i % C if FIXED else i, inside, like)
    state = load(state_ptr, i, inside, like)
    if LOG:
        high, low = exp_sum(a[0])
        h, h_low = times_sum((high,), (low,), state, filled(0.0, like), True)
    else:
        h, h_low = times_sum(a, None, state, filled(0.0, like), True)
    h, h_low = plus_sum(h, h_low, load(x_ptr, i, inside, like), True)
    h = rounded_sum(h, h_low)
    store(h_ptr, i, h, inside)


def linear_scan_step(a: Tensor, x: Tensor, state: Tensor, log: bool) -> Tensor:
    """Run one token: the state after it, ``[B, C]``."""
    h = torch.empty_like(state)
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in (a, x, state, h)]
    size = state.numel()
    constants = _constants(state.shape[1], state.is_complex(), a.dim() == 1, log)
    start(_linear_scan_step_kernel, (-(-size // BLOCK),), parts, (size,), constants)
    return h


@lru_cache
def _constants(C: int, is_complex: bool, fixed: bool, log: bool) -> Constants:
    parts = 2 if is_complex else 1
    return constants(C=C, PARTS=parts, FIXED=fixed, LOG=log, BLOCK=BLOCK, enable_fp_fusion=FP_FUSION)
