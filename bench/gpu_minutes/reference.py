"""Both operators in float64 on whole tensors, on any device: fastwkv.reference without its loop over tokens.

Both are associative. So a token's result is made of windows that double: a window of 2 d tokens is the one of the last
d after the one of the d before, and after log2 T rounds each has the whole past. Autograd differentiates it.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
    a = a.expand(x.shape)
    if offsets is None:
        return _scan(a, x, initial, reverse)
    pieces, states = [], []
    for n, (begin, end) in enumerate(itertools.pairwise(offsets)):
        first = None if initial is None else initial[n : n + 1]
        h, state = _scan(a[:, begin:end], x[:, begin:end], first, reverse)
        pieces.append(h)
        states.append(state)
    return torch.cat(pieces, 1), torch.cat(states)


def _scan(a: Tensor, x: Tensor, initial: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    if reverse:
        a, x = a.flip(1), x.flip(1)
    d, T = 1, x.shape[1]
    while d < T:
        x = torch.cat((x[:, :d], x[:, d:] + a[:, d:] * x[:, :-d]), 1)
        a = torch.cat((a[:, :d], a[:, d:] * a[:, :-d]), 1)
        d *= 2
    h = x if initial is None else x + a * initial[:, None]
    state = h[:, -1]
    return (h.flip(1) if reverse else h), state


def wkv(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial: State | None, offsets: Sequence[int] | None
) -> tuple[Tensor, State]:
    """Return y ``[B, T, C]`` and the final states."""
    if offsets is None:
        return _wkv(w, u, k, v, initial)
    pieces, means, weights = [], [], []
    for n, (begin, end) in enumerate(itertools.pairwise(offsets)):
        first = None if initial is None else State(*(field[n : n + 1] for field in initial))
        y, state = _wkv(w, u, k[:, begin:end], v[:, begin:end], first)
        pieces.append(y)
        means.append(state.mean)
        weights.append(state.log_weight)
    return torch.cat(pieces, 1), State(torch.cat(means), torch.cat(weights))


def _wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial: State | None) -> tuple[Tensor, State]:
    """Windows are (num, den) at the scale e^p; the state is the token before the first, of weight e^log_weight."""
    T = k.shape[1]
    num, den, p = v, torch.ones_like(v), k
    if initial is not None:
        num = torch.cat((initial.mean[:, None], num), 1)
        den = torch.cat((torch.ones_like(den[:, :1]), den), 1)
        p = torch.cat((initial.log_weight[:, None], p), 1)
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
    # The output adds its own token, of log weight u + k, to the state before it.
    if initial is None:
        before, gap = mean[:, :-1], log_weight[:, :-1] - (u + k[:, 1:])
        share = torch.sigmoid(gap)  # of the past
        y = torch.cat((v[:, :1], share * before + (1 - share) * v[:, 1:]), 1)
    else:
        share = torch.sigmoid(log_weight[:, :T] - (u + k))
        y = share * mean[:, :T] + (1 - share) * v
    return y, State(mean[:, -1], log_weight[:, -1])


def relative_errors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Return ‖found - wanted‖₂ / ‖wanted‖₂ of each, not finite if a result is not.

    Computed where the tensors are, and waited for once: where many processes share a device, each wait is a long one.
    """
    norms = []
    for name in wanted:
        one, other = (t.detach().to(torch.promote_types(t.dtype, torch.float64)) for t in (found[name], wanted[name]))
        if one.shape != other.shape or one.is_complex() != other.is_complex():
            raise ValueError(f"{name}: expected {_described(other)}, got {_described(one)}")
        norms += [torch.linalg.vector_norm(one - other), torch.linalg.vector_norm(other)]
    values = torch.stack(norms).tolist()
    pairs = zip(values[::2], values[1::2], strict=True)
    return {name: error / size if size else error for name, (error, size) in zip(wanted, pairs, strict=True)}


def _described(t: Tensor) -> str:
    return f"{list(t.shape)} {t.dtype}"
