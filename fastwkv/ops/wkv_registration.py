"""The operators of WKV: their schemas, and the shapes and dtypes of their results."""

import torch
from torch import Tensor

from fastwkv.kernels.launch import accumulation_dtype, checkpoint_shape
from fastwkv.ops.library import operator


@operator("wkv")
def wkv_fwd(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    edges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the final state and, with ``save``, the checkpoints that the backward pass starts from."""
    B, T, C = k.shape
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = accumulation_dtype(w, u, k, v)
    checkpoints = k.new_empty(checkpoint_shape(B, T, C, dtype) if save else (0,), dtype=dtype)
    return torch.empty_like(v), k.new_empty((3, rows, C), dtype=dtype), checkpoints


@operator("wkv_bwd")
def wkv_bwd(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of w, u, k and v, and the adjoint of the initial state, empty where there is none."""
    ginitial = checkpoints.new_empty(0) if initial is None else initial.new_empty(2, *initial.shape[1:])
    return torch.empty_like(w), torch.empty_like(u), torch.empty_like(k), torch.empty_like(v), ginitial


@operator("wkv_step")
def wkv_step(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, num: Tensor, den: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y and the next state."""
    return torch.empty_like(v), num.new_empty((3, *num.shape))
