"""What the Triton kernels share: masks, exact sums, and numbers that are real or complex.

A number is a tuple of tensors: one, or real and imaginary part. In memory the two lie side by side.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def negated(x):
    """Return -x, which costs nothing: LLVM makes this product a sign of the instruction that takes it.

    Triton 3.6 compiles a minus sign to 0 - x, an addition, and often one that the next step waits for.
    """
    return x * -1.0


@triton.jit
def rows_of(tile, ROWS: tl.constexpr):
    """Return the 4, 8 or 16 rows of a tile [rows, channels], every lane holding a channel of each.

    Read one by one, rows of 32 channels would make loads of 2 or 4 bytes a lane. A tile is read 16 bytes a lane, ahead
    of time where the loop says so (num_stages), and handed over through shared memory.
    """
    C: tl.constexpr = tile.shape[1]
    parts = (tile,)
    for level in tl.static_range(4):  # no recursion: Triton below 3.5 knows none
        if 2**level < ROWS:
            halves = ()
            for i in tl.static_range(len(parts)):
                pair = tl.reshape(parts[i], [2, ROWS // 2 ** (level + 1), C])
                first, second = tl.split(tl.permute(pair, (1, 2, 0)))
                halves = halves + (first, second)
            parts = halves
    rows = ()
    for i in tl.static_range(ROWS):
        rows = rows + (tl.reshape(parts[i], [C]),)
    return rows


@triton.jit
def tile_of(rows, ptr, ROWS: tl.constexpr):
    """Return the tile of these rows, in the dtype that ``ptr`` points to; the inverse of :func:`rows_of`."""
    C: tl.constexpr = rows[0].shape[0]
    parts = (tl.reshape(rows[0].to(ptr.dtype.element_ty), [1, C]),)
    for i in tl.static_range(1, ROWS):
        parts = parts + (tl.reshape(rows[i].to(ptr.dtype.element_ty), [1, C]),)
    for level in tl.static_range(4):
        if 2**level < ROWS:
            joined = ()
            for i in tl.static_range(len(parts) // 2):
                pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (2, 0, 1))
                joined = joined + (tl.reshape(pair, [2 ** (level + 1), C]),)
            parts = joined
    return parts[0]


@triton.jit
def tile_offsets(rows, block, BLOCK_C: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr):
    """Return how far the parts of a block's numbers of these rows are from number 0 of row 0, and which exist."""
    columns = block * (BLOCK_C * PARTS) + tl.arange(0, BLOCK_C * PARTS)
    inside = (columns < C * PARTS) if C % BLOCK_C else tl.full([BLOCK_C * PARTS], True, tl.int1)
    offsets = rows[:, None] * (STEP * PARTS) + columns[None, :]
    inside = inside[None, :]
    return offsets, inside


@triton.jit
def numbers_of(tile, ROWS: tl.constexpr, like):
    """Return the rows of a tile of numbers [rows, channels * parts], each in the form and dtype of ``like``."""
    PARTS: tl.constexpr = len(like)
    if PARTS == 2:
        re, im = tl.split(tl.reshape(tile, [ROWS, tile.shape[1] // 2, 2]))
        parts = (rows_of(re, ROWS), rows_of(im, ROWS))
    else:
        parts = (rows_of(tile, ROWS),)
    rows = ()
    for i in tl.static_range(ROWS):
        row = ()
        for part in tl.static_range(PARTS):
            row = row + (parts[part][i].to(like[0].dtype),)
        rows = rows + (row,)
    return rows


@triton.jit
def _part_of(rows, part: tl.constexpr, ROWS: tl.constexpr):
    column = ()
    for i in tl.static_range(ROWS):
        column = column + (rows[i][part],)
    return column


@triton.jit
def tile_of_numbers(rows, ptr, ROWS: tl.constexpr):
    """Return the tile of these rows of numbers, in the dtype that ``ptr`` points to."""
    re = tile_of(_part_of(rows, 0, ROWS), ptr, ROWS)
    if len(rows[0]) == 2:
        im = tile_of(_part_of(rows, 1, ROWS), ptr, ROWS)
        return tl.reshape(tl.join(re, im), [ROWS, 2 * re.shape[1]])
    else:
        return re


INTERPRETED = tl.constexpr(not isinstance(rows_of, triton.JITFunction))


@triton.jit
def quotient(a, b):
    """Return a / b for b from the smallest normal number to 2^126. float32: two instructions, two units off at most.

    Triton's own division makes itself ready for what is smaller and larger, which takes six more.
    """
    if INTERPRETED or b.dtype == tl.float64:  # the interpreter knows no library functions
        return a / b
    else:
        return libdevice.fast_dividef(a, b)


@triton.jit
def two_sum(a, b):
    """Return a + b rounded, and what the rounding cut off. Not to be compiled with fused multiply-adds around it."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit
def filled(value: tl.constexpr, like):
    """Return a real number of the form of another."""
    first = tl.full(like[0].shape, value, like[0].dtype)
    if len(like) == 2:
        return (first, tl.zeros_like(first))
    else:
        return (first,)


@triton.jit
def load(ptr, offset, mask, like, other: tl.constexpr = 0.0):
    """Read numbers that are ``offset`` numbers away, ``other`` out of the mask, in the form and dtype of ``like``."""
    if len(like) == 2:
        both = tl.load(ptr + 2 * offset[:, None] + tl.arange(0, 2)[None, :], mask=mask[:, None], other=other)
        re, im = tl.split(both.to(like[0].dtype))
        return (re, im)
    else:
        return (tl.load(ptr + offset, mask=mask, other=other).to(like[0].dtype),)


@triton.jit
def store(ptr, offset, z, mask):
    """Write numbers that are ``offset`` numbers away."""
    if len(z) == 2:
        tl.store(ptr + 2 * offset[:, None] + tl.arange(0, 2)[None, :], tl.join(z[0], z[1]), mask=mask[:, None])
    else:
        tl.store(ptr + offset, z[0], mask=mask)


@triton.jit
def conjugate(z):
    """Return conj(z), which for real numbers is z."""
    if len(z) == 2:
        return (z[0], negated(z[1]))
    else:
        return z


@triton.jit
def plus(y, z):
    """Return y + z."""
    if len(z) == 2:
        return (y[0] + z[0], y[1] + z[1])
    else:
        return (y[0] + z[0],)


@triton.jit
def times(y, z):
    """Return y z."""
    if len(z) == 2:
        return (tl.fma(y[0], z[0], negated(y[1] * z[1])), tl.fma(y[0], z[1], y[1] * z[0]))
    else:
        return (y[0] * z[0],)


@triton.jit
def times_sum(a, a_low, h, low, EXACT: tl.constexpr):
    """Return (a + a_low) (h + low) as such a sum again; without EXACT both low parts are 0 and stay so.

    ``a_low`` is None where a is exact, as any complex a is taken for.
    """
    if not EXACT:
        return times(a, h), low
    elif len(a) == 2:
        re, re_low = _product_sum(a[0], h[0], negated(a[1]), h[1])
        im, im_low = _product_sum(a[0], h[1], a[1], h[0])
        re_low = tl.fma(a[0], low[0], tl.fma(negated(a[1]), low[1], re_low))
        im_low = tl.fma(a[0], low[1], tl.fma(a[1], low[0], im_low))
        return (re, im), (re_low, im_low)
    else:
        product = a[0] * h[0]
        error = tl.fma(a[0], h[0], negated(product))
        if a_low is not None:
            error = tl.fma(a_low[0], h[0], error)
        return (product,), (tl.fma(a[0], low[0], error),)


@triton.jit
def _product_sum(a, b, c, d):
    """Return a b + c d as a sum of two, exact to the rounding of the smaller."""
    ab = a * b
    cd = c * d
    total, error = two_sum(ab, cd)
    return total, error + (tl.fma(a, b, negated(ab)) + tl.fma(c, d, negated(cd)))


@triton.jit
def plus_sum(h, low, x, EXACT: tl.constexpr):
    """Return h + low + x as such a sum again."""
    if not EXACT:
        return plus(h, x), low
    elif len(x) == 2:
        re, re_error = two_sum(h[0], x[0])
        im, im_error = two_sum(h[1], x[1])
        return (re, im), (low[0] + re_error, low[1] + im_error)
    else:
        total, error = two_sum(h[0], x[0])
        return (total,), (low[0] + error,)


@triton.jit
def rounded_sum(h, low):
    """Return h + low as one number. Where h has overflowed nothing is known of what its rounding has cut off."""
    if len(h) == 2:
        re = tl.where(low[0] == low[0], h[0] + low[0], h[0])
        return (re, tl.where(low[1] == low[1], h[1] + low[1], h[1]))
    else:
        return (tl.where(low[0] == low[0], h[0] + low[0], h[0]),)


@triton.jit
def times_state(product, h, low):
    """Return product (h + low) as a sum; what is 0 stays so, though the product of many a has overflowed."""
    h_new, low_new = times_sum(product, None, h, low, True)
    if len(h) == 2:
        zero = (h[0] == 0) & (h[1] == 0)
        h_new = (tl.where(zero, 0.0, h_new[0]), tl.where(zero, 0.0, h_new[1]))
        low_new = (tl.where(zero, 0.0, low_new[0]), tl.where(zero, 0.0, low_new[1]))
    else:
        zero = h[0] == 0
        h_new = (tl.where(zero, 0.0, h_new[0]),)
        low_new = (tl.where(zero, 0.0, low_new[0]),)
    return h_new, low_new


@triton.jit
def exp_sum(x):
    """Return e^x as a sum of two numbers. Close to 1, e^x - 1 is known far better than e^x can be written as one.

    float32: e^x = 2^n (1 + p(r) r) with n = x / ln 2 rounded, and p the polynomial with the least relative error.
    """
    if x.dtype == tl.float64:
        return tl.exp2(x * LOG2_E), tl.zeros_like(x)
    else:
        large = x > 80  # 2^n overflows before e^x does
        x = tl.where(large, x - 64, x)
        n = tl.floor(x * LOG2_E + 0.5)
        r = tl.fma(n, -1.4286068203094173e-06, tl.fma(n, -0.693145751953125, x))  # ln 2, its first digits apart
        p = tl.fma(r, 0.0014061422676135337, 0.008379059035691179)
        p = tl.fma(p, r, 0.041664773315148215)
        p = tl.fma(p, r, 0.16666364808738957)
        p = tl.fma(p, r, 0.5000000435746266)
        rest = tl.fma(p, r, 1.000000049796864) * r
        rounded = rest + 1
        power = tl.where(x < -87, 0.0, tl.exp2(n))
        normal = (x >= -87) & (x <= 80)
        high = tl.where(normal | (x != x), rounded * power, power)
        low = tl.where(normal, (rest - (rounded - 1)) * power, 0.0)
        factor = tl.where(large, 6.235149080811617e27, 1.0)  # e^64
        return high * factor, low * factor
