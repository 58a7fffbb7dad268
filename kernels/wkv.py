"""WKV on a GPU: the mathematics, the Triton kernels and their launchers.

Forward. Per channel the state after token t is (num, den, p), meaning Σ_i e^{k_i - (t-i) w} v_i = num e^p and the same
sum without v_i = den e^p. A token is weighed against the past twice, with d_t = p_{t-1} - k_t:

    y_t = (e1 num + e2 v_t) / (e1 den + e2)              e1 : e2 = e^{d_t - u} : 1     its own output
    num, den <- e1 num + e2 v_t, e1 den + e2             e1 : e2 = e^{d_t - w} : 1     the next state

Stabiliser. Of the two weights the larger is 1 and the other e^{-|d|}: one exponential for each of the two uses, never
an overflow. p is never stepped down by w: it is kept as an anchor, the key that it comes from, and its age,
p = anchor - age w, and d = fma(-age, w, anchor - k) subtracts the two keys first, which loses nothing where they are
close. Where a state leaves the registers, what the rounding of p cuts off is folded into num and den.

Absent tokens and empty states. k = -inf makes d = +inf and the weight e2 = 0. An empty state has den = 0 and, in
registers, the finite p = NO_PAST, below which no key lies; in memory p = -inf. Zero weight in all gives y = 0.

Adjoint. With the mean m = num/den and ℓ = p + log den, s_t and r_t the weights of token t in its own output and in
the next state (both sigmoids), δ_t = v_t - m_{t-1}, α_t = gy_t s_t (1-s_t) δ_t and β_t = gm r_t (1-r_t) δ_t, the
adjoints gm and gl of (m, ℓ) run backwards:

    gv_t = gy_t s_t + gm r_t                     gu += α_t
    gk_t = α_t + β_t + gl r_t                    gw += β_t - gl (1-r_t)
    gl <- gl (1-r_t) - α_t - β_t                 gm <- gm (1-r_t) + gy_t (1-s_t)

1-s and 1-r are e1 den over the sum, not subtractions. s, r, m are recomputed from a state kept every CHECKPOINT_ROWS
tokens; nothing else is stored. An empty state counts as den = 1 in 1-s and 1-r, and so does ops/wkv.py when it divides
by den: that gives the true gradient of num and den at den = 0.

Chunks. Both passes are associative along time. A sequence is one chunk where batch and channels fill the device; else
every chunk is first summarised from an empty state (the same kernel, without its outputs), the summaries are scanned
in order, and every chunk is finished from its true state. Adjoints too: over a chunk (gm, gl) <- (a gm + cm,
a gl + b gm + cl). With packed sequences the state is replaced wherever one starts; the grid stays the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.config import CHECKPOINT_ROWS, WKVLaunch, wkv_launch

BACKWARD_ROWS = 8  # rows kept in registers between recomputation and adjoint: 16 would spill in float64

NO_PAST = tl.constexpr(-3.4028234663852886e38)  # -FLT_MAX: an exponent below every finite key
TINY = tl.constexpr(1.1754943508222875e-38)  # keeps 0 / 0 away; every other denominator is at least about 1
MAX_RATE = tl.constexpr(1e29)  # beyond it the decay is total or unbounded anyway, and age * w must stay finite


@triton.jit
def _load_rate(w_ptr, c, in_c, ACC: tl.constexpr):
    w = tl.load(w_ptr + c, mask=in_c, other=0.0).to(ACC)
    w = tl.where(w > MAX_RATE, MAX_RATE, w)  # not tl.minimum: a NaN must stay one
    return tl.where(w < -MAX_RATE, -MAX_RATE, w)


@triton.jit
def _weigh(d):
    """Weights of the past and of the present, whose exponents differ by d, the larger being 1."""
    e = tl.exp(-tl.abs(d))
    return tl.where(d >= 0, 1.0, e), tl.where(d >= 0, e, 1.0)


@triton.jit
def _absorb(num, den, anchor, age, d, w, num_new, den_new, p_new, steps):
    """Let the state age by ``steps`` and add a term of exponent p_new, d = p - p_new being known."""
    d -= steps * w
    past, now = _weigh(d)
    stays = d >= 0
    num = past * num + now * num_new
    den = past * den + now * den_new
    return num, den, tl.where(stays, anchor, p_new), tl.where(stays, age + steps, 0.0)


@triton.jit
def _two_sum(a, b):
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit
def _load_state(ptr, field, mask):
    num = tl.load(ptr, mask=mask, other=0.0)
    den = tl.load(ptr + field, mask=mask, other=0.0)
    p = tl.load(ptr + 2 * field, mask=mask, other=0.0)
    return num, den, tl.where(p == -float("inf"), NO_PAST, p)


@triton.jit
def _store_state(ptr, field, num, den, anchor, decay, decay_low, mask):
    """Write (num, den, p = anchor - decay - decay_low), with the rounding error of p folded into num and den."""
    p, error = _two_sum(anchor, -decay)
    error -= decay_low
    fold = tl.where(tl.abs(error) < 1, tl.exp(error), 1.0)  # error is NaN where p overflowed to -inf
    tl.store(ptr, num * fold, mask=mask)
    tl.store(ptr + field, den * fold, mask=mask)
    tl.store(ptr + 2 * field, tl.where(p <= 0.9 * NO_PAST, -float("inf"), p), mask=mask)


@triton.jit
def _store_aged(ptr, field, num, den, anchor, age, w, mask):
    decay = age * w
    _store_state(ptr, field, num, den, anchor, decay, tl.fma(age, w, -decay), mask)


@triton.jit
def _enter(seq_ptr, initial_ptr, t, C, c, in_c, field, num, den, anchor, age):
    """Replace the state where token t starts a packed sequence."""
    n = tl.load(seq_ptr + t + 1)
    if n != tl.load(seq_ptr + t):
        if initial_ptr is not None:
            num, den, anchor = _load_state(initial_ptr + n.to(tl.int64) * C + c, field, in_c)
        else:
            num = tl.zeros_like(num)
            den = tl.zeros_like(den)
            anchor = tl.full(anchor.shape, NO_PAST, anchor.dtype)
        age = tl.zeros_like(age)
    return num, den, anchor, age


@triton.jit
def _before(t, end, c, C: tl.constexpr):
    """Mask of the channels of token t, all of them out where t is not before ``end``."""
    return c < tl.where(end > t, C, 0)


@triton.jit
def _fwd_block(
    offset, w, u, k_ptr, v_ptr, initial_ptr, seq_ptr, y_ptr, final_ptr, num, den, anchor, age,
    t, end, c, in_c, field, C: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Run ROWS tokens from t on; with MASKED only those before ``end``. Returns the state after them."""
    ks = ()
    vs = ()
    for i in tl.static_range(ROWS):  # every load is issued before the first is waited for
        in_row = _before(t + i, end, c, C) if MASKED else in_c
        ks = ks + (tl.load(k_ptr + offset + i * C, mask=in_row, other=0.0).to(num.dtype),)
        vs = vs + (tl.load(v_ptr + offset + i * C, mask=in_row, other=0.0).to(num.dtype),)
    for i in tl.static_range(ROWS):
        if (not MASKED) or (end > t + i):
            if seq_ptr is not None:
                num, den, anchor, age = _enter(seq_ptr, initial_ptr, t + i, C, c, in_c, field, num, den, anchor, age)
            k = ks[i]
            v = vs[i]
            d = tl.fma(-age, w, anchor - k)
            if y_ptr is not None:
                past, now = _weigh(d - u)
                y = (past * num + now * v) / tl.maximum(past * den + now, TINY)
                tl.store(y_ptr + offset + i * C, y, mask=in_c)
            num, den, anchor, age = _absorb(num, den, anchor, age, d, w, v, 1.0, k, 1.0)
            if (seq_ptr is not None) and (y_ptr is not None):
                n = tl.load(seq_ptr + t + i + 1)
                if n != tl.load(seq_ptr + t + i + 2):
                    _store_aged(final_ptr + n.to(tl.int64) * C + c, field, num, den, anchor, age, w, in_c)
    return num, den, anchor, age


@triton.jit(do_not_specialize=["N", "T", "chunk"])
def _wkv_fwd_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    initial_ptr,  # [3, N, C], before every sequence; None: empty
    carry_ptr,  # [3, B * chunks, C], before every chunk; None: a chunk is a sequence, or a summary is wanted
    seq_ptr,  # int32 [T + 2], sequence of token t at t + 1, -1 at both ends; None: not packed
    y_ptr,  # [B, T, C]; None: a summary is wanted, the state after each chunk from an empty one
    checkpoint_ptr,  # [B, blocks, 3, C], or None
    final_ptr,  # [3, N, C]; for summaries [3, B * chunks, C]
    N,
    T,
    chunk,  # tokens a program, a multiple of ROWS
    C: tl.constexpr,  # so that the rows of a block are reached by constant offsets
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = final_ptr.dtype.element_ty
    chunks = tl.cdiv(T, chunk)
    row = tl.program_id(0).to(tl.int64)  # of B * chunks
    b = row // chunks
    begin = (row % chunks).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C) if C % BLOCK_C else tl.full([BLOCK_C], True, tl.int1)
    field = N.to(tl.int64) * C
    carry_field = tl.num_programs(0).to(tl.int64) * C

    w = _load_rate(w_ptr, c, in_c, ACC)
    u = tl.load(u_ptr + c, mask=in_c, other=0.0).to(ACC)
    num = tl.zeros([BLOCK_C], ACC)
    den = tl.zeros([BLOCK_C], ACC)
    anchor = tl.full([BLOCK_C], NO_PAST, ACC)
    age = tl.zeros([BLOCK_C], ACC)
    if carry_ptr is not None:
        num, den, anchor = _load_state(carry_ptr + row * C + c, carry_field, in_c)
    elif (initial_ptr is not None) and (seq_ptr is None) and (y_ptr is not None):
        num, den, anchor = _load_state(initial_ptr + b * C + c, field, in_c)

    offset = (b * T + begin) * C + c
    blocks = tl.cdiv(T, ROWS)
    for t in range(begin, end, ROWS):
        if checkpoint_ptr is not None:
            ptr = checkpoint_ptr + (b * blocks + t // ROWS) * 3 * C + c
            _store_aged(ptr, C, num, den, anchor, age, w, in_c)
        if t + ROWS <= end:
            num, den, anchor, age = _fwd_block(
                offset, w, u, k_ptr, v_ptr, initial_ptr, seq_ptr, y_ptr, final_ptr, num, den, anchor, age,
                t, end, c, in_c, field, C, ROWS, False,
            )  # fmt: skip
        else:
            num, den, anchor, age = _fwd_block(
                offset, w, u, k_ptr, v_ptr, initial_ptr, seq_ptr, y_ptr, final_ptr, num, den, anchor, age,
                t, end, c, in_c, field, C, ROWS, True,
            )  # fmt: skip
        offset += ROWS * C
    if y_ptr is None:
        _store_aged(final_ptr + row * C + c, carry_field, num, den, anchor, age, w, in_c)
    elif seq_ptr is None:
        if end == T:
            _store_aged(final_ptr + b * C + c, field, num, den, anchor, age, w, in_c)


@triton.jit(do_not_specialize=["N", "T", "chunk"])
def _wkv_carry_kernel(
    w_ptr,  # [C]
    initial_ptr,  # [3, N, C], or None
    summary_ptr,  # [3, B * chunks, C]
    seq_ptr,  # int32 [T + 2], or None
    carry_ptr,  # [3, B * chunks, C], written: the state before every chunk
    N,
    T,
    chunk,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = carry_ptr.dtype.element_ty
    chunks = tl.cdiv(T, chunk)
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    field = tl.num_programs(0).to(tl.int64) * chunks * C

    w = _load_rate(w_ptr, c, in_c, ACC)
    num = tl.zeros([BLOCK_C], ACC)
    den = tl.zeros([BLOCK_C], ACC)
    anchor = tl.full([BLOCK_C], NO_PAST, ACC)
    age = tl.zeros([BLOCK_C], ACC)
    if (initial_ptr is not None) and (seq_ptr is None):
        num, den, anchor = _load_state(initial_ptr + b * C + c, N.to(tl.int64) * C, in_c)
    for i in range(chunks):
        offset = (b * chunks + i) * C + c
        _store_aged(carry_ptr + offset, field, num, den, anchor, age, w, in_c)
        num_new, den_new, p_new = _load_state(summary_ptr + offset, field, in_c)
        d = tl.fma(-age, w, anchor - p_new)
        num_all, den_all, anchor_all, age_all = _absorb(
            num, den, anchor, age, d, w, num_new, den_new, p_new, chunk.to(ACC)
        )
        if seq_ptr is not None:  # a chunk in which a sequence starts carries nothing over
            starts = tl.load(seq_ptr + i * chunk) != tl.load(seq_ptr + tl.minimum((i + 1) * chunk, T))
            num_all = tl.where(starts, num_new, num_all)
            den_all = tl.where(starts, den_new, den_all)
            anchor_all = tl.where(starts, p_new, anchor_all)
            age_all = tl.where(starts, 0.0, age_all)
        num = num_all
        den = den_all
        anchor = anchor_all
        age = age_all


@triton.jit
def _or_one(den):
    return tl.where(den == 0, 1.0, den)


@triton.jit
def _bwd_block(
    offset, w, u, k_ptr, v_ptr, gy_ptr, initial_ptr, seq_ptr, gfinal_ptr, gk_ptr, gv_ptr, ginitial_ptr,
    num, den, anchor, age, gm, gl, a, b, gw, gu, t, end, c, in_c, field, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Run the adjoint over ROWS tokens from t on, the last first. Rows from ``end`` on are absent tokens."""
    ks = ()
    vs = ()
    gys = ()
    for i in tl.static_range(ROWS):
        in_row = _before(t + i, end, c, C)
        ks = ks + (tl.load(k_ptr + offset + i * C, mask=in_row, other=-float("inf")).to(w.dtype),)
        vs = vs + (tl.load(v_ptr + offset + i * C, mask=in_row, other=0.0).to(w.dtype),)
        gys = gys + (tl.load(gy_ptr + offset + i * C, mask=in_row, other=0.0).to(w.dtype),)

    mean = num / _or_one(den)
    alphas = ()
    gys_now = ()  # gy s
    gys_past = ()  # gy (1-s)
    rs = ()
    decays = ()  # 1-r
    slopes = ()  # r (1-r) δ
    not_empty = ()
    for i in tl.static_range(ROWS):
        if seq_ptr is not None:
            last = tl.minimum(t + i, end - 1)
            num, den, anchor, age = _enter(seq_ptr, initial_ptr, last, C, c, in_c, field, num, den, anchor, age)
            if tl.load(seq_ptr + last + 1) != tl.load(seq_ptr + last):
                mean = num / _or_one(den)
        den_past = den
        if initial_ptr is not None:
            den_past = _or_one(den)
            not_empty = not_empty + (den != 0,)
        delta = vs[i] - mean
        d = tl.fma(-age, w, anchor - ks[i])

        past, now = _weigh(d - u)
        total = past * den + now
        inverse = tl.where(total == 0, 0.0, 1.0 / total)
        s = now * inverse
        gy_past = gys[i] * (past * den_past * inverse)
        alpha = gy_past * s * delta

        past, now = _weigh(d - w)
        num, den, anchor, age = _absorb(num, den, anchor, age, d, w, vs[i], 1.0, ks[i], 1.0)
        inverse = 1.0 / _or_one(den)
        r = now * inverse
        decay = past * den_past * inverse
        mean = num * inverse
        gy_now = gys[i] * s
        slope = r * decay * delta
        alphas = alphas + (alpha,)
        gys_now = gys_now + (gy_now,)
        gys_past = gys_past + (gy_past,)
        rs = rs + (r,)
        decays = decays + (decay,)
        slopes = slopes + (slope,)

    gw_block = tl.zeros_like(gw)  # a sum of sums: a running sum of single terms would lose digits over a long T
    gu_block = tl.zeros_like(gu)
    for i in tl.static_range(ROWS - 1, -1, -1):
        in_row = _before(t + i, end, c, C)
        decay = tl.where(in_row, decays[i], 1.0)
        if seq_ptr is not None:
            last = tl.minimum(t + i, end - 1)
            n = tl.load(seq_ptr + last + 1)
            if n != tl.load(seq_ptr + last + 2):
                gm = tl.zeros_like(gm)
                gl = tl.zeros_like(gl)
                a = tl.zeros_like(a)
                b = tl.zeros_like(b)
                if gfinal_ptr is not None:
                    gm = tl.load(gfinal_ptr + n.to(tl.int64) * C + c, mask=in_c, other=0.0)
                    gl = tl.load(gfinal_ptr + field + n.to(tl.int64) * C + c, mask=in_c, other=0.0)
        alpha = alphas[i]
        beta = gm * slopes[i]
        if gk_ptr is not None:
            gk_past = alpha + beta
            gw_term = tl.where(in_row, beta - gl * decay, 0.0)
            if initial_ptr is not None:  # what counts an empty state as den = 1 is for num and den alone
                alpha = tl.where(not_empty[i], alpha, 0.0)
                gk_past = tl.where(not_empty[i], gk_past, 0.0)
                gw_term = tl.where(not_empty[i], gw_term, 0.0)
            tl.store(gv_ptr + offset + i * C, gys_now[i] + gm * rs[i], mask=in_row)
            tl.store(gk_ptr + offset + i * C, gk_past + gl * rs[i], mask=in_row)
            gw_block += gw_term
            gu_block += alpha
        else:
            b = decay * b - slopes[i] * a
            a = decay * a
        gl = gl * decay - alphas[i] - beta
        gm = gm * decay + gys_past[i]
        if (seq_ptr is not None) and (ginitial_ptr is not None) and (gk_ptr is not None):
            n = tl.load(seq_ptr + t + i + 1)
            if (end > t + i) & (n != tl.load(seq_ptr + t + i)):
                tl.store(ginitial_ptr + n.to(tl.int64) * C + c, gm, mask=in_c)
                tl.store(ginitial_ptr + field + n.to(tl.int64) * C + c, gl, mask=in_c)
    return gm, gl, a, b, gw + gw_block, gu + gu_block


@triton.jit(do_not_specialize=["N", "T", "chunk"])
def _wkv_bwd_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    gy_ptr,  # [B, T, C]
    checkpoint_ptr,  # [B, blocks, 3, C]
    initial_ptr,  # [3, N, C], where packed sequences start; or None
    seq_ptr,  # int32 [T + 2], or None
    gfinal_ptr,  # [2, N, C], (gm, gl) after every sequence; None: zero
    carry_ptr,  # [2, B * chunks, C], (gm, gl) after every chunk; None: a chunk is a sequence, or a summary is wanted
    gk_ptr,  # [B, T, C]; None: a summary is wanted
    gv_ptr,  # [B, T, C]
    gwu_ptr,  # [2, B * chunks, C], terms of gw and gu; for summaries [4, B * chunks, C], cm, cl, a, b
    ginitial_ptr,  # [2, N, C], (gm, gl) before every sequence; or None
    N,
    T,
    chunk,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,  # tokens a checkpoint, a multiple of ROWS
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = gwu_ptr.dtype.element_ty
    chunks = tl.cdiv(T, chunk)
    row = tl.program_id(0).to(tl.int64)  # of B * chunks
    batch = row // chunks
    begin = (row % chunks).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C) if C % BLOCK_C else tl.full([BLOCK_C], True, tl.int1)
    field = N.to(tl.int64) * C
    carry_field = tl.num_programs(0).to(tl.int64) * C

    w = _load_rate(w_ptr, c, in_c, ACC)
    u = tl.load(u_ptr + c, mask=in_c, other=0.0).to(ACC)
    gm = tl.zeros([BLOCK_C], ACC)
    gl = tl.zeros([BLOCK_C], ACC)
    if carry_ptr is not None:
        gm = tl.load(carry_ptr + row * C + c, mask=in_c, other=0.0)
        gl = tl.load(carry_ptr + carry_field + row * C + c, mask=in_c, other=0.0)
    elif (gfinal_ptr is not None) and (seq_ptr is None) and (gk_ptr is not None):
        gm = tl.load(gfinal_ptr + batch * C + c, mask=in_c, other=0.0)
        gl = tl.load(gfinal_ptr + field + batch * C + c, mask=in_c, other=0.0)
    a = tl.full([BLOCK_C], 1.0, ACC)
    b = tl.zeros([BLOCK_C], ACC)
    gw = tl.zeros([BLOCK_C], ACC)
    gu = tl.zeros([BLOCK_C], ACC)

    checkpoint_ptr += batch * tl.cdiv(T, KEPT) * 3 * C + c
    offset = batch * T * C + c
    for t in range((end - 1) // ROWS * ROWS, begin - 1, -ROWS):
        kept = t // KEPT * KEPT
        num, den, anchor = _load_state(checkpoint_ptr + kept // KEPT * 3 * C, C, in_c)
        age = tl.zeros([BLOCK_C], ACC)
        for s in range(kept, t, ROWS):
            num, den, anchor, age = _fwd_block(
                offset + s * C, w, u, k_ptr, v_ptr, initial_ptr, seq_ptr, None, None, num, den, anchor, age,
                s, end, c, in_c, field, C, ROWS, False,
            )  # fmt: skip
        gm, gl, a, b, gw, gu = _bwd_block(
            offset + t * C, w, u, k_ptr, v_ptr, gy_ptr, initial_ptr, seq_ptr, gfinal_ptr, gk_ptr, gv_ptr, ginitial_ptr,
            num, den, anchor, age, gm, gl, a, b, gw, gu, t, end, c, in_c, field, C, ROWS,
        )  # fmt: skip

    out_ptr = gwu_ptr + row * C + c
    if gk_ptr is None:
        tl.store(out_ptr, gm, mask=in_c)
        tl.store(out_ptr + carry_field, gl, mask=in_c)
        tl.store(out_ptr + 2 * carry_field, a, mask=in_c)
        tl.store(out_ptr + 3 * carry_field, b, mask=in_c)
    else:
        tl.store(out_ptr, gw, mask=in_c)
        tl.store(out_ptr + carry_field, gu, mask=in_c)
        if (ginitial_ptr is not None) and (seq_ptr is None):
            if begin == 0:
                tl.store(ginitial_ptr + batch * C + c, gm, mask=in_c)
                tl.store(ginitial_ptr + field + batch * C + c, gl, mask=in_c)


@triton.jit(do_not_specialize=["N", "chunks"])
def _wkv_bwd_carry_kernel(
    gfinal_ptr,  # [2, N, C], or None
    summary_ptr,  # [4, B * chunks, C]: cm, cl, a, b
    carry_ptr,  # [2, B * chunks, C], written: (gm, gl) after every chunk
    N,
    chunks,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = carry_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    field = tl.num_programs(0).to(tl.int64) * chunks * C

    gm = tl.zeros([BLOCK_C], ACC)
    gl = tl.zeros([BLOCK_C], ACC)
    if gfinal_ptr is not None:
        # In a packed batch the last chunk ends a sequence and takes nothing from here, whatever is read.
        gm = tl.load(gfinal_ptr + b * C + c, mask=in_c, other=0.0)
        gl = tl.load(gfinal_ptr + N.to(tl.int64) * C + b * C + c, mask=in_c, other=0.0)
    for i in range(chunks - 1, -1, -1):
        offset = (b * chunks + i) * C + c
        tl.store(carry_ptr + offset, gm, mask=in_c)
        tl.store(carry_ptr + field + offset, gl, mask=in_c)
        cm = tl.load(summary_ptr + offset, mask=in_c, other=0.0)
        cl = tl.load(summary_ptr + field + offset, mask=in_c, other=0.0)
        past = tl.load(summary_ptr + 2 * field + offset, mask=in_c, other=0.0)
        mixed = tl.load(summary_ptr + 3 * field + offset, mask=in_c, other=0.0)
        gl = past * gl + mixed * gm + cl
        gm = past * gm + cm


@triton.jit(do_not_specialize=["size"])
def _wkv_step_kernel(
    w_ptr,  # [C]
    u_ptr,  # [C]
    k_ptr,  # [B, C]
    v_ptr,  # [B, C]
    num_ptr,  # [B, C]
    den_ptr,  # [B, C]
    max_ptr,  # [B, C]
    y_ptr,  # [B, C]
    state_ptr,  # [3, B, C]
    size,  # B * C
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = state_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    c = i % C
    w = _load_rate(w_ptr, c, inside, ACC)
    u = tl.load(u_ptr + c, mask=inside, other=0.0).to(ACC)
    k = tl.load(k_ptr + i, mask=inside, other=0.0).to(ACC)
    v = tl.load(v_ptr + i, mask=inside, other=0.0).to(ACC)
    num = tl.load(num_ptr + i, mask=inside, other=0.0)
    den = tl.load(den_ptr + i, mask=inside, other=0.0)
    p = tl.load(max_ptr + i, mask=inside, other=0.0)
    p = tl.where(p == -float("inf"), NO_PAST, p)

    d = p - k
    past, now = _weigh(d - u)
    tl.store(y_ptr + i, (past * num + now * v) / tl.maximum(past * den + now, TINY), mask=inside)
    num, den, anchor, age = _absorb(num, den, p, tl.zeros([BLOCK], ACC), d, w, v, 1.0, k, 1.0)
    _store_aged(state_ptr + i, size.to(tl.int64), num, den, anchor, age, w, inside)


def wkv_fwd(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    launch: WKVLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass: y ``[B, T, C]``, final state ``[3, N, C]`` and, with ``save``, the checkpoints."""
    B, T, C = k.shape
    acc = torch.promote_types(torch.promote_types(torch.float32, k.dtype), torch.promote_types(w.dtype, u.dtype))
    launch = launch or _launch(k, acc)
    chunks = triton.cdiv(T, launch.chunk)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(v)
    final = k.new_empty(3, N, C, dtype=acc)
    blocks = triton.cdiv(T, CHECKPOINT_ROWS)
    checkpoints = k.new_empty((B, blocks, 3, C) if save else 0, dtype=acc)
    sequence = None if cu_seqlens is None else _sequence_of_token(cu_seqlens, T)
    w, u = w.contiguous(), u.contiguous()
    grid = (B * chunks, triton.cdiv(C, launch.block_c))
    options = {"C": C, "BLOCK_C": launch.block_c, "num_warps": launch.num_warps}

    with torch.cuda.device_of(k):
        carry = None
        if chunks > 1:
            summary, carry = k.new_empty(2, 3, B * chunks, C, dtype=acc)
            _wkv_fwd_kernel[grid](
                w, u, k, v, initial, None, sequence, None, None, summary, N, T, launch.chunk,
                ROWS=CHECKPOINT_ROWS, **options,
            )  # fmt: skip
            _wkv_carry_kernel[B, grid[1]](w, initial, summary, sequence, carry, N, T, launch.chunk, **options)
        _wkv_fwd_kernel[grid](
            w, u, k, v, initial, carry, sequence, y, checkpoints if save else None, final, N, T, launch.chunk,
            ROWS=CHECKPOINT_ROWS, **options,
        )  # fmt: skip
    return y, final, checkpoints


def wkv_bwd(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    gy: Tensor,
    gfinal: Tensor | None,
    launch: WKVLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward pass: gw, gu, gk, gv and, if there is an initial state, its (gm, gl) ``[2, N, C]``."""
    B, T, C = k.shape
    acc = checkpoints.dtype
    launch = launch or _launch(k, acc)
    chunks = triton.cdiv(T, launch.chunk)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gk, gv = torch.empty_like(k), torch.empty_like(v)
    gwu = k.new_empty(2, B * chunks, C, dtype=acc)
    ginitial = k.new_empty((2, N, C) if initial is not None else 0, dtype=acc)
    sequence = None if cu_seqlens is None else _sequence_of_token(cu_seqlens, T)
    rates = (w.contiguous(), u.contiguous())
    grid = (B * chunks, triton.cdiv(C, launch.block_c))
    options = {"C": C, "BLOCK_C": launch.block_c, "num_warps": launch.num_warps}
    rows = {"ROWS": BACKWARD_ROWS, "KEPT": CHECKPOINT_ROWS}
    inputs = (*rates, k, v, gy, checkpoints, initial, sequence, gfinal)

    with torch.cuda.device_of(k):
        carry = None
        if chunks > 1:
            summary = k.new_empty(4, B * chunks, C, dtype=acc)
            carry = k.new_empty(2, B * chunks, C, dtype=acc)
            _wkv_bwd_kernel[grid](*inputs, None, None, None, summary, None, N, T, launch.chunk, **rows, **options)
            _wkv_bwd_carry_kernel[B, grid[1]](gfinal, summary, carry, N, chunks, **options)
        _wkv_bwd_kernel[grid](
            *inputs, carry, gk, gv, gwu, None if initial is None else ginitial, N, T, launch.chunk, **rows, **options
        )
        gw, gu = gwu.sum(1)
    return gw.to(w.dtype), gu.to(u.dtype), gk, gv, ginitial


def wkv_step(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, num: Tensor, den: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Run one token: y ``[B, C]`` and the packed state ``[3, B, C]``."""
    y = torch.empty_like(v)
    state = num.new_empty(3, *num.shape)
    block = 128
    with torch.cuda.device_of(k):
        _wkv_step_kernel[(triton.cdiv(k.numel(), block),)](
            w.contiguous(), u.contiguous(), k, v, num, den, scale, y, state, k.numel(), k.shape[1], BLOCK=block
        )
    return y, state


def _launch(k: Tensor, acc: torch.dtype) -> WKVLaunch:
    multiprocessors = torch.cuda.get_device_properties(k.device).multi_processor_count if k.is_cuda else 1
    return wkv_launch(*k.shape, multiprocessors, acc.itemsize)


def _sequence_of_token(cu_seqlens: Tensor, T: int) -> Tensor:
    """Return the sequence that each token belongs to, with -1 before the first and after the last token."""
    tokens = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:], tokens, right=True, out_int32=True)
    # Offsets on a GPU are not checked: whatever they are, no sequence beyond the last is read or written.
    return torch.nn.functional.pad(sequence.clamp_(max=cu_seqlens.shape[0] - 2), (1, 1), value=-1)
