"""How well the models of learning_curve.py predict what was held out: the mean bits of every byte of every document."""

import math
from collections.abc import Sequence

import torch
from learning_curve_data import SEPARATOR
from learning_curve_models import predict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fastwkv.nn import RWKV4

TOGETHER = 2**14  # bytes in one call of a model
IGNORED = -100  # as a target


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
        logits = predict(model, pad_sequence(inputs, batch_first=True).to(device))
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
