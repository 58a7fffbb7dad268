"""WKV: the public functions."""

from typing import Literal, overload

import torch
from torch import Tensor

from fastwkv.kernels.launch import accumulation_dtype
from fastwkv.ops import checks, wkv_registration  # noqa: F401 (registers what is called below)
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

    Sums and states are float32, whatever the inputs (float64 if any input is float64). No exponential overflows for
    any finite w, u, k; a sum of values must fit that dtype. ``k = -inf`` marks an absent token: it has no weight, yet
    the past decays over it. Where nothing has any weight y is 0. Exponents end where float32 does, in float64 too: a
    rate beyond ±1e29 is taken for ±1e29, and so it is in the final state, and a key below -3.4e38 for an absent token.
    Two runs give the same bits.

    Gradients reach w, u, k, v and the initial state, from y and from the final state; a second derivative and forward
    mode are not supported, and say so. ``torch.func.vmap`` over any argument is one call over more rows or channels;
    mapped ``cu_seqlens`` are one call each.

    Args:
        w: ``[C]``, decay rate in nats a step; any finite value. What checkpoints store is its logarithm, and is not to
            be given here: see ``time_decay``. None, or left out, if that is given.
        u: ``[C]``, bonus of the current token.
        k: ``[B, T, C]``, keys. T and C need not be multiples of anything.
        v: ``[B, T, C]``, values, of the dtype of k.
        initial_state: state before the first token; empty if None, or where num = den = 0. One row a sequence:
            ``[B, C]``, or ``[N, C]`` with ``cu_seqlens``.
        time_decay: ``[C]``, the decay rate as ``w = exp(time_decay)``, which is how RWKV-4 stores it:
            ``wkv(u=u, k=k, v=v, time_decay=time_decay)``. The exponential is taken in the dtype of the sums. -inf makes
            w = 0; where w would overflow, nothing is left of the past, and the gradient is 0.
        return_state: return the state after the last token of every sequence too.
        cu_seqlens: int32 or int64 ``[N + 1]``, for N sequences packed into a batch of one: sequence n holds the
            tokens ``cu_seqlens[n] ... cu_seqlens[n + 1] - 1``. Offsets go from 0 to T and never fall; a sequence may
            be empty, and then its final state is its initial state, and gradients go through. On the CPU offsets are
            checked. On a GPU the host does not wait for them: tokens of sequences that do not lie within the T tokens,
            and tokens of none, have NaN in y and in their gradients, such sequences in their states; w and u, whose
            gradients are sums over tokens, in theirs. With ``FASTWKV_CHECK_OFFSETS=1`` in the environment the device
            asserts. Where a fixed T is padded, the padding is best a last sequence of its own.

    Each of w (or time_decay), u and k with v may be float32, float64, bfloat16 or float16.

    Returns:
        y ``[B, T, C]`` of the dtype of v; with ``return_state`` also the final :class:`WKVState`.

    Raises:
        TypeError: an argument is no dense tensor, of a dtype that is not listed here, or no bool; or not one of w and
            time_decay is given.
        ValueError: a shape, device or offset does not fit the others.

    Source: "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048, equation 16.

    """
    checks.check_bool(return_state=return_state)
    w = _given(w, time_decay)
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
        y, final, _ = torch.ops.fastwkv.wkv_fwd(w, u, k, v, packed, cu_seqlens, False)
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
    """One token of :func:`wkv`: the same numbers, for text that arrives a token at a time.

    Args:
        w, u: ``[C]``, as in :func:`wkv`.
        k_t, v_t: ``[B, C]``, key and value of this token.
        state: what came before, ``[B, C]`` a field.
        time_decay: ``[C]``, in the place of w, as in :func:`wkv`.

    Returns:
        y_t ``[B, C]`` of the dtype of v_t, and the state after this token.

    Raises:
        TypeError, ValueError: as :func:`wkv`.

    """
    w = _given(w, time_decay)
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
    y_t, final = torch.ops.fastwkv.wkv_step(w, u, k_t, v_t, num, den, scale)
    return y_t, WKVState(*final.unbind(0))


def _given(w: Tensor | None, time_decay: Tensor | None) -> Tensor:
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
