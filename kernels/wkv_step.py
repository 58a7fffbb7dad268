"""One token of WKV on a GPU, for sequences that are generated.

The formulas are those of wkv.py, but the state that comes back must hold p - w in one float32, token after token. At
|p| = 60 the rounding of p loses 2e-6 a step, which adds up to 1e-3 in 8192 tokens of a small w. To fold what it cuts
off into num and den is no cure: they are rounded in turn, always in the same direction, which adds up to 1e-5. So the
state is kept at a scale near e^0, where float32 resolves p to 1e-10: any scale will do, since only num e^p and den e^p
mean anything. A token heavier than the past is added to it with a weight e^{k - p} up to e^64, and num and den change
only by what the tokens bring.

A state is moved to that scale by a factor e^p, which is rounded, and the same error at every token would add up. So the
difference between e^p and the factor stays in p, which has the digits for it.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels import notation
from fastwkv.kernels.arithmetic import EXP_LEAST, LOG2_E, exp_sum, negated, reduced, two_sum
from fastwkv.kernels.config import FP_FUSION
from fastwkv.kernels.held import Constants, constants, start
from fastwkv.kernels.wkv_state import NO_PAST, at_least_tiny, load_rate, raised, weightless

BLOCK = 128  # channels a program of four warps: a step is so short that only its latency counts
REACH = tl.constexpr(notation.REACH)
FINE = tl.constexpr(notation.FINE)
MODERATE = tl.constexpr(notation.MODERATE)
LARGEST = tl.constexpr(notation.LARGEST)
SMALLEST = tl.constexpr(notation.SMALLEST)


@triton.jit
def wait_for_reads():
    """Let no lane of the program write before all have read. It belongs before a store over what was loaded.

    Where a program has more lanes than elements, or a load is laid out over the lanes in another way than a store, an
    element is read by other lanes than the one that writes it, and nothing else makes that one wait. The layouts follow
    from sizes, dtypes, alignments and Triton's version; a barrier depends on none of them.
    """
    tl.debug_barrier()


@triton.jit
def _exp(x):
    """Return e^x of an x up to 64. A GPU's own exponential rounds x log2 e, and at 60 is 2e-6 off."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        n, r = reduced(x)
        return tl.where(x < EXP_LEAST, 0.0, tl.exp2(n) * tl.exp2(r * LOG2_E))


@triton.jit
def _absorb(num, den, d, d_low, v):
    """Return the sums after a token, and whether the past keeps its scale.

    The exponent of the past is larger than that of the token by d + d_low. A token heavier than the past has a weight
    up to e^64 where the past keeps its scale.
    """
    near = (d >= 0) | ((d >= -REACH) & (tl.abs(v) < MODERATE))
    d = tl.where(near, negated(d), d)
    e = _exp(d)
    d_low = tl.where(tl.abs(d_low) < 1, d_low, 0.0)  # NaN where infinities met
    e = tl.fma(e, tl.where(near, negated(d_low), d_low), e)
    past = tl.where(near, 1.0, e)
    now = tl.where(near, e, 1.0)
    return tl.fma(past, num, now * v), tl.fma(past, den, now), near


@triton.jit(do_not_specialize=["size"])
def _wkv_step_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, C]
    v_ptr,  # [B, C]
    num_ptr,  # [B, C]
    den_ptr,  # [B, C]
    max_ptr,  # [B, C]
    r_ptr,  # [B, C], or None: y is multiplied by σ(r)
    y_ptr,  # [B, C]
    num_out_ptr,  # [B, C], may be where num is, and so may be the other two
    den_out_ptr,  # [B, C]
    max_out_ptr,  # [B, C]
    size,  # B * C
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = num_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    c = i % C
    w = load_rate(w_ptr, c, inside, ACC)
    u = tl.load(u_ptr + c, mask=inside, other=0.0).to(ACC)
    k = tl.load(k_ptr + i, mask=inside, other=0.0).to(ACC)
    v = tl.load(v_ptr + i, mask=inside, other=0.0).to(ACC)
    num = tl.load(num_ptr + i, mask=inside, other=0.0)
    den = tl.load(den_ptr + i, mask=inside, other=0.0)
    p = tl.load(max_ptr + i, mask=inside, other=0.0)
    num, den, p = raised(*weightless(num, den, p))
    p = tl.where((num == 0) & (den == 0), NO_PAST, p)  # an empty state has no weight, whatever its exponent

    gap, gap_low = two_sum(p, negated(k))
    d, d_low = two_sum(gap, negated(u))
    y_num, y_den, _ = _absorb(num, den, d, gap_low + d_low, v)
    y = y_num / at_least_tiny(y_den, False)
    if r_ptr is not None:
        y /= 1 + tl.exp(negated(tl.load(r_ptr + i, mask=inside, other=0.0).to(ACC)))
    tl.store(y_ptr + i, y, mask=inside)

    d, d_low = two_sum(gap, negated(w))
    num, den, near = _absorb(num, den, d, gap_low + d_low, v)
    aged, error = two_sum(p, negated(w))
    p = tl.where(near, aged, k)
    error = tl.where(near & (tl.abs(error) < 1), error, 0.0)

    coarse = tl.abs(p) > FINE
    shift = tl.where(coarse & (tl.abs(p) < REACH), p, 0.0)
    factor, low = exp_sum(shift)
    moves = (den * factor < LARGEST) & (den * factor > SMALLEST) & (tl.abs(num * factor) < LARGEST) & (shift != 0)
    factor = tl.where(moves, factor, tl.where(coarse, tl.exp(error), 1.0))
    p = tl.where(moves, low / factor + error, p)
    p = tl.where(den == den, p, 0.0)  # after a NaN it may be anything, and -inf would be an empty state
    gone = p <= 0.9 * NO_PAST
    wait_for_reads()
    tl.store(num_out_ptr + i, tl.where(gone, 0.0, num * factor), mask=inside)
    tl.store(den_out_ptr + i, tl.where(gone, 0.0, den * factor), mask=inside)
    tl.store(max_out_ptr + i, tl.where(gone, -float("inf"), p), mask=inside)


def wkv_step(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, num: Tensor, den: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Run one token: y ``[B, C]`` and the packed state ``[3, B, C]``."""
    y = torch.empty_like(v)
    state = num.new_empty(3, *num.shape)
    run_step(w, u, k, v, None, (num, den, scale), y, state.unbind())
    return y, state


def run_step(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None,
    state: tuple[Tensor, ...],
    y: Tensor,
    out: tuple[Tensor, ...],
) -> None:
    """Start the kernel. Each field of ``out`` is that of the state, or memory of its own."""
    size = k.numel()
    tensors = (w.contiguous(), u.contiguous(), k, v, *state, r, y, *out)
    start(_wkv_step_kernel, (-(-size // BLOCK),), tensors, (size,), _constants(k.shape[1]))


@lru_cache
def _constants(C: int) -> Constants:
    return constants(C=C, BLOCK=BLOCK, enable_fp_fusion=FP_FUSION)
