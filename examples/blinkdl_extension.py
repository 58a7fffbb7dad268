"""The extension that BlinkDL's training code compiles, without a compiler: one import in front, the rest as there."""

import fastwkv.integrations.blinkdl_extension  # isort: skip  # noqa: F401 (it exchanges `load`, so it comes first)

import torch
from torch.utils.cpp_extension import load

B, T, C = 2, 100, 16
wkv_cuda = load(name="wkv_1024", sources=["cuda/wkv_op.cpp", "cuda/wkv_cuda.cu"])  # neither file exists here

torch.manual_seed(0)
time_decay, time_first = torch.linspace(-5, 3, C), torch.zeros(C)
k, v, target, y = torch.randn(4, B, T, C)
for step in range(101):
    wkv_cuda.forward(B, T, C, w := -time_decay.exp(), time_first, k, v, y)
    gw, gu = torch.empty(2, B, C)
    gk, gv = torch.empty(2, B, T, C)
    wkv_cuda.backward(B, T, C, w, time_first, k, v, y, y - target, gw, gu, gk, gv)
    if step % 50 == 0:
        print(f"step {step:3}: loss {(y - target).square().mean().item():.4f}")
    for tensor, gradient in ((time_decay, gw.sum(0)), (time_first, gu.sum(0)), (k, gk), (v, gv)):
        tensor -= 0.1 * gradient  # plain gradient descent; gw is the gradient of time_decay already
