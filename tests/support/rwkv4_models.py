"""Small RWKV-4 models whose every parameter matters, and how their results are compared."""

import torch
from torch import Tensor

from fastwkv.nn import RWKV4, RWKV4Config, RWKV4State

CONFIG = RWKV4Config(layers=3, width=20, vocab_size=31)
# Relative L2 distance of two computations of one thing in float32. A product of K terms is off by about u √K of the
# size of what it adds up, u = 2⁻²⁴, each time otherwise; a layer has six of 20 terms and one of 80, there are three
# layers and two computations: u √(2 · 3 · 200) = 2e-6. Measured up to 5e-7, in other orders of adding up as well.
SAME = 2e-6


def trained(config: RWKV4Config = CONFIG, seed: int = 0) -> RWKV4:
    """A model whose every parameter matters; a fresh one has zero matrices, behind which errors hide."""
    model = RWKV4(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else parameter + 0.1 * noise)
    return model


def text(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def distance(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def fields(state: RWKV4State) -> dict[str, Tensor]:
    """What a state means; num, den and max on their own are a choice of scale."""
    num, den, top = state.wkv
    return {"att_x": state.att_x, "ffn_x": state.ffn_x, "mean": num / den, "log weight": top + den.log()}
