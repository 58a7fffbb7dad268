"""The weights of Hugging Face's RWKV: initial values, and true weights of a model in eval mode, which divides them."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch


def init_weights(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``_init_weights``: a model of one layer works, and ``time_first`` is as in the training of the published."""

    @functools.wraps(original)
    @torch.no_grad()
    def _init_weights(self: Any, module: Any) -> None:
        # The import is here since transformers is an optional dependency.
        from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

        if not isinstance(module, RwkvSelfAttention):
            original(self, module)
            return
        config = module.config
        if config.num_hidden_layers == 1:  # l / (L - 1) is 0 / 0 there; the first of two layers has the same values
            module.config = copy.copy(config)
            module.config.num_hidden_layers = 2
        try:
            original(self, module)
        finally:
            module.config = config
        _init_time_first(module.time_first)

    return _init_weights


def _init_time_first(time_first: torch.nn.Parameter) -> None:
    channel = torch.arange(time_first.numel(), dtype=torch.float64, device=time_first.device)
    value = math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1)
    try:
        from transformers import initialization  # here, since transformers is an optional dependency
    except ImportError:  # transformers 4
        time_first.copy_(value)
    else:
        initialization.copy_(time_first, value)  # does not touch weights that were loaded from a file


def with_true_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of ``RwkvModel`` that reads or writes its weights: none of them is divided when it runs."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        _undo_rescaling(self)
        return original(self, *args, **kwargs)

    return method


@torch.no_grad()
def _undo_rescaling(model: Any) -> None:
    """Multiply by the powers of two that the model divided by; its next forward pass in eval mode divides again."""
    every = model.config.rescale_every
    if not model.layers_are_rescaled or every <= 0:
        return
    divided = [
        (linear.weight, 2 ** (layer // every))
        for layer, block in enumerate(model.blocks)
        for linear in (block.attention.output, block.feed_forward.value)
    ]
    if any(hasattr(weight, name) for weight, _ in divided for name in ("SCB", "quant_state")):
        return  # bitsandbytes has quantised them: it keeps the scale elsewhere, and rounds
    for weight, factor in divided:
        weight.mul_(factor)
    model.layers_are_rescaled = False
