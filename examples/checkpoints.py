"""Writes a small RWKV-4 in the three formats, reads each again, and continues a text in the model that comes out."""

import tempfile
from pathlib import Path

import torch

from fastwkv.nn import RWKV4, RWKV4Config, RWKV4State, generate

torch.manual_seed(0)
model = RWKV4(RWKV4Config(layers=2, width=64, vocab_size=256))
with tempfile.TemporaryDirectory() as folder:
    for name, format in (("ours", "fastwkv"), ("for_transformers", "hf"), ("for_blinkdl.pth", "blinkdl")):
        model.save_pretrained(Path(folder, name), format=format)
        model = RWKV4.from_pretrained(Path(folder, name))
        print(f"{format}: {sum(p.numel() for p in model.parameters())} parameters")

    text = torch.tensor([list(b"Once upon a time")])
    stream = generate(model, text, 5)
    first = [int(token) for token in stream]
    stream.state.save(Path(folder, "state"))  # of a fixed size, for any process

    state = RWKV4State.load(Path(folder, "state"))
    more = [int(token) for token in generate(model, torch.tensor([first[-1:]]), 5, state=state)]
print("continued from a file as without one:", [*first, *more] == [int(t) for t in generate(model, text, 10)])
