"""WKV: the public functions."""

from typing import Literal, overload

import torch
from torch import Tensor

from fastwkv.kernels.launch import accumulation_dtype
from fastwkv.ops import checks
from fastwkv.ops import wkv_registration as registered
from fastwkv.ops.derivatives import apply, differentiated, in_forward_mode
from fastwkv.ops.packing import edges_of
from fastwkv.ops.time_decay import decay_rate
from fastwkv.ops.wkv_autograd import WKV, DualWKV
from fastwkv.reference.wkv import WKVState, required


@overload
def wkv(
    w: Tensor | None = None,
    u: Tensor = ...,
    k: Tensor = ...,
    v: Tensor = ...,
    initial_state: WKVState | None = None,
    *,
    time_decay: Tensor | None = None,
    return_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor: ...


@overload
def wkv(
    w: Tensor | None = None,
    u: Tensor = ...,
    k: Tensor = ...,
    v: Tensor = ...,
    initial_state: WKVState | None = None,
    *,
    time_decay: Tensor | None = None,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, WKVState]: ...


@overload
def wkv(
    w: Tensor | None = None,
    u: Tensor = ...,
    k: Tensor = ...,
    v: Tensor = ...,
    initial_state: WKVState | None = None,
    *,
    time_decay: Tensor | None = None,
    return_state: bool,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, WKVState]: ...


def wkv(
    w: Tensor | None = None,
    u: Tensor = required,
    k: Tensor = required,
    v: Tensor = required,
    initial_state: WKVState | None = None,
    *,
    time_decay: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, WKVState]:
    """The WKV operator of RWKV-4: a mean of all past values whose weights decay by exp(-w) a step.

    Per channel, for t = 0 ... T-1::

        y_t = ( Σ_{i<t} exp(k_i - (t-1-i) w) v_i + exp(u + k_t) v_t )
            / ( Σ_{i<t} exp(k_i - (t-1-i) w)     + exp(u + k_t)     )

    Sums and states are float32 for all inputs but float64 (float64 if any input is float64). No exponential overflows
    for any finite w, u, k; a sum of values must fit that dtype. ``k = -inf`` marks an absent token: it has no weight,
    yet the past decays over it. If no token has any weight, y is 0. Exponents have the range of float32, in float64
    too: a rate beyond ±1e29 counts as ±1e29, in the final state as well, and a key below -3.4e38 marks an absent token.
    Two runs give the same bits.

    Gradients reach w, u, k, v and the initial state, from y and from the final state. A second derivative and forward
    mode are not supported: they raise RuntimeError. ``torch.func.vmap`` over any argument is one call over more rows or
    channels; mapped ``cu_seqlens`` are one call each.

    Args:
        w: the decay rate in nats a step, ``[C]``, of any finite value. Checkpoints store its logarithm, which is not to
            be given here: see ``time_decay``. None, or left out, if that is given.
        u: the bonus of the current token, ``[C]``.
        k: the keys, ``[B, T, C]``. T and C need not be multiples of anything.
        v: the values, ``[B, T, C]``, of the dtype of k.
        initial_state: the state before the first token; empty if None, or where num = den = 0. It has one row a
            sequence: ``[B, C]``, or ``[N, C]`` with ``cu_seqlens``.
        time_decay: the logarithm of the decay rate, ``w = exp(time_decay)``, ``[C]``, which RWKV-4 stores:
            ``wkv(u=u, k=k, v=v, time_decay=time_decay)``. The exponential is taken in the dtype of the sums. -inf makes
            w = 0; where w would overflow, nothing is left of the past, and the gradient is 0.
        return_state: whether to return the state after the last token of every sequence too.
        cu_seqlens: int32 or int64 ``[N + 1]``, for N sequences packed into a batch of one: sequence n holds the
            tokens ``cu_seqlens[n] ... cu_seqlens[n + 1] - 1``. Offsets run from 0 to T without decreasing. A sequence
            may be empty: then its final state is its initial state, and gradients pass through. Offsets on the CPU are
            checked. The host does not wait for offsets on a GPU. If they are wrong there, y and the gradients are NaN
            at tokens of no sequence and of sequences beyond the T tokens, the states of such sequences are NaN, and so
            are the gradients of w and u, which are sums over tokens; with ``FASTWKV_CHECK_OFFSETS=1`` in the
            environment the device asserts the offsets. The padding of a fixed T is best a last sequence of its own.

    Each of w (or time_decay), u and k with v may be float32, float64, bfloat16 or float16.

    Returns:
        y ``[B, T, C]`` of the dtype of v; with ``return_state`` also the final :class:`WKVState`.

    Raises:
        TypeError: an argument is not a dense tensor of a dtype that is listed here, or not a bool; or not exactly one
            of w and time_decay is given.
        ValueError: a shape, device or offset does not fit the others.

    Source: "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048, equation 16.

    """
    checks.check_bool(return_state=return_state)
    w = _one_of(w, time_decay)
    if time_decay is None:
        checks.check_floating(w=w, u=u, k=k, v=v)
    else:
        checks.check_floating(time_decay=time_decay, u=u, k=k, v=v)
    checks.check_rank("B T C", k=k)
    B, T, C = k.shape
    checks.check_shape("B T C", (B, T, C), v=v)
    checks.check_dtype(k.dtype, "like k", v=v)
    if time_decay is not None:
        checks.check_shape("C", (C,), time_decay=time_decay)
        w = decay_rate(time_decay, accumulation_dtype(time_decay, u, k, v))
    checks.check_shape("C", (C,), w=w, u=u)
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
        y, final, _ = registered.wkv_fwd(w, u, k, v, packed, cu_seqlens, False)
    return (y, WKVState(*final.unbind(0))) if return_state else y


def wkv_step(
    w: Tensor | None = None,
    u: Tensor = required,
    k_t: Tensor = required,
    v_t: Tensor = required,
    state: WKVState = required,
    *,
    time_decay: Tensor | None = None,
) -> tuple[Tensor, WKVState]:
    """One token of :func:`wkv`: the same numbers, for sequences that arrive a token at a time.

    Args:
        w: the decay rate, ``[C]``, as in :func:`wkv`.
        u: the bonus of the current token, ``[C]``.
        k_t: the key of this token, ``[B, C]``.
        v_t: the value of this token, ``[B, C]``, of the dtype of k_t.
        state: the state before this token, each field ``[B, C]``.
        time_decay: the logarithm of w, ``[C]``, in its place, as in :func:`wkv`.

    Returns:
        y_t ``[B, C]`` of the dtype of v_t, and the state after this token.

    Raises:
        TypeError: as for :func:`wkv`.
        ValueError: as for :func:`wkv`.

    """
    w = _one_of(w, time_decay)
    if time_decay is None:
        checks.check_floating(w=w, u=u, k_t=k_t, v_t=v_t)
    else:
        checks.check_floating(time_decay=time_decay, u=u, k_t=k_t, v_t=v_t)
    checks.check_rank("B C", k_t=k_t)
    B, C = k_t.shape
    checks.check_shape("B C", (B, C), v_t=v_t)
    checks.check_dtype(k_t.dtype, "like k_t", v_t=v_t)
    if time_decay is not None:
        checks.check_shape("C", (C,), time_decay=time_decay)
        w = decay_rate(time_decay, accumulation_dtype(time_decay, u, k_t, v_t))
    checks.check_shape("C", (C,), w=w, u=u)
    _check_state(state, "B C", B, w, u, k_t, v_t)
    if differentiated([w, u, k_t, v_t, *state]):
        y, final = wkv(w, u, k_t[:, None], v_t[:, None], state, return_state=True)
        return y[:, 0], final
    k_t, v_t, num, den, scale = (t.contiguous() for t in (k_t, v_t, *state))
    y_t, final = registered.wkv_step(w, u, k_t, v_t, num, den, scale)
    return y_t, WKVState(*final.unbind(0))


def _one_of(w: Tensor | None, time_decay: Tensor | None) -> Tensor:
    if w is not None and time_decay is None:
        return w
    if w is None and time_decay is not None:
        return time_decay
    raise TypeError(f"give one of w and time_decay (w = exp(time_decay)), got {'neither' if w is None else 'both'}")


def _check_state(state: WKVState, dims: str, rows: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> None:
    if not isinstance(state, tuple) or len(state) != 3:
        raise TypeError(f"the state must be a WKVState(num, den, max), got {type(state).__name__}")
    num, den, scale = state
    checks.check_floating(k=k, num=num, den=den, max=scale)
    checks.check_shape(dims, (rows, k.shape[-1]), num=num, den=den, max=scale)
    dtype = accumulation_dtype(w, u, k, v)
    checks.check_dtype(dtype, "(states are float32, float64 beside a float64 input)", num=num, den=den, max=scale)
