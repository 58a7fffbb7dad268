"""Trains a small RWKV-4 on bytes, reads a text once, saves the state, and continues it twice from the file."""

import argparse
import random
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from fastwkv.nn import RWKV4, RWKV4Config, RWKV4State, generate, param_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--text", type=Path, default=Path(random.__file__), help="to learn (default: random.py)")
parser.add_argument("--steps", type=int, default=150, help="of training (default: 150)")
args = parser.parse_args()

torch.manual_seed(0)
text = torch.tensor(list(args.text.read_bytes()))
model = RWKV4(RWKV4Config(layers=2, width=64, vocab_size=256))
optimizer = torch.optim.Adam(param_groups(model, lr=8e-3, weight_decay=0), betas=(0.9, 0.99), eps=1e-8)
for step in range(args.steps):
    starts = torch.randint(len(text) - 128, (16,)).tolist()
    windows = torch.stack([text[start : start + 129] for start in starts])
    logits, _ = model(windows[:, :-1])
    loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0 or step == args.steps - 1:
        print(f"step {step:3}: loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    _, state = model(text[None, :-1])
    state.save(file := Path(folder, "state.safetensors"))
    print(f"{len(text)} bytes of text, {file.stat().st_size} bytes of state")
    for seed in (1, 2):
        draw = {"state": RWKV4State.load(file), "temperature": 0.7, "seed": seed}
        more = bytes(int(token) for token in generate(model, text[None, -1:], 60, **draw))
        print(repr(more.decode(errors="replace")))
