"""The states that sequences of WKV start from on a GPU, made such that no token is lost beside them.

A state is num e^p and den e^p. Its owner chooses p, and the kernels weigh the first tokens against it with exponentials
that are 0 beyond e^-87. Two kinds of states would be taken for more than they are:

- An empty state, num = den = 0, with any p: a learnable state that begins as zeros, say. It weighs nothing, yet num and
  den have gradients, in proportion to e^p. Its exponent is lowered to that of the first token that is present, and the
  gradients make up for its lift, the amount that it is lowered by.
- A state with a very small den. It gets 2^64 times as much of num and den (float64: 2^512), and an exponent to match.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels import notation
from fastwkv.kernels.config import FP_FUSION
from fastwkv.kernels.held import Constants, constants, start
from fastwkv.kernels.wkv_state import load_rate, raised

BLOCK = 128  # channels a program of four warps
NEAR = tl.constexpr(notation.NEAR)


@triton.jit
def _is_waiting(empty, key):
    """Return whether any channel still looks for its first token."""
    return tl.max((empty & (key == -float("inf"))).to(tl.int32), 0) > 0


@triton.jit(do_not_specialize=["T"])
def _wkv_entry_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, T, C]
    initial_ptr,  # [3, N, C]
    cu_seqlens_ptr,  # [N + 1], or None: N = B
    entry_ptr,  # [4, N, C], written: num, den, p, and the lift
    T,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = entry_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_c = c < C
    field = tl.num_programs(0).to(tl.int64) * C
    at = n * C + c
    w = load_rate(w_ptr, c, in_c, ACC)
    u = tl.load(u_ptr + c, mask=in_c, other=0.0).to(ACC)
    num = tl.load(initial_ptr + at, mask=in_c, other=1.0)
    den = tl.load(initial_ptr + field + at, mask=in_c, other=1.0)
    p = tl.load(initial_ptr + 2 * field + at, mask=in_c, other=0.0)

    if cu_seqlens_ptr is None:
        t = n * T
        end = t + T
    else:  # whatever the offsets are, nothing but keys is read
        t = tl.maximum(tl.load(cu_seqlens_ptr + n).to(tl.int64), 0)
        end = tl.minimum(tl.load(cu_seqlens_ptr + n + 1).to(tl.int64), T)
    empty = (num == 0) & (den == 0) & (p > -float("inf"))
    key = tl.full([BLOCK], -float("inf"), ACC)
    decay = tl.zeros([BLOCK], ACC)
    first = t
    while (t < end) & _is_waiting(empty, key):
        k = tl.load(k_ptr + t * C + c, mask=in_c, other=0.0).to(ACC)
        decay = tl.where(key == -float("inf"), (t - first).to(ACC) * w, decay)
        key = tl.where(key == -float("inf"), k, key)
        t += 1
    level = key + decay + tl.minimum(u, w)
    lift = p - level
    heavy = empty & (lift > NEAR) & (key > -float("inf"))
    num, den, p = raised(num, den, tl.where(heavy, level, p))
    tl.store(entry_ptr + at, num, mask=in_c)
    tl.store(entry_ptr + field + at, den, mask=in_c)
    tl.store(entry_ptr + 2 * field + at, p, mask=in_c)
    tl.store(entry_ptr + 3 * field + at, tl.where(heavy, lift, 0.0), mask=in_c)


def entry_states(w: Tensor, u: Tensor, k: Tensor, initial: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the states ``[3, N, C]`` with exponents that leave room for the first tokens, and their lifts below."""
    _, N, C = initial.shape
    entry = initial.new_empty(4, N, C)
    tensors = (w, u, k, initial.contiguous(), None if cu_seqlens is None else cu_seqlens.contiguous(), entry)
    start(_wkv_entry_kernel, (N, -(-C // BLOCK)), tensors, (k.shape[1],), _constants(C))
    return entry


@lru_cache
def _constants(C: int) -> Constants:
    return constants(C=C, BLOCK=BLOCK, enable_fp_fusion=FP_FUSION)
