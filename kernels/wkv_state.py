"""Parts of all WKV kernels on a GPU: weights, and states in registers and in memory. wkv.py has the mathematics.

In registers a state is a tuple (num, den, anchor, age), an adjoint (gm, gl); notation.py says what the words mean.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fastwkv.kernels import notation
from fastwkv.kernels.arithmetic import LOG2_E, negated, two_sum
from fastwkv.kernels.config import Launch, checkpoint_rows
from fastwkv.kernels.held import Constants, constants
from fastwkv.kernels.packing import in_sequence, is_end, is_start
from fastwkv.kernels.tiles import rows_of

NO_PAST = tl.constexpr(notation.NO_PAST)
MAX_RATE = tl.constexpr(notation.MAX_RATE)
LN2 = tl.constexpr(notation.LN2)
RAISED_BITS_FLOAT32 = tl.constexpr(notation.RAISED_BITS_FLOAT32)
RAISED_BITS_FLOAT64 = tl.constexpr(notation.RAISED_BITS_FLOAT64)


@triton.jit
def load_rate(w_ptr, c, in_c, ACC: tl.constexpr):
    """Read decay rates. Only finite ones are bounded: a NaN stays NaN."""
    w = tl.load(w_ptr + c, mask=in_c, other=0.0).to(ACC)
    w = tl.where(w > MAX_RATE, MAX_RATE, w)  # tl.minimum would lose a NaN
    return tl.where(w < -MAX_RATE, -MAX_RATE, w)


@triton.jit
def weigh(d):
    """Return the weights of the past and of the present, whose exponents differ by d. The larger weight is 1."""
    # Triton's exp2 is one instruction. Its exp adds three that keep subnormal results, which nothing here would miss.
    e = tl.exp2(tl.abs(d) * -LOG2_E)
    return tl.where(d >= 0, 1.0, e), tl.where(d >= 0, e, 1.0)


@triton.jit
def tiny(x):
    """Return the smallest normal number. A sum of weights below it has lost its digits, and counts as none."""
    TINY: tl.constexpr = 2.2250738585072014e-308 if x.dtype == tl.float64 else 1.1754943508222875e-38
    return tl.full(x.shape, TINY, x.dtype)


@triton.jit
def at_least_tiny(weight, NEVER_ZERO: tl.constexpr):
    """Return a weight to divide by: no less than ``tiny``, or itself where it is never 0. A NaN stays NaN."""
    return weight if NEVER_ZERO else tl.where(weight <= tiny(weight), tiny(weight), weight)


@triton.jit
def absorb(state, gap, w, term, steps):
    """Let the state age by ``steps`` and take in a term (num, den, p). ``gap`` is the state's exponent less that p."""
    num, den, anchor, age = state
    num_new, den_new, p_new = term
    d = gap - steps * w
    past, now = weigh(d)
    stays = d >= 0
    num = tl.fma(past, num, now * num_new)
    den = tl.fma(past, den, now * den_new)
    return num, den, tl.where(stays, anchor, p_new), tl.where(stays, age + steps, 0.0)


@triton.jit
def empty_state(like):
    """Return the state before the first token. Its weight is ``tiny``, so that no sum of weights is less."""
    zero = tl.zeros_like(like)
    return zero, tiny(like), tl.full(like.shape, NO_PAST, like.dtype), zero


@triton.jit
def weightless(num, den, p):
    """Return the sums and exponent of an empty state in the place of those whose exponent is -inf."""
    gone = p == -float("inf")
    return tl.where(gone, 0.0, num), tl.where(gone, tiny(den), den), tl.where(gone, NO_PAST, p)


@triton.jit
def raised(num, den, p):
    """Give a state whose sums are very small larger ones, and an exponent to match: den > 0 is 2^-62 at least."""
    BITS: tl.constexpr = RAISED_BITS_FLOAT64 if den.dtype == tl.float64 else RAISED_BITS_FLOAT32
    small = (den > 0) & (den < 0.5**BITS)
    lower, error = two_sum(p, tl.full(p.shape, -LN2 * BITS, p.dtype))
    factor = tl.where(tl.abs(error) < 1, tl.exp(error), 1.0) * 2.0**BITS  # error is NaN where p is infinite
    return tl.where(small, num * factor, num), tl.where(small, den * factor, den), tl.where(small, lower, p)


@triton.jit
def lifted(g, lift_ptr, mask):
    """Return the gradient of a sum of a state that was given, from the gradient of its entry state."""
    return tl.where(g == 0, g, g * tl.exp(tl.load(lift_ptr, mask=mask, other=0.0)))


@triton.jit
def load_sums(ptr, field, mask):
    """Read num, den and p."""
    num = tl.load(ptr, mask=mask, other=0.0)
    den = tl.load(ptr + field, mask=mask, other=0.0)
    p = tl.load(ptr + 2 * field, mask=mask, other=0.0)
    return weightless(num, den, p)


@triton.jit
def load_state(ptr, field, mask):
    """Read a state."""
    num, den, p = load_sums(ptr, field, mask)
    return num, den, p, tl.zeros_like(den)


@triton.jit
def load_adjoint(ptr, field, offset, c, mask):
    """Read gm and gl of these channels, of a sequence or chunk that is ``offset`` away from the first one."""
    gm = tl.load(ptr + offset + c, mask=mask, other=0.0)
    gl = tl.load(ptr + field + offset + c, mask=mask, other=0.0)
    return gm, gl


@triton.jit
def fold_age(state, w):
    """Return num and den, p = anchor - age w as one number, and the factor of both sums that its rounding asks for."""
    num, den, anchor, age = state
    decay = age * w
    decay_low = tl.fma(age, w, negated(decay))
    p, error = two_sum(anchor, negated(decay))
    error -= decay_low
    fold = tl.where(tl.abs(error) < 1, tl.exp(error), 1.0)  # error is NaN where p overflowed to -inf
    return num, den, p, fold


@triton.jit
def store_state(ptr, field, state, w, mask):
    """Write a state as num, den and p."""
    num, den, p, fold = fold_age(state, w)
    # After a NaN p may be anything: -inf would make an empty state of it where it is loaded.
    p = tl.where(den == den, p, 0.0)
    gone = p <= 0.9 * NO_PAST
    tl.store(ptr, tl.where(gone, 0.0, num * fold), mask=mask)
    tl.store(ptr + field, tl.where(gone, 0.0, den * fold), mask=mask)
    tl.store(ptr + 2 * field, tl.where(gone, -float("inf"), p), mask=mask)


@triton.jit
def load_rows(ptr, tile, mask, outside: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr):
    """Read the rows of a tile. With MASKED, numbers out of the mask are ``outside``; else nobody looks at them."""
    if MASKED:
        return rows_of(tl.load(ptr + tile, mask=mask, other=outside), ROWS)
    else:
        return rows_of(tl.load(ptr + tile, mask=mask), ROWS)


@triton.jit
def run_end(edge_ptr, rows, first, stop):
    """Return where the sequence of row ``first`` ends among the rows before ``stop``."""
    edges = tl.load(edge_ptr + rows, mask=(rows > first) & (rows < stop), other=0)
    return tl.min(tl.where(is_start(edges), rows, stop), 0)


@triton.jit
def run_begin(edge_ptr, rows, stop):
    """Return where the sequence of the row before ``stop`` begins among the rows from 0 on."""
    edges = tl.load(edge_ptr + rows, mask=rows < stop, other=0)
    return tl.max(tl.where(is_start(edges), rows, 0), 0)


@triton.jit
def enter(edge, initial_ptr, C, c, in_c, field, state):
    """Return the state before a token: another where a packed sequence starts, NaN where the token belongs to none."""
    if is_start(edge):
        num, den, anchor, age = empty_state(state[0])
        if initial_ptr is not None:
            n = (edge >> 2).to(tl.int64)
            num, den, anchor, age = load_state(initial_ptr + n * C + c, field, in_sequence(edge, in_c))
        den = tl.where(edge < 0, float("nan"), den)
        state = (num, den, anchor, age)
    return state


@triton.jit
def leave(edge, gfinal_ptr, C, c, in_c, field, adjoint, factors):
    """Return the adjoint after a token, and a chunk's factors: others where a packed sequence ends."""
    if is_end(edge):
        zero = tl.zeros_like(adjoint[0])
        if gfinal_ptr is not None:
            n = (edge >> 2).to(tl.int64)
            adjoint = load_adjoint(gfinal_ptr, field, n * C, c, in_sequence(edge, in_c))
        else:
            adjoint = (zero, zero)
        factors = (zero, zero)
    return adjoint, factors


@lru_cache
def row_constants(launch: Launch, C: int, acc: torch.dtype, registers: int) -> Constants:
    """Return what the kernels that walk along time are compiled for. AMD's compiler takes no bound on registers."""
    bound = {} if torch.version.hip else {"maxnreg": registers}
    return constants(ROWS=checkpoint_rows(acc.itemsize), STAGES=launch.stages, **bound, **launch.constants(C))
