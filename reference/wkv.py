"""WKV by definition, and the same by a stable loop. Differentiated by PyTorch's autograd.

Source: "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048, equations 16 and 19-22.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

required: Any = None  # the default of an argument that must be given, but stands behind one that may be left out


class WKVState(NamedTuple):
    """What WKV remembers of the tokens i read so far, per channel.

    ``num * exp(max) = Σ exp(k_i - age_i * w) v_i`` and ``den * exp(max) = Σ exp(k_i - age_i * w)``, where the age of
    the newest token is 0. The empty state is ``num = den = 0``, whatever ``max`` is; tokens leave -inf there. A state
    that is learned may begin as zeros: num and den have gradients there, in proportion to ``exp(max)``. Each field is
    ``[B, C]`` (``[N, C]`` for N packed sequences), float32, or float64 where an input of the operator is float64.

    ``max`` is a choice of scale: as an input it has a gradient, as an output it is a constant.
    """

    num: Tensor
    den: Tensor
    max: Tensor


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
    """WKV by definition, in O(T²): every output is one weighted mean over all its past.

    The logarithm of the weight of token i in output t is ``k_i - (t-1-i) w`` for i < t and ``u + k_t`` for i = t; the
    initial state takes part as one more token, of logarithm ``max - t w``. Shapes, dtypes and results are those of
    :func:`fastwkv.wkv`.
    """
    w = _rate(w, time_decay, u, k, v)
    return _per_sequence(_wkv_definition, w, u, k, v, initial_state, return_state, cu_seqlens)


def wkv_loop(
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
    """The same as :func:`wkv` in O(T): the state is carried from token to token and rescaled to its largest term."""
    w = _rate(w, time_decay, u, k, v)
    return _per_sequence(_wkv_recurrence, w, u, k, v, initial_state, return_state, cu_seqlens)


def _rate(w: Tensor | None, time_decay: Tensor | None, *others: Tensor) -> Tensor:
    if time_decay is None:
        assert w is not None, "give w or time_decay"
        return w
    assert w is None, "give w or time_decay, not both"
    time_decay = time_decay.to(_dtype_of_sums(time_decay, *others))
    # An infinite rate would have a gradient of 0 times infinity. The largest finite one forgets as much, and is fixed.
    overflows = time_decay.exp() == torch.inf
    rate = torch.where(overflows, 0, time_decay).exp()
    return torch.where(overflows, torch.finfo(rate.dtype).max, rate)


def _dtype_of_sums(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32


def _wkv_definition(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: WKVState) -> tuple[Tensor, WKVState]:
    T = k.shape[1]
    step = torch.arange(T + 1, device=k.device, dtype=k.dtype)
    age = (step[:, None] - 1 - step[None, :T])[..., None]  # of token i at output t; row T stands for the final state
    log_weight = k[:, None] - torch.where(age > 0, age * w, 0)  # [B, T+1, T, C]
    log_weight = torch.where(age == -1, log_weight + u, log_weight)
    log_weight = torch.where(age < -1, -torch.inf, log_weight)
    log_past = state.max[:, None] - torch.where(step > 0, step, 0)[:, None] * w  # [B, T+1, C]

    scale = _finite(torch.maximum(log_weight.amax(2), log_past)).detach()
    weight = torch.exp(log_weight - scale[:, :, None])
    past = torch.exp(log_past - scale)
    num = torch.einsum("btic,bic->btc", weight, v) + past * state.num[:, None]
    den = weight.sum(2) + past * state.den[:, None]
    return _ratio(num[:, :T], den[:, :T]), _normalised(num[:, T], den[:, T], scale[:, T])


def _wkv_recurrence(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: WKVState) -> tuple[Tensor, WKVState]:
    num, den, scale = _constant_scale(state)
    outputs = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1), strict=True):
        top = _finite(torch.maximum(scale, u + k_t)).detach()
        past, now = torch.exp(scale - top), torch.exp(u + k_t - top)
        outputs.append(_ratio(past * num + now * v_t, past * den + now))

        top = _finite(torch.maximum(scale - w, k_t)).detach()
        past, now = torch.exp(scale - w - top), torch.exp(k_t - top)
        num, den, scale = past * num + now * v_t, past * den + now, top
    return torch.stack(outputs, 1), _normalised(num, den, scale)


def _constant_scale(state: WKVState) -> WKVState:
    # The scale is a constant from here on: what depends on max as an input is moved into num and den.
    scale = state.max.detach()
    moved = torch.exp(torch.where(scale > -torch.inf, state.max - scale, 0))
    return WKVState(state.num * moved, state.den * moved, scale)


def _finite(scale: Tensor) -> Tensor:
    # Where nothing has any weight, every scale will do; -inf would make -inf - -inf.
    return torch.where(scale == -torch.inf, 0, scale)


def _ratio(num: Tensor, den: Tensor) -> Tensor:
    return torch.where(den == 0, 0, num / torch.where(den == 0, 1, den))


def _normalised(num: Tensor, den: Tensor, scale: Tensor) -> WKVState:
    return WKVState(num, den, torch.where(den == 0, -torch.inf, scale))


def _per_sequence(
    recurrence: Callable[[Tensor, Tensor, Tensor, Tensor, WKVState], tuple[Tensor, WKVState]],
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: WKVState | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> Tensor | tuple[Tensor, WKVState]:
    dtype = _dtype_of_sums(w, u, k, v)
    w, u, keys, values = (t.to(dtype) for t in (w, u, k, v))
    bounds = [0, k.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        rows = k.shape[0] if cu_seqlens is None else len(bounds) - 1
        empty = torch.zeros(rows, k.shape[2], dtype=dtype, device=k.device)
        initial_state = WKVState(empty, empty, torch.full_like(empty, -torch.inf))
    outputs, states = [], []
    for n in range(len(bounds) - 1):
        state = initial_state if cu_seqlens is None else WKVState(*(s[n : n + 1] for s in initial_state))
        piece = slice(bounds[n], bounds[n + 1])
        if bounds[n] < bounds[n + 1]:
            y, state = recurrence(w, u, keys[:, piece], values[:, piece], state)
            outputs.append(y)
        else:
            state = _normalised(*_constant_scale(state))
        states.append(state)
    y = torch.cat(outputs, 1).to(v.dtype)
    if not return_state:
        return y
    return y, WKVState(*(torch.cat(field) for field in zip(*states, strict=True)))
