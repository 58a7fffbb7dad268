"""The states that sequences of WKV start from on the CPU; kernels/wkv_entry.py says what is done to them, and why."""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.notation import LN2, MAX_RATE, NEAR, RAISED_BITS_FLOAT32, RAISED_BITS_FLOAT64


def entry_states(w: Tensor, u: Tensor, k: Tensor, initial: Tensor, bounds: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Return states ``[3, N, C]`` whose exponents leave room for the first tokens, and their lifts.

    Usually none of them has to be changed. Then the states come back as they are, and the second result is None.
    """
    num, den, p = initial
    bits = RAISED_BITS_FLOAT64 if initial.dtype == torch.float64 else RAISED_BITS_FLOAT32
    odd = (den < 0.5**bits) & (p > -torch.inf)
    if not odd.any():
        return initial, None
    level = _first_keys(w, k, odd, bounds, initial.dtype) + torch.minimum(u, w.clamp(-MAX_RATE, MAX_RATE))
    lift = p - level
    heavy = (num == 0) & (den == 0) & (lift > NEAR) & (level > -torch.inf)
    p = torch.where(heavy, level, p)
    small = (den > 0) & odd
    # p - bits ln 2 is rounded to the dtype of p: what that cuts off goes into num and den.
    lower = (p.double() - bits * LN2).to(p.dtype)
    rest = torch.exp(p.double() - bits * LN2 - lower.double()).to(p.dtype) * 2.0**bits
    factor = torch.where(small & (p.abs() < torch.inf), rest, 1)
    entry = torch.stack((num * factor, den * factor, torch.where(factor == 1, p, lower)))
    return entry, torch.where(heavy, lift, 0)


def _first_keys(w: Tensor, k: Tensor, wanted: Tensor, bounds: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return the first present key of every sequence and channel, moved to its beginning; -inf if there is none."""
    rate, sequences = w.clamp(-MAX_RATE, MAX_RATE), len(bounds) - 1
    keys = torch.full(wanted.shape, -torch.inf, dtype=dtype)
    for n in wanted.any(1).nonzero()[:, 0].tolist():
        begin, end = bounds[n % sequences : n % sequences + 2].tolist()
        of_sequence = k[n // sequences, begin:end]
        if begin < end:
            keys[n] = of_sequence[0]
        if (wanted[n] & (keys[n] == -torch.inf)).any() and begin < end:
            present, first = (of_sequence != -torch.inf).max(0)
            key = of_sequence.gather(0, first[None])[0].to(dtype) + first * rate
            keys[n] = torch.where(present, key, -torch.inf)
    return keys


def with_lift(ginitial: Tensor, lift: Tensor | None) -> Tensor:
    """Return the adjoints of the states that were given, from those of their entry states."""
    if lift is None:
        return ginitial
    return torch.where(ginitial == 0, ginitial, ginitial * lift.exp())
