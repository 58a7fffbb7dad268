"""The two models of learning_curve.py, equally large, and how each is trained."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastwkv.nn import RWKV4, RWKV4Config

NAMES = {"rwkv4": "RWKV-4", "transformer": "Transformer"}
HEAD = 32  # channels of an attention head, as in the smallest Pythia
VOCAB = 256  # bytes


@dataclass(frozen=True)
class Recipe:
    """Adam without weight decay, at a rate that falls exponentially to a sixtieth: in the paper 6e-4 to 1e-5.

    The paper's RWKV-4 starts at the full rate; ``fastwkv.nn.param_groups`` says what has a multiple of it.
    """

    rate: float
    betas: tuple[float, float]
    warm_up: float = 0.0  # share of the steps in which the rate rises linearly

    def rate_of(self, step: int, steps: int) -> float:
        """Return the learning rate of a step."""
        rise = min((step + 1) / max(round(self.warm_up * steps), 1), 1)
        return self.rate * rise * 60 ** -((step + 1) / steps)


RECIPES = {
    "rwkv4": Recipe(8e-3, (0.9, 0.99)),
    "transformer": Recipe(14e-3, (0.9, 0.95), warm_up=0.1),
}


def build(name: str, layers: int, width: int, length: int, seed: int) -> nn.Module:
    """Build a model with the weights that training starts from, for windows of ``length`` bytes."""
    torch.manual_seed(seed)
    if name == "rwkv4":
        return RWKV4(RWKV4Config(layers, width, VOCAB))
    return _transformer(layers, width, length)


def _transformer(layers: int, width: int, length: int) -> nn.Module:
    """Build what Pythia is, but with all of its small heads turned by position, with which it learns faster."""
    import transformers  # takes seconds, which a call of --help need not

    L, D = layers, width
    # RWKV-4 has D (13 D + 11) parameters a layer and 4 D more in its norms; a GPT-NeoX layer has 4 D² in attention,
    # 2 D I + I in the feed-forward, 9 D in biases and norms, and 2 D in the last norm.
    hidden = round((L * D * (9 * D + 2) + 2 * D) / (L * (2 * D + 1)))
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=D // HEAD,
        intermediate_size=hidden,
        max_position_embeddings=length,
        rotary_pct=1.0,
        initializer_range=math.sqrt(2 / (5 * D)),  # as in GPT-NeoX's own code
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    return transformers.GPTNeoXForCausalLM(config)


def predict(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits ``[B, T, V]`` of windows that have nothing before them."""
    return model(tokens)[0] if isinstance(model, RWKV4) else model(tokens, use_cache=False).logits


def parameters(model: nn.Module) -> int:
    """Return how many numbers the model learns."""
    return sum(parameter.numel() for parameter in model.parameters())
