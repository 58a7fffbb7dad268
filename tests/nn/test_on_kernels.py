"""Layers and models over the Triton kernels, on a GPU where there is one: the same as over the CPU path."""

from copy import deepcopy

import pytest
import torch
from implementations import Implementation
from rwkv4_models import CONFIG, text, trained
from torch import Tensor, nn

from fastwkv.nn import LRU, RGLRU, S4D, LRUBlock, MinGRU, generate

H = 6
LAYERS = {
    "LRU": lambda: LRU(H, 5),
    "LRUBlock": lambda: LRUBlock(H, 5, norm="layer"),
    "S4D": lambda: S4D(H, 4),
    "RGLRU": lambda: RGLRU(H, heads=3),
    "MinGRU": lambda: MinGRU(H, 5),
}
SAME = {"rtol": 1e-10, "atol": 1e-10}  # in float64


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of a random loss, on the CPU."""
    outputs = model(x)
    y = outputs[0] if isinstance(outputs, tuple) else outputs
    loss = (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype).to(y)).sum()
    return [t.detach().cpu() for t in (y, *torch.autograd.grad(loss, list(model.parameters())))]


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gives_the_same(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double().eval()
    x = torch.randn(2, 9, H, dtype=torch.float64)
    wanted = results(layer, x)
    with Implementation("triton") as context:
        found = results(deepcopy(layer).to(context.device), x.to(context.device))
    for result, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(result, want, **SAME)


def test_language_model_gives_the_same() -> None:
    model, tokens = trained(CONFIG).double(), text(2, 9)
    wanted, texts = results(model, tokens), list(generate(model, tokens, 5, temperature=0))
    with Implementation("triton") as context:
        there, tokens = deepcopy(model).to(context.device), tokens.to(context.device)
        found, others = results(there, tokens), list(generate(there, tokens, 5, temperature=0))
    for result, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(result, want, **SAME)
    assert torch.equal(torch.stack(others).cpu(), torch.stack(texts))
