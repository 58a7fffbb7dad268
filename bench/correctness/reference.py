"""Both operators in float64 on whole tensors, on any device: fastwkv.reference without its loop over tokens.

Both are associative. So a token's result is made of windows that double: a window of 2 d tokens is the one of the last
d after the one of the d before, and after log2 T rounds each has the whole past. Autograd differentiates it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """WKV's state by what it means, ``[N, C]``: the mean of past values and the log of their total weight."""

    mean: Tensor
    log_weight: Tensor


def linear_scan(
    a: Tensor, x: Tensor, initial: Tensor | None, offsets: Sequence[int] | None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Return h ``[B, T, C]`` and the final states ``[N, C]``."""
    first = None if initial is None else (initial,)
    h, (state,) = _sequences(partial(_scan, reverse), (a.expand(x.shape), x), first, offsets)
    return h, state


def wkv(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial: State | None, offsets: Sequence[int] | None
) -> tuple[Tensor, State]:
    """Return y ``[B, T, C]`` and the final states."""
    y, state = _sequences(partial(_wkv, w, u), (k, v), initial, offsets)
    return y, State(*state)


def _sequences(
    one: Callable[..., Any],
    streams: Sequence[Tensor],
    initial: tuple[Tensor, ...] | None,
    offsets: Sequence[int] | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run an operator on the batch, or on each of the packed sequences."""
    if offsets is None:
        return one(*streams, initial)
    found = []
    for n, (begin, end) in enumerate(pairwise(offsets)):
        first = None if initial is None else tuple(field[n : n + 1] for field in initial)
        found.append(one(*(t[:, begin:end] for t in streams), first))
    outputs, states = zip(*found, strict=True)
    return torch.cat(outputs, 1), tuple(map(torch.cat, zip(*states, strict=True)))


def _scan(reverse: bool, a: Tensor, x: Tensor, initial: tuple[Tensor] | None) -> tuple[Tensor, tuple[Tensor]]:
    if reverse:
        a, x = a.flip(1), x.flip(1)
    d, T = 1, x.shape[1]
    while d < T:
        x = torch.cat((x[:, :d], x[:, d:] + a[:, d:] * x[:, :-d]), 1)
        a = torch.cat((a[:, :d], a[:, d:] * a[:, :-d]), 1)
        d *= 2
    h = x if initial is None else x + a * initial[0][:, None]
    return (h.flip(1) if reverse else h), (h[:, -1],)


def _wkv(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Windows are (num, den) at the scale e^p; the state is the token before the first, of weight e^log_weight."""
    num, den, p = v, torch.ones_like(v), k
    if initial is not None:
        mean, log_weight = initial
        num = torch.cat((mean[:, None], num), 1)
        den = torch.cat((torch.ones_like(den[:, :1]), den), 1)
        p = torch.cat((log_weight[:, None], p), 1)
    d = 1
    while d < num.shape[1]:
        aged, mine = p[:, :-d] - d * w, p[:, d:]
        top = torch.maximum(aged, mine).detach()
        past, now = torch.exp(aged - top), torch.exp(mine - top)
        num = torch.cat((num[:, :d], past * num[:, :-d] + now * num[:, d:]), 1)
        den = torch.cat((den[:, :d], past * den[:, :-d] + now * den[:, d:]), 1)
        p = torch.cat((p[:, :d], top), 1)
        d *= 2
    mean, log_weight = num / den, p + torch.log(den)
    # The output adds its own token, of log weight u + k, to the state before it, which the first has only if one is
    # given.
    with_past = slice(None) if initial is not None else slice(1, None)
    share = torch.sigmoid(log_weight[:, :-1] - (u + k[:, with_past]))
    y = share * mean[:, :-1] + (1 - share) * v[:, with_past]
    y = y if initial is not None else torch.cat((v[:, :1], y), 1)
    return y, (mean[:, -1], log_weight[:, -1])


def relative_errors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Return ‖found - wanted‖₂ / ‖wanted‖₂ of each, not finite if a result is not.

    Computed where the tensors are, and waited for once: where many processes share a device, each wait is a long one.
    """
    norms = []
    for name in wanted:
        one, other = (t.detach().to(torch.promote_types(t.dtype, torch.float64)) for t in (found[name], wanted[name]))
        if one.shape != other.shape or one.is_complex() != other.is_complex():
            described = (f"{list(t.shape)} {t.dtype}" for t in (other, one))
            raise ValueError("{}: expected {}, got {}".format(name, *described))
        norms += [torch.linalg.vector_norm(one - other), torch.linalg.vector_norm(other)]
    values = torch.stack(norms).tolist()
    pairs = zip(values[::2], values[1::2], strict=True)
    return {name: error / size if size else error for name, (error, size) in zip(wanted, pairs, strict=True)}
