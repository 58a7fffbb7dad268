"""Inputs of the linear scan for the benchmarks, and the results of the float64 reference for them."""

from dataclasses import dataclass

import torch
from peers import operator
from peers.operator import CPU, draws, state_dtype
from torch import Tensor

import fastwkv
from fastwkv import reference


@dataclass(frozen=True)
class Inputs(operator.Inputs):
    """The inputs of the scan. The initial state is float32 beside 16 bits, all else of one dtype."""

    a: Tensor  # [B, T, C], or [C] if it is the same at every token
    x: Tensor
    h0: Tensor
    gh: Tensor

    @property
    def gradient(self) -> Tensor:
        return self.gh

    @property
    def states(self) -> tuple[Tensor, ...]:
        return (self.h0,)

    @property
    def fixed(self) -> bool:
        """Whether a is the same at every token."""
        return self.a.dim() == 1

    @property
    def a_0(self) -> Tensor:
        """The multiplier of the first token, ``[C]`` or ``[B, C]``."""
        return self.a if self.fixed else self.a[:, 0]


def ordinary(
    B: int, T: int, C: int, dtype: torch.dtype, seed: int = 0, device: torch.device = CPU, *, fixed: bool = False
) -> Inputs:
    """Draw inputs like a model's.

    Complex multipliers lie in a ring, |a| uniform from 0.9 to 0.999 with any phase; real ones are gates, sigmoids of
    normal numbers about 3.
    """
    normal, uniform = draws(seed, device)
    shape = (C,) if fixed else (B, T, C)
    if dtype.is_complex:
        a = torch.polar(0.9 + 0.099 * uniform(*shape), 2 * torch.pi * uniform(*shape))
    else:
        a = torch.sigmoid(3 + normal(*shape))
    return _rounded(a, _normal(normal, (B, T, C), dtype), normal, dtype)


def adversarial(
    B: int, T: int, C: int, dtype: torch.dtype, seed: int = 0, device: torch.device = CPU, *, fixed: bool = False
) -> Inputs:
    """Draw inputs that forget nothing, rounding errors least of all.

    Complex multipliers have |a| = 1 and any phase; real ones are 1, and x is positive, so that the sums only grow.
    """
    normal, uniform = draws(seed, device)
    shape = (C,) if fixed else (B, T, C)
    if dtype.is_complex:
        phase = 2 * torch.pi * uniform(*shape)
        return _rounded(torch.polar(torch.ones_like(phase), phase), _normal(normal, (B, T, C), dtype), normal, dtype)
    return _rounded(torch.ones(*shape, dtype=torch.float64, device=device), uniform(B, T, C), normal, dtype)


def expected(inputs: Inputs, *, state: bool, own: bool = False) -> dict[str, Tensor]:
    """Return h and its gradients by the reference in float64 or complex128, ``own`` by this package's CPU path.

    With ``state`` it starts from h0.
    """
    tensors = (inputs.a, inputs.x, *(inputs.states if state else ()))
    a, x, *initial = (_wide(t.detach()).requires_grad_() for t in tensors)
    scan = fastwkv.linear_scan if own else reference.linear_scan
    h = scan(a, x, *initial, cu_seqlens=inputs.cu_seqlens)
    ga, gx, *ginitial = torch.autograd.grad(h, (a, x, *initial), _wide(inputs.gh))
    return {"h": h.detach(), "ga": ga, "gx": gx} | ({"gh0": torch.stack(ginitial)} if state else {})


def expected_step(inputs: Inputs) -> dict[str, Tensor]:
    """Return h after the first token, which follows the initial state."""
    a, x, h0 = map(_wide, (inputs.a_0, inputs.x[:, 0], inputs.h0))
    return {"h": reference.linear_scan_step(a, x, h0)}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64), copy=True)


def _normal(normal, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.complex(normal(*shape), normal(*shape)) if dtype.is_complex else normal(*shape)


def _rounded(a: Tensor, x: Tensor, normal, dtype: torch.dtype) -> Inputs:
    B, T, C = x.shape
    h0 = _normal(normal, (B, C), dtype).to(state_dtype(dtype))
    return Inputs(a.to(dtype), x.to(dtype), h0, _normal(normal, (B, T, C), dtype).to(dtype))
