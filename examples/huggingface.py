"""Trains a small RWKV-4 of Hugging Face's with fastwkv inside, then lets it continue a batch of texts."""

import torch
from transformers import RwkvConfig, RwkvForCausalLM

from fastwkv.integrations.transformers import patch

patch()  # that is all; the rest is plain transformers
torch.manual_seed(0)
config = RwkvConfig(vocab_size=10, hidden_size=64, num_hidden_layers=2, bos_token_id=None, eos_token_id=None)
model = RwkvForCausalLM(config)

texts = (torch.arange(8)[:, None] + torch.arange(32)) % 10  # counting, from eight different digits
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(31):
    loss = model(texts, labels=texts).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step:2}: loss {loss.item():.3f}")

model.eval()
for row in model.generate(texts[:3, :4], max_new_tokens=12, do_sample=False, use_cache=True, pad_token_id=0):
    print(" ".join(map(str, row.tolist())))
