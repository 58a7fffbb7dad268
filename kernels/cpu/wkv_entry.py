"""The states that sequences of WKV start from on the CPU; kernels/wkv_entry.py says what is done to them, and why."""

import numpy as np
import torch
from torch import Tensor

from fastwkv.kernels.cpu.wkv_state import STEEPEST

NEAR = 30.0


def entry_states(w: Tensor, u: Tensor, k: Tensor, initial: Tensor, bounds: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Return states ``[3, N, C]`` whose exponents leave room for the first tokens, and what they were lowered by.

    None of them usually needs it: then the states come back as they are, without a second result.
    """
    num, den, scale = initial
    small, digits = (2.0**-512, 512) if initial.dtype == torch.float64 else (2.0**-64, 64)
    odd = (den < small) & (scale > -torch.inf)
    if not odd.any():
        return initial, None
    level = _first_keys(w, k, odd, bounds, initial.dtype) + torch.minimum(u, w.clamp(-STEEPEST, STEEPEST))
    lift = scale - level
    heavy = (num == 0) & (den == 0) & (lift > NEAR) & (level > -torch.inf)
    scale = torch.where(heavy, level, scale)
    tiny = (den > 0) & odd
    # The sum of max and digits ln 2 is rounded in float32: the rest goes into num and den.
    lower = (scale.double() - digits * np.log(2)).to(scale.dtype)
    rest = torch.exp(scale.double() - digits * np.log(2) - lower.double()).to(scale.dtype) * 2.0**digits
    factor = torch.where(tiny & (scale.abs() < torch.inf), rest, 1)
    return torch.stack((num * factor, den * factor, torch.where(factor == 1, scale, lower))), torch.where(
        heavy, lift, 0
    )


def _first_keys(w: Tensor, k: Tensor, wanted: Tensor, bounds: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return the first present key of every sequence and channel, moved to its beginning; -inf if there is none."""
    rate, sequences = w.clamp(-STEEPEST, STEEPEST), len(bounds) - 1
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
    """Return the adjoints of the states that were given, from those of what was made of them."""
    if lift is None:
        return ginitial
    return torch.where(ginitial == 0, ginitial, ginitial * lift.exp())
