"""The decay rate of WKV from its logarithm, which RWKV-4 stores: ``w = exp(time_decay)``, and its gradient."""

import math

import torch
from torch import Tensor

from fastwkv.ops.derivatives import differentiated

# The largest logarithms whose exponentials are finite, one rounding below those of the largest numbers.
_LARGEST = {t: math.log(torch.finfo(t).max) * (1 - torch.finfo(t).eps) for t in (torch.float32, torch.float64)}


def decay_rate(time_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """Return exp(time_decay) in ``dtype``, float32 or float64, without rounding to 16 bits before.

    The gradient of time_decay is the gradient of w, times w. Long before w overflows, nothing is left of the past and
    the gradient of w is 0; but 0 times infinity would be NaN. So a w that is differentiated stays at the largest finite
    number. Elsewhere it may be infinite, which the kernels understand.
    """
    time_decay = time_decay.to(dtype)
    if differentiated([time_decay]):
        largest = _LARGEST[dtype]
        time_decay = torch.where(time_decay > largest, largest, time_decay)  # NaN stays NaN, in the gradient too
    return time_decay.exp()
