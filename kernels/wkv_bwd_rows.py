"""The adjoint of WKV over the rows of a tile on a GPU: what is computed again, and the reverse pass.

It is derived in wkv.py, under "Adjoint".
"""

import triton
import triton.language as tl

from fastwkv.kernels.arithmetic import negated, quotient
from fastwkv.kernels.wkv_state import absorb, at_least_tiny, tiny, weigh


@triton.jit
def _or_one(den):
    """Return den, and 1 for that of an empty state."""
    return tl.where(den <= tiny(den), 1.0, den)


@triton.jit
def _exact_quotient(a, b, inverse):
    """Return a / b, rounded once: thousands of factors 1-r multiply, and where nothing is added they must be 1."""
    q = a * inverse
    return tl.fma(tl.fma(negated(q), b, a), inverse, q)


@triton.jit
def _recompute_rows(
    ks, vs, gys, rates, state, first, stop, NEVER_ZERO: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr
):
    """Go through the rows of a tile once more, from the state before it: what the reverse pass needs of each.

    With MASKED, rows before ``first`` and from ``stop`` on are absent and take no time: their k is -inf, v and gy 0.
    """
    w, u = rates
    den = state[1]
    weight = den if NEVER_ZERO else _or_one(den)
    mean = state[0] / weight
    alphas = ()
    gys_now = ()  # gy s
    gys_past = ()  # gy (1-s)
    rs = ()
    kepts = ()  # 1-r
    slopes = ()  # r (1-r) δ
    seen = tl.zeros_like(den).to(tl.int32)  # bit i: the past of row i has weight
    for i in tl.static_range(ROWS):
        k = ks[i].to(w.dtype)
        v = vs[i].to(w.dtype)
        gy = gys[i].to(w.dtype)
        step = 1.0
        if MASKED:
            step = tl.where((first <= i) & (stop > i), 1.0, 0.0)
        if not NEVER_ZERO:
            seen |= (den > tiny(den)).to(tl.int32) << i
        delta = v - mean
        gap = tl.fma(negated(state[3]), w, state[2] - k)

        past, now = weigh(gap - u)
        both = tl.fma(past, den, now)
        if not NEVER_ZERO:  # without any weight y is 0, whatever the state
            gy = tl.where(both <= tiny(both), 0.0, gy)
            both = at_least_tiny(both, False)
        s = quotient(now, both)
        gy_past = gy * quotient(past * weight, both)
        alphas = alphas + (gy_past * s * delta,)
        gys_now = gys_now + (gy * s,)
        gys_past = gys_past + (gy_past,)

        past, now = weigh(gap - step * w)
        past *= weight
        state = absorb(state, gap, w, (v, 1.0, k), step)
        den = state[1]
        weight = den if NEVER_ZERO else _or_one(den)
        inverse = quotient(1.0, weight)
        r = now * inverse
        kept = _exact_quotient(past, weight, inverse)
        mean = state[0] * inverse
        rs = rs + (r,)
        kepts = kepts + (kept,)
        slopes = slopes + (r * kept * delta,)
    return alphas, gys_now, gys_past, rs, kepts, slopes, seen


@triton.jit
def _reverse_rows(
    terms, adjoint, factors, sums, first, stop,
    SUMMARY: tl.constexpr, NEVER_ZERO: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Go back over the rows of a tile: gk and gv of each, the adjoint before them, a chunk's factors, gw and gu."""
    alphas, gys_now, gys_past, rs, kepts, slopes, seen = terms
    gm, gl = adjoint
    kept, mixed = factors
    gw, gu = sums
    gks = ()
    gvs = ()
    gw_rows = tl.zeros_like(gw)  # a sum of sums: a running sum of single terms would lose digits over a long T
    gu_rows = tl.zeros_like(gu)
    for i in tl.static_range(ROWS - 1, -1, -1):
        both = tl.fma(gm, slopes[i], alphas[i])  # α + β
        gl_past = gl * kepts[i]
        if not SUMMARY:
            gk = both
            gw_term = tl.fma(gm, slopes[i], negated(gl_past))
            gu_term = alphas[i]
            if MASKED:
                gw_term = tl.where((first <= i) & (stop > i), gw_term, 0.0)
            if not NEVER_ZERO:  # that an empty state counts as den = 1 is for num and den alone
                weighs = (seen & (1 << i)) != 0
                gk = tl.where(weighs, gk, 0.0)
                gw_term = tl.where(weighs, gw_term, 0.0)
                gu_term = tl.where(weighs, gu_term, 0.0)
            gvs = (tl.fma(gm, rs[i], gys_now[i]),) + gvs
            gks = (tl.fma(gl, rs[i], gk),) + gks
            gw_rows += gw_term
            gu_rows += gu_term
        else:
            mixed = tl.fma(negated(slopes[i]), kept, kepts[i] * mixed)
            kept = kepts[i] * kept
        gl = gl_past - both
        gm = tl.fma(gm, kepts[i], gys_past[i])
    return gks, gvs, (gm, gl), (kept, mixed), (gw + gw_rows, gu + gu_rows)


@triton.jit
def backward_rows(
    tiles, rates, state, adjoint, factors, sums, first, stop,
    SUMMARY: tl.constexpr, NEVER_ZERO: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Run the adjoint over the rows of a tile; ``state`` is that before it."""
    ks, vs, gys = tiles
    terms = _recompute_rows(ks, vs, gys, rates, state, first, stop, NEVER_ZERO, MASKED, ROWS)
    return _reverse_rows(terms, adjoint, factors, sums, first, stop, SUMMARY, NEVER_ZERO, MASKED, ROWS)
