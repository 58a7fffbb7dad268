"""The linear scan on the CPU."""

import torch
from torch import Tensor

from fastwkv.kernels.cpu.launch import sequence_bounds
from fastwkv.kernels.launch import scan_dtypes


def linear_scan_fwd(
    a: Tensor, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, log: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return h [B, T, C] and the final state [N, C]."""
    dtype, state_dtype = scan_dtypes(a.dtype, x.dtype)
    gate = a.to(state_dtype).exp() if log else a.to(state_dtype)
    gate, x = gate.expand(x.shape), x.to(state_dtype)
    out = torch.empty_like(x)
    bounds = sequence_bounds(x.shape[1], cu_seqlens)
    finals = []
    for n in range(len(bounds) - 1):
        h = torch.zeros_like(x[:, 0]) if initial is None else initial if cu_seqlens is None else initial[n : n + 1]
        steps = range(bounds[n], bounds[n + 1])
        for t in reversed(steps) if reverse else steps:
            h = gate[:, t] * h + x[:, t]
            out[:, t] = h
        finals.append(h.clone())
    return out.to(dtype), torch.cat(finals)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ga, gx and the gradient of the initial state, or an empty tensor where there was none."""
    state_dtype = scan_dtypes(h.dtype, h.dtype)[1]
    gate = a.to(state_dtype).exp() if log else a.to(state_dtype)
    gate = gate.expand(h.shape).conj()
    ga, gx = torch.empty(h.shape, dtype=state_dtype), torch.empty(h.shape, dtype=state_dtype)
    bounds = sequence_bounds(h.shape[1], cu_seqlens)
    ginitial = []
    for n in range(len(bounds) - 1):
        rows = slice(None) if cu_seqlens is None else slice(n, n + 1)
        g = torch.zeros_like(gx[:, 0]) if gfinal is None else gfinal[rows]
        steps = list(range(bounds[n], bounds[n + 1]))
        steps = steps[::-1] if reverse else steps
        for i in reversed(range(len(steps))):
            t = steps[i]
            before = h[:, steps[i - 1]] if i else torch.zeros_like(g) if initial is None else initial[rows]
            g = g + gh[:, t]
            gx[:, t], ga[:, t] = g, g * before.conj()
            g = g * gate[:, t]
        ginitial.append(g)
    ga = ga * gate if log else ga
    ga = (ga.sum((0, 1)) if a.dim() == 1 else ga).to(a.dtype)
    return ga, gx.to(dtype), h.new_empty(0, dtype=state_dtype) if initial is None else torch.cat(ginitial)


def linear_scan_step(a: Tensor, x: Tensor, state: Tensor, log: bool) -> Tensor:
    """Return a state + x."""
    a = a.to(state.dtype)
    return torch.addcmul(x.to(state.dtype), a.exp() if log else a, state)
