"""What the WKV kernels share: constants, weights, and states in registers and in memory. See wkv.py."""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fastwkv.kernels.arithmetic import LOG2_E, negated, two_sum
from fastwkv.kernels.config import Launch, checkpoint_rows
from fastwkv.kernels.held import Constants, constants
from fastwkv.kernels.packing import has_row, is_end, is_start

NO_PAST = tl.constexpr(-3.4028234663852886e38)  # -FLT_MAX: an exponent below every finite key
MAX_RATE = tl.constexpr(1e29)  # beyond it the decay is total or unbounded anyway, and age * w must stay finite


@triton.jit
def load_rate(w_ptr, c, in_c, ACC: tl.constexpr):
    w = tl.load(w_ptr + c, mask=in_c, other=0.0).to(ACC)
    w = tl.where(w > MAX_RATE, MAX_RATE, w)  # not tl.minimum: a NaN must stay one
    return tl.where(w < -MAX_RATE, -MAX_RATE, w)


@triton.jit
def weigh(d):
    """Weights of the past and of the present, whose exponents differ by d, the larger being 1."""
    # Triton's exp2 is one instruction; its exp adds three that keep subnormal results, which nothing here would miss.
    e = tl.exp2(tl.abs(d) * -LOG2_E)
    return tl.where(d >= 0, 1.0, e), tl.where(d >= 0, e, 1.0)


@triton.jit
def tiny(x):
    """The smallest normal number: a sum of weights below it has lost its digits, and counts as none."""
    TINY: tl.constexpr = 2.2250738585072014e-308 if x.dtype == tl.float64 else 1.1754943508222875e-38
    return tl.full(x.shape, TINY, x.dtype)


@triton.jit
def at_least_tiny(den, SURE: tl.constexpr):
    """Return a weight to divide by, no less than the smallest. With SURE it is known to be none; a NaN stays one."""
    return den if SURE else tl.where(den <= tiny(den), tiny(den), den)


@triton.jit
def absorb(num, den, anchor, age, d, w, num_new, den_new, p_new, steps):
    """Let the state age by ``steps`` and add a term of exponent p_new, d = p - p_new being known."""
    d -= steps * w
    past, now = weigh(d)
    stays = d >= 0
    num = tl.fma(past, num, now * num_new)
    den = tl.fma(past, den, now * den_new)
    return num, den, tl.where(stays, anchor, p_new), tl.where(stays, age + steps, 0.0)


@triton.jit
def empty_state(like):
    """Return the state before the first token. Its weight is ``tiny`` so that no sum of weights is less."""
    zero = tl.zeros_like(like)
    return zero, tiny(like), tl.full(like.shape, NO_PAST, like.dtype), zero


@triton.jit
def weightless(num, den, p):
    """Make an empty state of one whose exponent is -inf, whatever its sums."""
    gone = p == -float("inf")
    return tl.where(gone, 0.0, num), tl.where(gone, tiny(den), den), tl.where(gone, NO_PAST, p)


@triton.jit
def raised(num, den, p):
    """Give a state whose sums are very small larger ones, and an exponent to match: den > 0 is 2^-62 at least."""
    SMALL: tl.constexpr = 2.0**-512 if den.dtype == tl.float64 else 2.0**-64
    LN_SMALL: tl.constexpr = 354.89135644669199 if den.dtype == tl.float64 else 44.361419555836499
    small = (den > 0) & (den < SMALL)
    lower, error = two_sum(p, tl.full(p.shape, -LN_SMALL, p.dtype))
    factor = tl.where(tl.abs(error) < 1, tl.exp(error), 1.0) * (1 / SMALL)  # error is NaN where p is infinite
    return tl.where(small, num * factor, num), tl.where(small, den * factor, den), tl.where(small, lower, p)


@triton.jit
def lifted(g, ptr, mask):
    """Return the gradient of a sum of a state that was given, from that of its entry state, whose lift is here."""
    return tl.where(g == 0, g, g * tl.exp(tl.load(ptr, mask=mask, other=0.0)))


@triton.jit
def load_state(ptr, field, mask):
    num = tl.load(ptr, mask=mask, other=0.0)
    den = tl.load(ptr + field, mask=mask, other=0.0)
    p = tl.load(ptr + 2 * field, mask=mask, other=0.0)
    return weightless(num, den, p)


@triton.jit
def run_end(edge_ptr, rows, first, last):
    """Return where the sequence of token ``first`` ends among the tokens up to ``last``."""
    edges = tl.load(edge_ptr + rows, mask=(rows > first) & (rows < last), other=0)
    return tl.min(tl.where(is_start(edges), rows, last), 0)


@triton.jit
def run_begin(edge_ptr, rows, last):
    """Return where the sequence of the token before ``last`` begins among the tokens from 0 on."""
    edges = tl.load(edge_ptr + rows, mask=rows < last, other=0)
    return tl.max(tl.where(is_start(edges), rows, 0), 0)


@triton.jit
def store_state(ptr, field, num, den, anchor, decay, decay_low, mask):
    """Write (num, den, p = anchor - decay - decay_low), with the rounding error of p folded into num and den."""
    p, error = two_sum(anchor, negated(decay))
    error -= decay_low
    fold = tl.where(tl.abs(error) < 1, tl.exp(error), 1.0)  # error is NaN where p overflowed to -inf
    # After a NaN p may be anything: -inf would make an empty state of it where it is loaded.
    p = tl.where(den == den, p, 0.0)
    gone = p <= 0.9 * NO_PAST
    tl.store(ptr, tl.where(gone, 0.0, num * fold), mask=mask)
    tl.store(ptr + field, tl.where(gone, 0.0, den * fold), mask=mask)
    tl.store(ptr + 2 * field, tl.where(gone, -float("inf"), p), mask=mask)


@triton.jit
def store_aged(ptr, field, num, den, anchor, age, w, mask):
    decay = age * w
    store_state(ptr, field, num, den, anchor, decay, tl.fma(age, w, negated(decay)), mask)


@triton.jit
def enter(edge, initial_ptr, C, c, in_c, field, num, den, anchor, age):
    """Replace the state where a packed sequence starts; a token that belongs to none comes after NaN."""
    if is_start(edge):
        num, den, anchor, age = empty_state(num)
        if initial_ptr is not None:
            n = (edge >> 2).to(tl.int64)
            num, den, anchor = load_state(initial_ptr + n * C + c, field, has_row(edge, in_c))
        den = tl.where(edge < 0, float("nan"), den)
    return num, den, anchor, age


@triton.jit
def leave(edge, gfinal_ptr, C, c, in_c, field, gm, gl, a, b):
    """Replace the adjoints where a packed sequence ends, and forget what they were."""
    if is_end(edge):
        if gfinal_ptr is not None:
            n = (edge >> 2).to(tl.int64)
            gm = tl.load(gfinal_ptr + n * C + c, mask=has_row(edge, in_c), other=0.0)
            gl = tl.load(gfinal_ptr + field + n * C + c, mask=has_row(edge, in_c), other=0.0)
        else:
            gm = tl.zeros_like(gm)
            gl = tl.zeros_like(gl)
        a = tl.zeros_like(a)
        b = tl.zeros_like(b)
    return gm, gl, a, b


@lru_cache
def row_constants(launch: Launch, C: int, acc: torch.dtype, registers: int) -> Constants:
    """Return what the kernels that walk along time are compiled for; AMD's compiler bounds no registers."""
    bound = {} if torch.version.hip else {"maxnreg": registers}
    return constants(ROWS=checkpoint_rows(acc.itemsize), STAGES=launch.stages, **bound, **launch.options(C))
