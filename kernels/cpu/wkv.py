"""Placeholder until the numba kernels stand: the same contract through the reference loop."""
import torch
from fastwkv.kernels.config import CHECKPOINT_ROWS
from fastwkv.reference.wkv import WKVState, wkv_loop


def wkv_fwd(w, u, k, v, initial, cu_seqlens, save):
    state = None if initial is None else WKVState(*initial)
    y, final = wkv_loop(w, u, k, v, state, return_state=True, cu_seqlens=cu_seqlens)
    final = torch.stack(final)
    B, T, C = k.shape
    return y, final, final.new_zeros((B, -(-T // CHECKPOINT_ROWS), 3, C) if save else (0,))


def wkv_bwd(w, u, k, v, initial, cu_seqlens, checkpoints, gy, gfinal):
    with torch.enable_grad():
        inputs = [t.detach().clone().requires_grad_() for t in (w, u, k, v) + (() if initial is None else (initial,))]
        state = None if initial is None else WKVState(*inputs[4])
        y, final = wkv_loop(*inputs[:4], state, return_state=True, cu_seqlens=cu_seqlens)
        grads = torch.autograd.grad([y, torch.stack(final)], inputs, [gy, torch.zeros(3, *final[0].shape) if gfinal is None else gfinal])
    return (*grads, checkpoints.new_zeros(0)) if initial is None else grads


def wkv_step(w, u, k, v, num, den, scale):
    y, final = wkv_loop(w, u, k[:, None], v[:, None], WKVState(num, den, scale), return_state=True)
    return y[:, 0].contiguous(), torch.stack(final)
