"""A time mix of RWKV-4, trained through both replacements of BlinkDL's CUDA operator, on a CPU and without a compiler.

It learns the mean of everything it has read, from two rows of noise.
"""

import fastwkv.integrations.blinkdl_extension  # isort: skip  # noqa: F401  the one import in front of training code

import torch
from torch.utils.cpp_extension import load

from fastwkv.integrations.blinkdl import RUN_CUDA

B, T, C = 2, 100, 16
wkv_cuda = load(name="wkv_1024", sources=["cuda/wkv_op.cpp", "cuda/wkv_cuda.cu"])  # neither file exists


class WKV(torch.autograd.Function):
    """What training code wraps around its extension."""

    @staticmethod
    def forward(ctx, time_decay, time_first, k, v):
        """Let the extension write y."""
        w, y = -time_decay.exp(), torch.empty_like(v)
        wkv_cuda.forward(B, T, C, w, time_first, k, v, y)
        ctx.save_for_backward(w, time_first, k, v, y)
        return y

    @staticmethod
    def backward(ctx, gy):
        """Let the extension write the gradients; those of the vectors come a row at a time."""
        (gw, gu), (gk, gv) = torch.empty(2, B, C), torch.empty(2, B, T, C)
        wkv_cuda.backward(B, T, C, *ctx.saved_tensors, gy.contiguous(), gw, gu, gk, gv)
        return gw.sum(0), gu.sum(0), gk, gv


def train(wkv):
    """Return the loss of every step."""
    torch.manual_seed(0)
    x, time_decay, time_first = torch.randn(B, T, C), torch.linspace(-5, 3, C), torch.zeros(C)
    key, value, receptance, output = (torch.randn(C, C) / C**0.5 for _ in range(4))
    target = x.cumsum(1) / torch.arange(1, T + 1)[:, None]
    parameters = [p.requires_grad_() for p in (time_decay, time_first, key, value, receptance, output)]
    optimizer, losses = torch.optim.Adam(parameters, lr=0.01), []
    for _ in range(100):
        y = torch.sigmoid(x @ receptance) * wkv(time_decay, time_first, x @ key, x @ value) @ output
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


through_function = train(lambda *inputs: RUN_CUDA(B, T, C, *inputs))
through_extension = train(WKV.apply)
difference = max(abs(a - b) for a, b in zip(through_function, through_extension, strict=True))
print(f"RUN_CUDA   loss {through_function[0]:.4f} -> {through_function[-1]:.4f}")
print(f"extension  loss {through_extension[0]:.4f} -> {through_extension[-1]:.4f}")
print(f"largest difference at any step: {difference:.0e}")
