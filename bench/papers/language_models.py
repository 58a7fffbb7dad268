"""Models of bytes, RWKV-4 and a transformer, equally large, and the bits that each needs for a byte of documents."""

import math
from collections.abc import Sequence

import torch
from papers.text import SEPARATOR
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fastwkv.nn import RWKV4, RWKV4Config

HEAD = 32  # channels of an attention head, as in the smallest Pythia
VOCAB = 256  # bytes
TOGETHER = 2**14  # bytes in one call of a model that is tested
IGNORED = -100  # as a target


def build(name: str, layers: int, width: int, length: int, seed: int) -> nn.Module:
    """Build a model with the weights that training starts from, for windows of ``length`` bytes."""
    torch.manual_seed(seed)
    if name == "rwkv4":
        return RWKV4(RWKV4Config(layers, width, VOCAB))
    # A Pythia but for its positions, which turn whole heads: small as these are, it learns faster so.
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


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits ``[B, T, V]`` of windows that have nothing before them."""
    return model(tokens)[0] if isinstance(model, RWKV4) else model(tokens, use_cache=False).logits


@torch.inference_mode()
def windowed_bits(model: nn.Module, documents: Sequence[bytes], length: int, device: torch.device) -> float:
    """Predict windows of ``length`` bytes, as in training: what comes before a window is not known."""
    windows = []
    for document in documents:
        inputs, targets = _tokens(document)
        windows += zip(inputs.split(length), targets.split(length), strict=True)
    windows.sort(key=lambda window: -len(window[0]))  # so that little is padded
    nats, rows = 0.0, max(TOGETHER // length, 1)
    for first in range(0, len(windows), rows):
        inputs, targets = zip(*windows[first : first + rows], strict=True)
        logits = logits_of(model, pad_sequence(inputs, batch_first=True).to(device))
        nats += _nats(logits, pad_sequence(targets, batch_first=True, padding_value=IGNORED))
    return nats / math.log(2) / sum(map(len, documents))


@torch.inference_mode()
def carried_bits(model: RWKV4, documents: Sequence[bytes], device: torch.device) -> float:
    """Predict whole documents, with the state carried from the first byte to the last."""
    nats = 0.0
    for document in documents:
        state = None
        for inputs, targets in zip(*(one.split(TOGETHER) for one in _tokens(document)), strict=True):
            logits, state = model(inputs[None].to(device), state)
            nats += _nats(logits, targets[None])
    return nats / math.log(2) / sum(map(len, documents))


def _tokens(document: bytes) -> tuple[Tensor, Tensor]:
    tokens = torch.frombuffer(bytearray(SEPARATOR + document), dtype=torch.uint8).long()
    return tokens[:-1], tokens[1:]


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Return the sum, each window's in float32 and all of them in float64."""
    targets = targets.to(logits.device)
    return float(F.cross_entropy(logits.float().mT, targets, ignore_index=IGNORED, reduction="none").double().sum())
