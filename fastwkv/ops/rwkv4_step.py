"""The operators between the matrix products of one token of RWKV-4, for generation on a GPU. Nothing is checked.

Tensors are contiguous and of one dtype, but for those of WKV's state, w and u, which may have another. There are no
derivatives. The name of an operator that writes to an argument ends in _; kernels/rwkv4_step.py has the formulas.
"""

import torch
from torch import Tensor

from fastwkv.ops.library import operator


@operator("rwkv4_step", mutates=("before",), cpu=False)
def norm_mix_(x: Tensor, weight: Tensor, bias: Tensor, eps: float, before: Tensor, mixes: list[Tensor]) -> Tensor:
    """Return the mixtures of LayerNorm(x) with ``before``, and write LayerNorm(x) there."""
    return x.new_empty(len(mixes), *x.shape)


@operator("rwkv4_step", mutates=("num", "den", "scale"), cpu=False)
def wkv_step_gated_(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor, num: Tensor, den: Tensor, scale: Tensor
) -> Tensor:
    """Return σ(r) times the output of WKV, and change its state in place."""
    return torch.empty_like(v)


@operator("rwkv4_step", mutates=("x",), cpu=False)
def relu_squared_(x: Tensor) -> None:
    """Replace x by max(x, 0)²."""


@operator("rwkv4_step", mutates=("x",), cpu=False)
def add_gated_(x: Tensor, r: Tensor, y: Tensor, factor: float) -> None:
    """Add ``factor`` σ(r) y to x."""
