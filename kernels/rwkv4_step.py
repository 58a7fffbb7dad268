"""One token of a whole RWKV-4 block on a GPU: what stands between its matrix products, in four kernels.

    y = LN(x)                      x'_i = μ_i y + (1 - μ_i) y_before        norm_mix_, then y_before becomes y
    σ(r) ⊙ wkv                     and the state moves on by a token       wkv_step_gated_
    max(k, 0)²                                                             relu_squared_
    x + s σ(r) ⊙ y                                                         add_gated_

A token of one sequence reads every weight once and does next to nothing with it. Beside that reading, the number of
kernels decides. Sums are float32 (float64 in a float64 model), and every result is rounded once.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import negated
from fastwkv.kernels.config import FP_FUSION
from fastwkv.kernels.held import Constants, constants, start
from fastwkv.kernels.wkv_step import BLOCK, run_step, wait_for_reads

ELEMENTS_PER_WARP = 256  # of LayerNorm: 8 a lane, in seven rows, which one multiprocessor reads for each sequence


@triton.jit
def _mixed(y, before, mix_ptr, c, inside):
    """Return μ y + (1 - μ) y_before, exact at both ends of μ."""
    mu = tl.load(mix_ptr + c, mask=inside, other=0.0).to(y.dtype)
    return tl.where(mu < 0.5, before + mu * (y - before), y - (y - before) * (1 - mu))


@triton.jit
def _norm_mix_kernel(
    x_ptr,  # [B, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    before_ptr,  # [B, C], read and written
    mix0_ptr,  # [C]
    mix1_ptr,  # [C]
    mix2_ptr,  # [C], or None
    mixed_ptr,  # [2 or 3, B, C]
    C: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    c = tl.arange(0, BLOCK)
    inside = c < C
    i = tl.program_id(0).to(tl.int64) * C + c
    step = tl.num_programs(0).to(tl.int64) * C
    x = tl.load(x_ptr + i, mask=inside, other=0.0).to(ACC)
    before = tl.load(before_ptr + i, mask=inside, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(ACC)
    x = tl.where(inside, x - tl.sum(x, 0) / C, 0.0)
    y = x / tl.sqrt(tl.sum(x * x, 0) / C + EPS) * weight + bias
    y = y.to(before_ptr.dtype.element_ty).to(ACC)  # the next token finds y rounded, so this one uses it rounded
    wait_for_reads()
    tl.store(before_ptr + i, y, mask=inside)
    tl.store(mixed_ptr + i, _mixed(y, before, mix0_ptr, c, inside), mask=inside)
    tl.store(mixed_ptr + step + i, _mixed(y, before, mix1_ptr, c, inside), mask=inside)
    if mix2_ptr is not None:
        tl.store(mixed_ptr + 2 * step + i, _mixed(y, before, mix2_ptr, c, inside), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _relu_squared_kernel(x_ptr, size, BLOCK: tl.constexpr, ACC: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0).to(ACC)
    x = tl.where(x < 0, 0.0, x)  # a NaN stays NaN
    wait_for_reads()
    tl.store(x_ptr + i, x * x, mask=i < size)


@triton.jit(do_not_specialize=["factor", "size"])
def _add_gated_kernel(x_ptr, r_ptr, y_ptr, factor, size, BLOCK: tl.constexpr, ACC: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0).to(ACC)
    r = tl.load(r_ptr + i, mask=i < size, other=0.0).to(ACC)
    y = tl.load(y_ptr + i, mask=i < size, other=0.0).to(ACC)
    wait_for_reads()
    tl.store(x_ptr + i, x + factor * (y / (1 + tl.exp(negated(r)))), mask=i < size)


def norm_warps(block: int) -> int:
    """Return the warps of a LayerNorm of a row of ``block`` elements, a power of two."""
    return min(16, max(1, block // ELEMENTS_PER_WARP))


def norm_mix_(x: Tensor, weight: Tensor, bias: Tensor, eps: float, before: Tensor, mixes: list[Tensor]) -> Tensor:
    """Return two or three mixtures of LN(x) ``[B, C]`` and ``before``, and keep LN(x) in ``before``."""
    B, C = x.shape
    mixed = x.new_empty(len(mixes), B, C)
    first, second, *third = (mix.contiguous() for mix in mixes)
    tensors = (x, weight.contiguous(), bias.contiguous(), before, first, second, third[0] if third else None, mixed)
    start(_norm_mix_kernel, (B,), tensors, (), _norm_constants(C, eps, x.dtype))
    return mixed


def wkv_step_gated_(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor, num: Tensor, den: Tensor, scale: Tensor
) -> Tensor:
    """Run one token of WKV in the memory of its state, fields ``[B, C]``; return σ(r) ⊙ y."""
    y = torch.empty_like(v)
    run_step(w, u, k, v, r, (num, den, scale), y, (num, den, scale))
    return y


def relu_squared_(x: Tensor) -> None:
    """Set x to max(x, 0)²."""
    size = x.numel()
    start(_relu_squared_kernel, (-(-size // BLOCK),), (x,), (size,), _block_constants(x.dtype))


def add_gated_(x: Tensor, r: Tensor, y: Tensor, factor: float) -> None:
    """Add factor σ(r) ⊙ y to x."""
    size = x.numel()
    start(_add_gated_kernel, (-(-size // BLOCK),), (x, r, y), (factor, size), _block_constants(x.dtype))


@lru_cache
def _norm_constants(C: int, eps: float, dtype: torch.dtype) -> Constants:
    block = triton.next_power_of_2(C)
    return constants(
        C=C,
        EPS=eps,
        BLOCK=block,
        ACC=_sums(dtype),
        num_warps=norm_warps(block),
        enable_fp_fusion=FP_FUSION,
    )


@lru_cache
def _block_constants(dtype: torch.dtype) -> Constants:
    return constants(BLOCK=BLOCK, ACC=_sums(dtype), enable_fp_fusion=FP_FUSION)


def _sums(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
