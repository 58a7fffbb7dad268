"""Text generation, a token at a time."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastwkv.nn.cuda_graph import Graph, RecordingError, why_no_graph
from fastwkv.nn.prefill import read
from fastwkv.nn.rwkv4 import RWKV4
from fastwkv.nn.state import RWKV4State
from fastwkv.ops.checks import type_name


def generate(
    model: RWKV4,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    state: RWKV4State | None = None,
    graph: bool | None = None,
) -> "Generation":
    """Continue a batch of prompts, yielding each new token as soon as it is known.

    The prompt is read in parallel, in pieces of a fixed number of tokens; :func:`fastwkv.nn.prefill.read` tells how the
    numbers compare with those of one piece. Then every token costs one recurrent step: the same time and memory at any
    length. At temperature 0 a token is the most likely one. Otherwise it is sampled from softmax(logits / temperature),
    restricted to the smallest set of most likely tokens whose probabilities reach ``top_p`` together ("The Curious
    Case of Neural Text Degeneration", arXiv 1904.09751, section 3.1).

    The model runs in inference mode, the code between two yields does not. Arguments are checked at the call, not at
    the first token.

    On a GPU the second token is also recorded, all layers and the sampling, in a CUDA graph of this call's own, and
    every later one is a single launch of it: the same tokens, without the time that a host takes to start each kernel.
    Between tokens the weights may be changed in place, but not replaced, moved or converted; hooks, contexts and
    ``model.train()`` after the second token have no effect. Nothing waits for the device, with a graph or without.

    Args:
        model: the model, a :class:`~fastwkv.nn.RWKV4`.
        tokens: int64 or int32 ``[B, T]``, the prompts, T at least 1, of tokens below V as for :meth:`RWKV4.forward`.
        max_new_tokens: the number of tokens to yield, 0 or more.
        temperature: the temperature of the sampling, 0 or more.
        top_p: the probability that the tokens to sample from reach together, above 0 and at most 1. With temperature 0
            it changes nothing.
        seed: the seed of this call's own random generator, on the device of the model; None for a new seed at each
            call.
        state: the state of the model after the tokens before the prompt; empty if None.
        graph: whether to record. With None it records if the model is on a GPU, has no forward hooks, is not compiled
            or being compiled, autocast is off and no other graph is being recorded; if the recording then fails,
            generation goes on without, and a warning tells the reason. With True a graph that cannot be is an error.

    Returns:
        An iterator over int64 ``[B]``, one new token of every sequence, that also has the state: :class:`Generation`.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range, ``tokens`` or ``state`` does not fit the model, a token is outside its
            vocabulary (found on a CPU only), or ``graph`` is True and there is a reason against it, which may show at
            the second token.

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
    if graph is not None and not isinstance(graph, bool):
        raise TypeError(f"graph must be a bool or None, got {type_name(graph)}")
    model.check_inputs(tokens, state)
    if tokens.device.type == "cpu":
        model.check_vocabulary(tokens)
    device = model.head.weight.device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    reason = "it is not wanted" if graph is False else why_no_graph(model, device)
    if graph and reason:
        raise ValueError(f"graph=True cannot be: {reason}")
    sampler = partial(sample, temperature=temperature, top_p=top_p, generator=generator)
    recorder = None if reason else Graph(device, generator)
    return Generation(model, tokens, max_new_tokens, sampler, state, recorder, must_record=graph is True)


class Generation(Iterator[Tensor]):
    """New tokens as they become known, int64 ``[B]`` each: the result of :func:`generate`."""

    def __init__(
        self,
        model: RWKV4,
        tokens: Tensor,
        max_new_tokens: int,
        sampler: Callable[[Tensor], Tensor],
        state: RWKV4State | None,
        graph: Graph | None = None,
        must_record: bool = False,
    ) -> None:
        self._model = model
        self._prompt = tokens
        self._left = max_new_tokens
        self._sampler = sampler
        self._first_state = state
        self._step: _Step | None = None
        self._graph = graph
        self._must_record = must_record
        self._recorded = False

    def __next__(self) -> Tensor:
        if not self._left:
            raise StopIteration
        if self._step is None:
            self._step = self._read_prompt(self._prompt)
        elif self._graph is None or (self._left == 1 and not self._recorded):  # no token would follow the recording
            with torch.inference_mode():
                self._step()
        elif self._recorded:
            self._graph.replay()
        else:
            self._record(self._step, self._graph)
        self._left -= 1
        return self._step.token.clone()  # made outside inference mode, so that the caller may train on it

    def _read_prompt(self, prompt: Tensor) -> "_Step":
        with torch.inference_mode():
            x, state = read(self._model, prompt, self._first_state)
            return _Step(self._model, self._sampler, self._sampler(self._model.head(x)), state)

    def _record(self, step: "_Step", graph: Graph) -> None:
        """Make a token, and record its computation if that is still possible."""
        self._graph = None
        reason = why_no_graph(self._model, step.token.device)
        if reason is None:
            try:
                graph.capture(step)
                self._graph, self._recorded = graph, True
            except RecordingError as error:
                reason = str(error)
                if not self._must_record:
                    warnings.warn(f"generating without a CUDA graph: {reason}", stacklevel=3)
        else:
            with torch.inference_mode():
                step()
        if reason is not None and self._must_record:
            self._left = 0
            raise ValueError(f"graph=True cannot be: {reason}")

    @property
    def uses_graph(self) -> bool:
        """Whether tokens are launches of a CUDA graph, as they can be from the third on."""
        return self._recorded

    @property
    def state(self) -> RWKV4State | None:
        """The state of the model after all tokens but the latest; before the first token, the initial state.

        To continue, hand it to :func:`generate` with the latest token as the prompt.
        """
        state = self._first_state if self._step is None else self._step.state
        return None if state is None else state.clone()


class _Step:
    """A function that makes the next token from the latest, in fixed memory, as a CUDA graph requires.

    Args:
        model: the model.
        sampler: a function that samples tokens ``[B]`` from logits ``[B, V]``.
        token: int64 ``[B]``, the latest token, which has not been read.
        state: the state before it.

    """

    def __init__(self, model: RWKV4, sampler: Callable[[Tensor], Tensor], token: Tensor, state: RWKV4State) -> None:
        self._model = model
        self._sampler = sampler
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
            self.token, self.state = token.clone(), state.clone()

    def __call__(self) -> None:
        x = self._model.step_(self.token, self.state)
        self.token.copy_(self._sampler(self._model.head(x)))


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Sample tokens ``[B]`` from logits ``[B, V]``, as :func:`generate` describes."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    probabilities = torch.softmax(
        (logits - logits.amax(-1, keepdim=True)) / temperature, -1
    )  # finite for any temperature
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        # The sum is float64: a GPU adds in an order that differs from run to run, on which no token should depend.
        before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        # The likeliest token always stays: nothing comes before it.
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(before >= top_p, 0))
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
