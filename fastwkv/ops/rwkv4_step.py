"""What stands between the matrix products of a token of RWKV-4, for loops that generate on a GPU. Nothing is checked.

Tensors are contiguous, of one dtype but for those of WKV's state (and w and u, which are of any). None of it can be
differentiated; names that end in _ write to what kernels/rwkv4_step.py says.
"""

import torch
from torch import Tensor

from fastwkv.ops.library import register


def _norm_mix_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, before: Tensor, mixes: list[Tensor]) -> Tensor:
    return x.new_empty(len(mixes), *x.shape)


def _wkv_step_gated_fake(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor, num: Tensor, den: Tensor, scale: Tensor
) -> Tensor:
    return torch.empty_like(v)


def _nothing(*_: object) -> None:
    pass


register(
    "norm_mix_(Tensor x, Tensor weight, Tensor bias, float eps, Tensor(a!) before, Tensor[] mixes) -> Tensor",
    "rwkv4_step",
    _norm_mix_fake,
    cpu=False,
)
register(
    "wkv_step_gated_(Tensor w, Tensor u, Tensor k, Tensor v, Tensor r, Tensor(a!) num, Tensor(b!) den,"
    " Tensor(c!) scale) -> Tensor",
    "rwkv4_step",
    _wkv_step_gated_fake,
    cpu=False,
)
register("relu_squared_(Tensor(a!) x) -> ()", "rwkv4_step", _nothing, cpu=False)
register("add_gated_(Tensor(a!) x, Tensor r, Tensor y, float factor) -> ()", "rwkv4_step", _nothing, cpu=False)

norm_mix_ = torch.ops.fastwkv.norm_mix_
wkv_step_gated_ = torch.ops.fastwkv.wkv_step_gated_
relu_squared_ = torch.ops.fastwkv.relu_squared_
add_gated_ = torch.ops.fastwkv.add_gated_
