"""Trains a time mix on the CPU through the WKV operator of BlinkDL's training code: a mean of all it has read."""

import torch

from fastwkv.integrations.blinkdl import RUN_CUDA  # in place of the function of that name in src/model.py

torch.manual_seed(0)
B, T, C = 2, 100, 16
x = torch.randn(B, T, C)
target = x.cumsum(1) / torch.arange(1, T + 1)[:, None]

time_decay, time_first = torch.linspace(-5, 3, C), torch.zeros(C)
key, value, receptance, output = (torch.randn(C, C) / C**0.5 for _ in range(4))
parameters = [p.requires_grad_() for p in (time_decay, time_first, key, value, receptance, output)]
optimizer = torch.optim.Adam(parameters, lr=0.01)
for step in range(101):
    y = RUN_CUDA(B, T, C, time_decay, time_first, x @ key, x @ value)
    loss = (torch.sigmoid(x @ receptance) * y @ output - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3}: loss {loss.item():.4f}")
