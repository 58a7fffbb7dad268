"""The operators of the linear scan: their schemas, and the shapes and dtypes of their results."""

import torch
from torch import Tensor

from fastwkv.kernels.launch import scan_dtypes
from fastwkv.ops.library import operator


@operator("linear_scan")
def linear_scan_fwd(
    a: Tensor,
    x: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    log: bool,
    reverse: bool,
    edges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return h and the final state; with ``log``, ``a`` is log a."""
    dtype, state_dtype = scan_dtypes(a, x)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(x, dtype=dtype), x.new_empty((rows, x.shape[2]), dtype=state_dtype)


@operator("linear_scan_bwd")
def linear_scan_bwd(
    a: Tensor,
    h: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    log: bool,
    reverse: bool,
    gh: Tensor,
    gfinal: Tensor | None,
    dtype: torch.dtype,
    edges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a, of x in ``dtype`` and of the initial state, the last one empty where there is none."""
    return torch.empty_like(a), torch.empty_like(h, dtype=dtype), _gradient_of_initial(a, h, initial)


@operator("linear_scan_bwd", mutates=("gh",))
def linear_scan_bwd_(
    a: Tensor,
    h: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    log: bool,
    reverse: bool,
    gh: Tensor,
    gfinal: Tensor | None,
    edges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of x over that of h, and return those of a and of the initial state."""
    return torch.empty_like(a), _gradient_of_initial(a, h, initial)


@operator("linear_scan")
def linear_scan_step(a: Tensor, x: Tensor, state: Tensor, log: bool) -> Tensor:
    """Return the next state."""
    return torch.empty_like(state)


def _gradient_of_initial(a: Tensor, h: Tensor, initial: Tensor | None) -> Tensor:
    return h.new_empty(0, dtype=scan_dtypes(a, h)[1]) if initial is None else torch.empty_like(initial)
