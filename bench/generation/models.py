"""The models that gen_time.py times, built with random weights, and one way to generate with each protocol.

A protocol is an iterator. Every step computes one token, greedily, and yields what is carried to the next token; the
first step reads the prompt as well. All of them compute the logits of the last position only.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastwkv.nn import RWKV4, RWKV4Config, generate
from fastwkv.nn.generation import Generation

RWKV = "rwkv4"
TRANSFORMERS = ("gpt-neox", "opt", "bloom", "gpt-neo")
MODELS = (RWKV, *TRANSFORMERS)

SIZES = {
    "tiny": RWKV4Config(layers=4, width=192, vocab_size=256),
    **{name: RWKV4Config.preset(name) for name in ("169m", "430m", "1.5b", "3b")},
}


def build(name: str, size: RWKV4Config, positions: int, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Build a model of these layers, width and vocabulary for sequences of up to ``positions`` tokens."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = _rwkv4(size) if name == RWKV else _transformer(name, size, positions)
    return model.to(dtype).eval().requires_grad_(False)


def _rwkv4(size: RWKV4Config) -> RWKV4:
    model = RWKV4(size)
    for parameter in model.blocks.parameters():  # a fresh model has zero matrices, and zeros may multiply faster
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def _transformer(name: str, size: RWKV4Config, positions: int) -> Any:
    import transformers

    D, L, heads = size.width, size.layers, max(size.width // 64, 1)
    attention = [[["global", "local"], L // 2]] + ([[["global"], 1]] if L % 2 else [])  # what GPT-Neo alternates
    projection = {"word_embed_proj_dim": D}  # OPT may embed in another width than it works in
    layouts: dict[str, tuple[str, dict[str, Any]]] = {
        "gpt-neox": ("GPTNeoX", {"num_hidden_layers": L, "num_attention_heads": heads, "intermediate_size": 4 * D}),
        "opt": ("OPT", {"num_hidden_layers": L, "num_attention_heads": heads, "ffn_dim": 4 * D, **projection}),
        "bloom": ("Bloom", {"n_layer": L, "n_head": heads}),
        "gpt-neo": ("GPTNeo", {"num_layers": L, "num_heads": heads, "attention_types": attention}),
    }
    family, options = layouts[name]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=size.vocab_size,
        hidden_size=D,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **options,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


def recurrent(model: RWKV4, tokens: Tensor) -> Iterator[Generation]:
    """RWKV: read each token once, carry the state; on a GPU as one CUDA graph."""
    generation = generate(model, tokens, sys.maxsize)
    for _ in generation:
        yield generation


def recompute(model: Any, tokens: Tensor) -> Iterator[Tensor]:
    """Read the whole sequence again for every token, as the RWKV paper measured; nothing else is carried."""
    while True:
        logits = model(tokens, use_cache=False, logits_to_keep=1).logits
        tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), 1)
        yield tokens


def kv_cache(model: Any, tokens: Tensor) -> Iterator[Any]:
    """Read each token once, carry the keys and values of all: how transformers are run in practice."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    while True:
        logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        yield cache


PROTOCOLS: dict[str, Callable[[Any, Tensor], Iterator[Any]]] = {
    "recurrent": recurrent,
    "kv-cache": kv_cache,
    "recompute": recompute,
}


def carried_bytes(carried: Any) -> int:
    """Bytes of what a protocol carries from one token to the next: a state, a cache or the tokens."""
    if isinstance(carried, Generation):
        state = carried.state
        assert state is not None
        return state.nbytes
    if isinstance(carried, Tensor):
        return carried.nbytes
    return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in carried.layers)


def uses_graph(carried: Any) -> bool | None:
    """Whether the tokens were launches of a CUDA graph; None where nothing asks for one."""
    return carried.uses_graph if isinstance(carried, Generation) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the device or the machine has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "memory" in str(error) and "alloc" in str(error).lower()
