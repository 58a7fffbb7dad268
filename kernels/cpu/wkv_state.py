"""The state of WKV in registers: how it takes in a token, is read and is written. kernels/cpu/wkv.py says why."""

import numpy as np

from fastwkv.kernels.config import checkpoint_rows
from fastwkv.kernels.cpu.numerics import inlined, load, splat, store
from fastwkv.kernels.cpu.vectors import absolute, fma, select

tokens_kept = inlined(checkpoint_rows)

LOWEST = float(np.finfo(np.float32).min)
# |w| above this is taken for this, so that age * w stays finite: e^{-w} is 0 (or infinite) all the same.
STEEPEST = 1e29


@inlined
def locate(unit, width, C, bounds):
    """Return what a unit of work is: sequence n, its batch row, first and last token, first and last channel."""
    blocks, sequences = -(-C // width), len(bounds) - 1
    n, first = unit // blocks, unit % blocks * width
    i = n % sequences
    return n, n // sequences, bounds[i], bounds[i + 1], first, min(first + width, C)


@inlined
def load_w(w_ptr, c, sums):
    """Read decay rates."""
    w = load(w_ptr, c, sums)
    w = select(w > STEEPEST, STEEPEST, w)
    return select(w < -STEEPEST, -STEEPEST, w)


@inlined
def add(heavier, E, num, den, v):
    """Return num and den after a token. Where the past is heavier E is the token's weight, else the past's."""
    num = fma(select(heavier, v, num), E, select(heavier, num, v))
    den = fma(select(heavier, 1.0, den), E, select(heavier, den, 1.0))
    return num, den


@inlined
def ratio(num, den):
    """Return num / den, and 0 where nothing has any weight; a NaN in either stays one."""
    return num / select(den == 0.0, 1.0, den)


@inlined
def empty_state(sums):
    """Return num, den, anchor of an empty past."""
    return splat(0.0, sums), splat(0.0, sums), splat(LOWEST, sums)


@inlined
def load_state(num_ptr, den_ptr, max_ptr, index, sums):
    """Read (num, den, max) as num, den, anchor. A max of -inf takes all weight from num and den."""
    num, den, scale = load(num_ptr, index, sums), load(den_ptr, index, sums), load(max_ptr, index, sums)
    absent = scale < LOWEST
    return select(absent, num * 0.0, num), select(absent, den * 0.0, den), select(absent, LOWEST, scale)


@inlined
def load_packed(ptr, index, plane, sums):
    """Read a state whose fields lie ``plane`` elements apart."""
    size = plane * sums.itemsize
    return load_state(ptr, ptr + size, ptr + 2 * size, index, sums)


@inlined
def store_packed(ptr, index, plane, num, den, scale, sums):
    """Write (num, den, max), each ``plane`` elements after the one before."""
    store(ptr, index, num, sums)
    store(ptr, index + plane, den, sums)
    store(ptr, index + 2 * plane, scale, sums)


@inlined
def rounded(num, den, anchor, age, minus_w):
    """Return (num, den, max) with max = anchor - age w rounded, its residue moved into num and den."""
    change = age * minus_w
    scale = anchor + change
    back = scale - anchor
    residue = (anchor - (scale - back)) + (change - back) + fma(age, minus_w, 0.0 - change)
    residue = select(absolute(residue) < 1.0, residue, 0.0)
    return fma(residue, num, num), fma(residue, den, den), scale
