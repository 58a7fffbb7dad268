"""Inputs of WKV for the benchmarks, and what the float64 reference makes of them."""

from dataclasses import dataclass

import torch
from operator_base import Shape, draws, state_dtype
from torch import Tensor

from fastwkv import WKVState, reference


@dataclass(frozen=True)
class Inputs:
    """One call and the gradient of its output. Decay, u and the state are float32 beside 16-bit k, v and gy.

    ``w`` is the exponential of ``log_w`` in their own dtype, so that who takes one and who takes the other works with
    the same rate, and nobody is charged the rounding of an argument.
    """

    log_w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    state: WKVState
    gy: Tensor

    @property
    def shape(self) -> Shape:
        """B, T, C."""
        B, T, C = self.k.shape
        return B, T, C

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of k, v and gy."""
        return self.k.dtype

    @property
    def states(self) -> tuple[Tensor, ...]:
        """The initial state."""
        return self.state

    @property
    def w(self) -> Tensor:
        """The decay rate."""
        return self.log_w.exp()

    def part(self, tokens: int, channels: slice = slice(None)) -> "Inputs":
        """Return the first tokens of some channels."""
        k, v, gy = (x[:, :tokens, channels] for x in (self.k, self.v, self.gy))
        return Inputs(self.log_w[channels], self.u[channels], k, v, WKVState(*(s[:, channels] for s in self.state)), gy)


def ordinary(B: int, T: int, C: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Draw inputs like a model's: normal keys and values, decay and bonus as RWKV-4 initialises a middle layer."""
    normal, uniform = draws(seed)
    channel = torch.arange(C, dtype=torch.float64)
    log_w = -5 + 8 * (channel / max(1, C - 1)) ** 1.35
    u = -1.2 + 0.5 * ((channel + 1) % 3 - 1)
    return _rounded(log_w, u, normal(B, T, C), normal(B, T, C), B, normal, uniform, dtype)


def adversarial(B: int, T: int, C: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Draw inputs that strain the arithmetic: k uniform within ±60, w log-uniform from 1e-6 to 20."""
    normal, uniform = draws(seed)
    low, high = torch.tensor((1e-6, 20.0), dtype=torch.float64).log()
    log_w = low + (high - low) * uniform(C)
    return _rounded(log_w, normal(C), 60 * (2 * uniform(B, T, C) - 1), normal(B, T, C), B, normal, uniform, dtype)


def expected(inputs: Inputs, *, state: bool) -> dict[str, Tensor]:
    """Return y and its gradients by the float64 reference; with ``state`` the initial state takes part."""
    tensors = (inputs.w, inputs.u, inputs.k, inputs.v, *(inputs.state if state else ()))
    w, u, k, v, *initial = (t.detach().to(torch.float64, copy=True).requires_grad_() for t in tensors)
    y = reference.wkv_loop(w, u, k, v, WKVState(*initial) if state else None)
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
