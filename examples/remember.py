"""Trains an LRUBlock to say again, after a delay, what it was told; beside it the same network without memory."""

import argparse

import torch
from torch import nn

from fastwkv.nn import LRUBlock, param_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--delay", type=int, default=60, help="steps of nothing in between (default: 60)")
parser.add_argument("--steps", type=int, default=150, help="of training (default: 150)")
args = parser.parse_args()
SYMBOLS, LENGTH, HIDDEN = 8, 5, 64  # guessing is right once in eight


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences, and the symbols that each is to end with."""
    told = torch.randint(SYMBOLS, (size, LENGTH))
    nothing, now = torch.full((size, args.delay), SYMBOLS), torch.full((size, LENGTH), SYMBOLS + 1)
    return torch.cat((told, nothing, now), 1), told


def trained(r_min: float, r_max: float) -> float:
    """Return how often a network is right whose states fade by such factors a step."""
    torch.manual_seed(0)
    blocks = [LRUBlock(HIDDEN, HIDDEN, r_min, r_max) for _ in range(2)]
    network = nn.Sequential(nn.Embedding(SYMBOLS + 2, HIDDEN), *blocks, nn.Linear(HIDDEN, SYMBOLS))
    groups = param_groups(network, lr=6e-3)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in groups], args.steps, pct_start=0.1)
    for _ in range(args.steps):
        tokens, told = batch(32)
        loss = nn.functional.cross_entropy(network(tokens)[:, -LENGTH:].flatten(0, 1), told.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tokens, told = batch(256)
    return (network.eval()(tokens)[:, -LENGTH:].argmax(-1) == told).float().mean().item()


print(f"an LRU whose states last: {trained(0.99, 0.9999):.0%} right")
print(f"an LRU whose states fade: {trained(0.0, 0.3):.0%} right")
