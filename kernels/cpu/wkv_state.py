"""The state of WKV in registers: how it takes in a token, is read and is written. kernels/wkv.py says why.

kernels/notation.py explains the words.
"""

from fastwkv.kernels import config
from fastwkv.kernels.cpu.numerics import exp, inlined, load, splat, store
from fastwkv.kernels.cpu.vectors import absolute, fma, select
from fastwkv.kernels.notation import MAX_RATE, NO_PAST

checkpoint_rows = inlined(config.checkpoint_rows)


@inlined
def locate(unit, width, C, bounds):
    """Return what a unit of work is: sequence n, its batch row, begin and end of its tokens, and of its channels."""
    blocks, sequences = -(-C // width), len(bounds) - 1
    n, first = unit // blocks, unit % blocks * width
    i = n % sequences
    return n, n // sequences, bounds[i], bounds[i + 1], first, min(first + width, C)


@inlined
def load_rate(w_ptr, c, sums):
    """Read decay rates. Only finite ones are bounded: a NaN stays NaN."""
    w = load(w_ptr, c, sums)
    w = select(w > MAX_RATE, MAX_RATE, w)
    return select(w < -MAX_RATE, -MAX_RATE, w)


@inlined
def weigh(d):
    """Return whether the past is the heavier of two whose exponents differ by d, and the weight e of the lighter.

    The heavier has weight 1. A GPU makes two weights of this, past and now; here addends are chosen by it, which saves
    a product.
    """
    return d >= 0.0, exp(0.0 - absolute(d))


@inlined
def absorb(heavier, e, num, den, v):
    """Return num and den after a token. Where the past is heavier e is the token's weight, else the past's."""
    num = fma(select(heavier, v, num), e, select(heavier, num, v))
    den = fma(select(heavier, 1.0, den), e, select(heavier, den, 1.0))
    return num, den


@inlined
def ratio(num, den):
    """Return num / den, and 0 where nothing has any weight. A NaN in either stays NaN."""
    return num / select(den == 0.0, 1.0, den)


@inlined
def empty_state(sums):
    """Return num, den and anchor of an empty past."""
    return splat(0.0, sums), splat(0.0, sums), splat(NO_PAST, sums)


@inlined
def load_fields(num_ptr, den_ptr, p_ptr, index, sums):
    """Read num, den and p from memories of their own. A p of -inf takes all weight from num and den."""
    num, den, p = load(num_ptr, index, sums), load(den_ptr, index, sums), load(p_ptr, index, sums)
    gone = p < NO_PAST
    return select(gone, num * 0.0, num), select(gone, den * 0.0, den), select(gone, NO_PAST, p)


@inlined
def load_state(ptr, index, field, sums):
    """Read num, den and p, which lie ``field`` elements apart."""
    size = field * sums.itemsize
    return load_fields(ptr, ptr + size, ptr + 2 * size, index, sums)


@inlined
def store_state(ptr, index, field, num, den, p, sums):
    """Write num, den and p, each ``field`` elements after the one before."""
    store(ptr, index, num, sums)
    store(ptr, index + field, den, sums)
    store(ptr, index + 2 * field, p, sums)


@inlined
def fold_age(num, den, anchor, age, minus_w):
    """Return num, den and p = anchor - age w as one number, what its rounding cuts off being folded into both sums."""
    change = age * minus_w
    p = anchor + change
    back = p - anchor
    error = (anchor - (p - back)) + (change - back) + fma(age, minus_w, 0.0 - change)
    error = select(absolute(error) < 1.0, error, 0.0)
    return fma(error, num, num), fma(error, den, den), p
