"""What PyTorch needs to know of the operators of WKV: shapes of results, and schemas."""

import torch
from torch import Tensor

from fastwkv.kernels.launch import accumulation_dtype, checkpoint_shape
from fastwkv.ops.library import register


def _wkv_fwd_fake(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    edges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, C = k.shape
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = accumulation_dtype(w, u, k, v)
    checkpoints = k.new_empty(checkpoint_shape(B, T, C, dtype) if save else (0,), dtype=dtype)
    return torch.empty_like(v), k.new_empty((3, rows, C), dtype=dtype), checkpoints


def _wkv_bwd_fake(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    gy: Tensor,
    gfinal: Tensor | None,
    edges: Tensor | None = None,
) -> tuple[Tensor, ...]:
    ginitial = checkpoints.new_empty(0) if initial is None else initial.new_empty(2, *initial.shape[1:])
    return torch.empty_like(w), torch.empty_like(u), torch.empty_like(k), torch.empty_like(v), ginitial


def _wkv_step_fake(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, num: Tensor, den: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), num.new_empty((3, *num.shape))


register(
    "wkv_fwd(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? initial, Tensor? cu_seqlens, bool save,"
    " Tensor? edges=None) -> (Tensor, Tensor, Tensor)",
    "wkv",
    _wkv_fwd_fake,
)
register(
    "wkv_bwd(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? initial, Tensor? cu_seqlens, Tensor checkpoints,"
    " Tensor gy, Tensor? gfinal, Tensor? edges=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "wkv_bwd",
    _wkv_bwd_fake,
)
register(
    "wkv_step(Tensor w, Tensor u, Tensor k, Tensor v, Tensor num, Tensor den, Tensor max) -> (Tensor, Tensor)",
    "wkv_step",
    _wkv_step_fake,
)
