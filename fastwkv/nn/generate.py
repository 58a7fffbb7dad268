"""Text generation, a token at a time."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastwkv.nn.rwkv4 import RWKV4
from fastwkv.nn.state import RWKV4State


def generate(
    model: RWKV4,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    state: RWKV4State | None = None,
) -> "Generation":
    """Continue a batch of texts, yielding each new token as soon as it is known.

    The prompt is read in parallel, then every token costs one recurrent step: the same time and memory at any length.
    A token is the most likely one at temperature 0. Otherwise it is drawn from softmax(logits / temperature),
    restricted to the smallest set of most likely tokens whose probabilities reach ``top_p`` together ("The Curious
    Case of Neural Text Degeneration", arXiv 1904.09751, section 3.1).

    The model runs in inference mode, the code between two yields does not. Arguments are checked at the call, not at
    the first token.

    Args:
        model: an :class:`~fastwkv.nn.RWKV4`.
        tokens: int64 or int32 ``[B, T]``, the prompts, T at least 1.
        max_new_tokens: how many tokens to yield, 0 or more.
        temperature: 0 or more.
        top_p: above 0, at most 1. With temperature 0 it changes nothing.
        seed: of this call's own random generator, on the device of the model; None draws a new one.
        state: what the model remembers of the text before the prompt; empty if None.

    Returns:
        an iterator over int64 ``[B]``, one new token of every text, that also knows the state: :class:`Generation`.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range, or ``tokens`` or ``state`` does not fit the model.

    """
    if not isinstance(model, RWKV4):
        raise TypeError(f"model must be an RWKV4, got {type(model).__name__}")
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool):
        raise TypeError(f"max_new_tokens must be an int, got {type(max_new_tokens).__name__}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise TypeError(f"seed must be an int or None, got {type(seed).__name__}")
    model.check_inputs(tokens, state)
    generator = torch.Generator(model.head.weight.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return Generation(
        model, tokens, max_new_tokens, partial(sample, temperature=temperature, top_p=top_p, generator=generator), state
    )


class Generation(Iterator[Tensor]):
    """New tokens as they become known, int64 ``[B]`` each: what :func:`generate` returns."""

    def __init__(
        self,
        model: RWKV4,
        tokens: Tensor,
        max_new_tokens: int,
        sample: Callable[[Tensor], Tensor],
        state: RWKV4State | None,
    ) -> None:
        self._model = model
        self._tokens = tokens
        self._left = max_new_tokens
        self._sample = sample
        self._state = state

    def __next__(self) -> Tensor:
        if not self._left:
            raise StopIteration
        with torch.inference_mode():
            x, self._state = self._model.features(self._tokens, self._state)
            token = self._sample(self._model.head(x[:, -1]))
            self._tokens = token[:, None]
        self._left -= 1
        return token.clone()  # made outside inference mode, so that the caller may train on it

    @property
    def state(self) -> RWKV4State | None:
        """What the model remembers of all that it has read: everything before the latest token; at first what came in.

        To continue, hand it to :func:`generate` with the latest token as the prompt.
        """
        return None if self._state is None else self._state.clone()


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Draw a token ``[B]`` from logits ``[B, V]``, as :func:`generate` says."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    probabilities = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)  # however small it is
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        # The likeliest token always stays: nothing comes before it.
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(before >= top_p, 0))
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
