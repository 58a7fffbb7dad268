"""The linear scan as PyTorch knows it: schemas, and what results look like."""

import torch
from torch import Tensor

from fastwkv.kernels.launch import scan_dtypes
from fastwkv.ops.library import register


def _fwd_fake(
    a: Tensor,
    x: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    log: bool,
    reverse: bool,
    edges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype, state_dtype = scan_dtypes(a, x)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(x, dtype=dtype), x.new_empty((rows, x.shape[2]), dtype=state_dtype)


def _bwd_fake(
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
    ginitial = h.new_empty(0, dtype=scan_dtypes(a, h)[1]) if initial is None else torch.empty_like(initial)
    return torch.empty_like(a), torch.empty_like(h, dtype=dtype), ginitial


def _bwd_in_place_fake(
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
    ga, _, ginitial = _bwd_fake(a, h, initial, cu_seqlens, log, reverse, gh, gfinal, gh.dtype)
    return ga, ginitial


def _step_fake(a: Tensor, x: Tensor, state: Tensor, log: bool) -> Tensor:
    return torch.empty_like(state)


register(
    "linear_scan_fwd(Tensor a, Tensor x, Tensor? initial, Tensor? cu_seqlens, bool log, bool reverse,"
    " Tensor? edges=None) -> (Tensor, Tensor)",
    "linear_scan",
    _fwd_fake,
)
register(
    "linear_scan_bwd(Tensor a, Tensor h, Tensor? initial, Tensor? cu_seqlens, bool log, bool reverse, Tensor gh,"
    " Tensor? gfinal, ScalarType dtype, Tensor? edges=None) -> (Tensor, Tensor, Tensor)",
    "linear_scan_bwd",
    _bwd_fake,
)
register(  # the gradient of x takes the memory of that of h
    "linear_scan_bwd_(Tensor a, Tensor h, Tensor? initial, Tensor? cu_seqlens, bool log, bool reverse, Tensor(a!) gh,"
    " Tensor? gfinal, Tensor? edges=None) -> (Tensor, Tensor)",
    "linear_scan_bwd",
    _bwd_in_place_fake,
)
register("linear_scan_step(Tensor a, Tensor x, Tensor state, bool log) -> Tensor", "linear_scan", _step_fake)
