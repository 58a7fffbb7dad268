"""Inputs of WKV for the benchmarks, and the results of the float64 reference for them."""

import math
from dataclasses import dataclass

import torch
from peers import operator
from peers.operator import CPU, draws, state_dtype
from torch import Tensor

import fastwkv
from fastwkv import WKVState, reference


@dataclass(frozen=True)
class Inputs(operator.Inputs):
    """The inputs of WKV. Decay, u and the state are float32 beside 16-bit k, v and gy.

    ``w`` is the exponential of ``log_w`` in their own dtype, so that providers of either form work with the
    same rate, and nobody is charged the rounding of an argument.
    """

    log_w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    state: WKVState
    gy: Tensor

    @property
    def gradient(self) -> Tensor:
        return self.gy

    @property
    def states(self) -> tuple[Tensor, ...]:
        return self.state

    @property
    def w(self) -> Tensor:
        """The decay rate."""
        return self.log_w.exp()


def ordinary(B: int, T: int, C: int, dtype: torch.dtype, seed: int = 0, device: torch.device = CPU) -> Inputs:
    """Draw inputs like a model's: normal keys and values, decay and bonus as RWKV-4 initialises a middle layer."""
    normal, uniform = draws(seed, device)
    channel = torch.arange(C, dtype=torch.float64, device=device)
    log_w = -5 + 8 * (channel / max(1, C - 1)) ** 1.35
    u = -1.2 + 0.5 * ((channel + 1) % 3 - 1)
    return _rounded(log_w, u, normal(B, T, C), normal(B, T, C), B, normal, uniform, dtype)


def adversarial(B: int, T: int, C: int, dtype: torch.dtype, seed: int = 0, device: torch.device = CPU) -> Inputs:
    """Draw inputs that strain the arithmetic: k uniform within ±60, w log-uniform from 1e-6 to 20."""
    normal, uniform = draws(seed, device)
    low, high = math.log(1e-6), math.log(20.0)
    log_w = low + (high - low) * uniform(C)
    return _rounded(log_w, normal(C), 60 * (2 * uniform(B, T, C) - 1), normal(B, T, C), B, normal, uniform, dtype)


def expected(inputs: Inputs, *, state: bool, own: bool = False) -> dict[str, Tensor]:
    """Return y and its gradients by the float64 reference, ``own`` by this package's float64 path on the CPU.

    With ``state`` the initial state takes part.
    """
    tensors = (inputs.w, inputs.u, inputs.k, inputs.v, *(inputs.state if state else ()))
    w, u, k, v, *initial = (t.detach().to(torch.float64, copy=True).requires_grad_() for t in tensors)
    wkv = fastwkv.wkv if own else reference.wkv_loop
    y = wkv(w, u, k, v, WKVState(*initial) if state else None, cu_seqlens=inputs.cu_seqlens)
    gw, gu, gk, gv, *ginitial = torch.autograd.grad(y, (w, u, k, v, *initial), inputs.gy.double())
    results = {"y": y.detach(), "gk": gk, "gv": gv, "gu": gu, "gw": gw}
    return results | ({"gstate": torch.stack(ginitial)} if state else {})


def expected_step(inputs: Inputs) -> dict[str, Tensor]:
    """Return y, mean and log weight after the first token, which follows the initial state."""
    tensors = (inputs.w, inputs.u, inputs.k[:, :1], inputs.v[:, :1], *inputs.state)
    w, u, k, v, *initial = (t.double() for t in tensors)
    y, final = reference.wkv_loop(w, u, k, v, WKVState(*initial), return_state=True)
    return {"y": y[:, 0], **invariants(final)}


def invariants(state: WKVState) -> dict[str, Tensor]:
    """Return what does not depend on the scale of a state: the mean of past values, the log of their total weight."""
    num, den, scale = (s.double() for s in state)
    return {"mean": num / den, "log_weight": scale + den.log()}


def _rounded(log_w, u, k, v, B, normal, uniform, dtype: torch.dtype) -> Inputs:
    C = log_w.shape[0]
    wide = state_dtype(dtype)
    state = WKVState(normal(B, C).to(wide), (0.1 + uniform(B, C)).to(wide), normal(B, C).to(wide))
    return Inputs(log_w.to(wide), u.to(wide), k.to(dtype), v.to(dtype), state, normal(*k.shape).to(dtype))
