"""WKV: the public functions and their registration."""

from typing import Literal, overload

import torch
from torch import Tensor

from fastwkv.kernels.launch import accumulation_dtype, checkpoint_shape
from fastwkv.ops import checks
from fastwkv.ops.derivatives import apply, differentiated, in_forward_mode
from fastwkv.ops.library import register
from fastwkv.ops.packing import edges_of
from fastwkv.ops.wkv_autograd import WKV, DualWKV
from fastwkv.reference.wkv import WKVState


@overload
def wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: WKVState | None = None,
    *,
    return_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor: ...


@overload
def wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: WKVState | None = None,
    *,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, WKVState]: ...


def wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: WKVState | None = None,
    *,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, WKVState]:
    """The WKV operator of RWKV-4: a mean of all past values whose weights decay by exp(-w) a step.

    Per channel, for t = 0 ... T-1::

        y_t = ( Σ_{i<t} exp(k_i - (t-1-i) w) v_i + exp(u + k_t) v_t )
            / ( Σ_{i<t} exp(k_i - (t-1-i) w)     + exp(u + k_t)     )

    Sums and states are float32, whatever the inputs (float64 if any input is float64). No exponential overflows for
    any finite w, u, k; a sum of values must fit that dtype. ``k = -inf`` marks an absent token: it has no weight, yet
    the past decays over it. Where nothing has any weight y is 0. Two runs give the same bits. Gradients reach w, u, k,
    v and the initial state, from y and from the final state; a second derivative and forward mode are not supported,
    and say so. ``torch.func.vmap`` over any argument is one call over more rows or channels; mapped ``cu_seqlens`` are
    one call each.

    Args:
        w: ``[C]``, decay rate in nats a step; any finite value. Checkpoints that store ``time_decay`` have
            ``w = exp(time_decay)``.
        u: ``[C]``, bonus of the current token.
        k: ``[B, T, C]``, keys. T and C need not be multiples of anything.
        v: ``[B, T, C]``, values, of the dtype of k.
        initial_state: state before the first token; empty if None. One row a sequence: ``[B, C]``, or ``[N, C]``
            with ``cu_seqlens``.
        return_state: return the state after the last token of every sequence too.
        cu_seqlens: int32 or int64 ``[N + 1]``, for N sequences packed into a batch of one: sequence n holds the
            tokens ``cu_seqlens[n] ... cu_seqlens[n + 1] - 1``.

    Each of w, u and k with v may be float32, float64, bfloat16 or float16.

    Returns:
        y ``[B, T, C]`` of the dtype of v; with ``return_state`` also the final :class:`WKVState`.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that is not listed here.
        ValueError: a shape, device or offset does not fit the others.

    Source: "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048, equation 16.

    """
    checks.check_floating(w=w, u=u, k=k, v=v)
    checks.check_rank("B T C", k=k)
    B, T, C = k.shape
    checks.check_shape("B T C", (B, T, C), v=v)
    checks.check_shape("C", (C,), w=w, u=u)
    checks.check_dtype(k.dtype, "like k", v=v)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, B, T)
        checks.check_device(k=k, cu_seqlens=cu_seqlens)
    packed = None
    if initial_state is not None:
        dims, rows = ("B C", B) if cu_seqlens is None else ("N C", cu_seqlens.numel() - 1)
        _check_state(initial_state, dims, rows, w, u, k, v)
        packed = torch.stack(tuple(initial_state))
    k, v = k.contiguous(), v.contiguous()

    inputs = [w, u, k, v] if packed is None else [w, u, k, v, packed]
    if differentiated(inputs):
        y, final, _ = apply(
            DualWKV if in_forward_mode() else WKV, w, u, k, v, packed, cu_seqlens, edges_of(cu_seqlens, T)
        )
    else:
        y, final, _ = torch.ops.fastwkv.wkv_fwd(w, u, k, v, packed, cu_seqlens, False)
    return (y, WKVState(*final.unbind(0))) if return_state else y


def wkv_step(w: Tensor, u: Tensor, k_t: Tensor, v_t: Tensor, state: WKVState) -> tuple[Tensor, WKVState]:
    """One token of :func:`wkv`: the same numbers, for text that arrives a token at a time.

    Args:
        w, u: ``[C]``, as in :func:`wkv`.
        k_t, v_t: ``[B, C]``, key and value of this token.
        state: what came before, ``[B, C]`` a field.

    Returns:
        y_t ``[B, C]`` of the dtype of v_t, and the state after this token.

    """
    checks.check_floating(w=w, u=u, k_t=k_t, v_t=v_t)
    checks.check_rank("B C", k_t=k_t)
    B, C = k_t.shape
    checks.check_shape("B C", (B, C), v_t=v_t)
    checks.check_shape("C", (C,), w=w, u=u)
    checks.check_dtype(k_t.dtype, "like k_t", v_t=v_t)
    _check_state(state, "B C", B, w, u, k_t, v_t)
    if differentiated([w, u, k_t, v_t, *state]):
        y, final = wkv(w, u, k_t[:, None], v_t[:, None], state, return_state=True)
        return y[:, 0], final
    k_t, v_t, num, den, scale = (t.contiguous() for t in (k_t, v_t, *state))
    y_t, final = torch.ops.fastwkv.wkv_step(w, u, k_t, v_t, num, den, scale)
    return y_t, WKVState(*final.unbind(0))


def _check_state(state: WKVState, dims: str, rows: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> None:
    if not isinstance(state, tuple) or len(state) != 3:
        raise TypeError(f"the state must be a WKVState(num, den, max), got {type(state).__name__}")
    num, den, scale = state
    checks.check_floating(k=k, num=num, den=den, max=scale)
    checks.check_shape(dims, (rows, k.shape[-1]), num=num, den=den, max=scale)
    dtype = accumulation_dtype(w, u, k, v)
    checks.check_dtype(dtype, "(states are float32, float64 beside a float64 input)", num=num, den=den, max=scale)


def _wkv_fwd_fake(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    edges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, C = k.shape
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = accumulation_dtype(w, u, k, v)
    checkpoints = k.new_empty(checkpoint_shape(B, T, C, dtype) if save else (0,), dtype=dtype)
    return torch.empty_like(v), k.new_empty((3, rows, C), dtype=dtype), checkpoints


def _wkv_bwd_fake(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    gy: Tensor,
    gfinal: Tensor | None,
    edges: Tensor | None = None,
) -> tuple[Tensor, ...]:
    ginitial = checkpoints.new_empty(0) if initial is None else initial.new_empty(2, *initial.shape[1:])
    return torch.empty_like(w), torch.empty_like(u), torch.empty_like(k), torch.empty_like(v), ginitial


def _wkv_step_fake(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, num: Tensor, den: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), num.new_empty((3, *num.shape))


register(
    "wkv_fwd(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? initial, Tensor? cu_seqlens, bool save,"
    " Tensor? edges=None) -> (Tensor, Tensor, Tensor)",
    "wkv",
    _wkv_fwd_fake,
)
register(
    "wkv_bwd(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? initial, Tensor? cu_seqlens, Tensor checkpoints,"
    " Tensor gy, Tensor? gfinal, Tensor? edges=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "wkv_bwd",
    _wkv_bwd_fake,
)
register(
    "wkv_step(Tensor w, Tensor u, Tensor k, Tensor v, Tensor num, Tensor den, Tensor max) -> (Tensor, Tensor)",
    "wkv_step",
    _wkv_step_fake,
)
