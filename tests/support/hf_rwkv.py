"""Small RWKV models of Hugging Face's, ways to run them, and how far two results are apart."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import RwkvConfig, RwkvForCausalLM

from fastwkv.integrations.transformers import patch


def same(layers: int, hidden: int = 16) -> float:
    """Return the relative L2 distance of two computations in float32 of one thing, whose libraries differ.

    A product of K terms is off by about u √K of the size of what it adds up, u = 2⁻²⁴, each time otherwise, and so is
    what comes from it. A layer has seven, of which one adds up 4 ``hidden`` terms, six ``hidden``, and there are two
    computations: u √(2 layers 10 hidden). Measured up to a third of it.
    """
    return float(2**-24 * (2 * layers * 10 * hidden) ** 0.5)


SAME = same(3)


def build(layers: int = 3, hidden: int = 16, seed: int = 2, **changes: Any) -> RwkvForCausalLM:
    """A model in eval mode whose every parameter matters, rescaled every second layer."""
    sizes = {"vocab_size": 31, "hidden_size": hidden, "num_hidden_layers": layers, "rescale_every": 2}
    with patch():
        model = RwkvForCausalLM(RwkvConfig(**sizes | changes, bos_token_id=None, eos_token_id=None))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else parameter + 0.1 * noise)
    return model.eval()


def text(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


def distance(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def meaning(state: list[Tensor]) -> list[Tensor]:
    """What a state means; num, den and max on their own are a choice of scale."""
    ffn_x, att_x, num, den, top = state
    return [ffn_x, att_x, num / den, top + den.log()]


def assert_same_state(actual: list[Tensor], expected: list[Tensor], bound: float = SAME) -> None:
    for one, other in zip(meaning(actual), meaning(expected), strict=True):
        assert one.shape == other.shape
        assert distance(one, other) < bound


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    # A single token uses no decay.
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def step_by_step(model: RwkvForCausalLM, tokens: Tensor) -> Tensor:
    state, pieces = None, []
    for token in tokens.split(1, 1):
        output = model(token, state=state, use_cache=True)
        pieces.append(output.logits)
        state = output.state
    return torch.cat(pieces, 1)


@torch.no_grad()
def recomputed(model: RwkvForCausalLM, tokens: Tensor, count: int) -> Tensor:
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert tokens[:, -count:].unique().numel() > count / 4  # one token again and again would hide much
    return tokens


def generate(model: RwkvForCausalLM, tokens: Tensor, count: int, **options: Any) -> Any:
    return model.generate(tokens, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)
