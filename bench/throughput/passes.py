"""The passes that ops.py times, of any operator: how each is called, what it returns, how far that is from right."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peers.operator import Inputs, Operator, relative_error
from peers.provider import OURS, Provider
from timing.by_turns import Task
from timing.on_gpu import Cuda, CudaTask, StepTask
from timing.saved_bytes import kept_bytes
from torch import Tensor

# Elements; of larger inputs only some channels are compared with the reference, whose loop holds up a GPU.
CHECKED = {"cpu": 4_000_000, "cuda": 1_000_000}
COPIES = 16  # of small inputs, at most


@dataclass(frozen=True)
class Arguments:
    """The arguments of a provider, in its own form."""

    leaves: tuple[Tensor, ...]
    initial: Any
    gradient: Tensor
    cu_seqlens: Tensor | None = None


@dataclass(frozen=True)
class Pass:
    """The timed part of a pass: ``call`` of whatever ``prepare`` made of the arguments."""

    prepare: Callable[[Provider, Arguments], Any]
    call: Callable[[Provider, Any], Any]
    output: bool
    """Whether it returns the output."""
    gradients: bool = False
    """Whether it returns the gradients, after the output."""


def _as_it_is(provider: Provider, arguments: Arguments) -> Arguments:
    return arguments


def _output(provider: Provider, arguments: Arguments) -> Tensor:
    return provider.forward(arguments.leaves, arguments.initial, arguments.cu_seqlens)


def _forward(provider: Provider, arguments: Arguments) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (_output(provider, arguments),)


def _graph(provider: Provider, arguments: Arguments) -> tuple[Tensor, Arguments]:
    return _output(provider, arguments), arguments


def _backward(provider: Provider, prepared: tuple[Tensor, Arguments]) -> tuple[Tensor, ...]:
    output, arguments = prepared
    return torch.autograd.grad(output, arguments.leaves, arguments.gradient)


def _forward_backward(provider: Provider, arguments: Arguments) -> tuple[Tensor, ...]:
    output = _output(provider, arguments)
    return output.detach(), *_backward(provider, (output, arguments))


def _step(provider: Provider, arguments: Arguments) -> Any:
    with torch.no_grad():
        return provider.one_token(arguments.leaves, arguments.initial)


def _following(arguments: Arguments, result: Any) -> Arguments:
    """Return the same token after the state that this package's step has returned, with the output or as the output."""
    return replace(arguments, initial=result[1] if isinstance(result, tuple) else result)


PASSES = {
    "forward": Pass(_as_it_is, _forward, output=True),
    "backward": Pass(_graph, _backward, output=False, gradients=True),
    "forward+backward": Pass(_as_it_is, _forward_backward, output=True, gradients=True),
    "step": Pass(_as_it_is, _step, output=True),
}


def arguments(provider: Provider, which: str, inputs: Inputs, place: torch.device) -> Arguments:
    """Return copies of the inputs in the form of the provider; a step follows their initial state."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(place, copy=True, memory_format=torch.contiguous_format).requires_grad_()

    token = which == "step"
    leaves = tuple(leaf(one) for one in provider.leaves(inputs, token=token))
    states = [one.to(place) for one in inputs.states] if token else None
    initial, gradient = provider.initial(states, leaves), leaf(provider.gradient_of_output(inputs)).detach()
    return Arguments(leaves, initial, gradient, None if inputs.cu_seqlens is None else inputs.cu_seqlens.to(place))


def task(provider: Provider, which: str, inputs: Inputs, place: torch.device) -> Task:
    """Return the call that is timed on a CPU, whose cache is part of what a model there lives in."""
    one, made = PASSES[which], arguments(provider, which, inputs, place)
    return Task(lambda prepared: one.call(provider, prepared), place, lambda: one.prepare(provider, made))


def cuda_task(operator: Operator, provider: Provider, which: str, inputs: Inputs, cuda: Cuda) -> CudaTask:
    """Return the call that is timed on a GPU, with as many copies of its inputs as its cache cannot hold.

    Those of a step are small: its cache holds all copies, as it would hold what a model has just computed. Our own step
    is timed inside a CUDA graph too.
    """
    one, place = PASSES[which], cuda.device
    size = operator.compulsory_bytes("step" if which == "step" else "forward", inputs)
    kind = partial(StepTask, following=_following) if which == "step" and provider.name == OURS else CudaTask
    return kind(
        lambda prepared: one.call(provider, prepared),
        place,
        cuda=cuda,
        make=lambda: arguments(provider, which, inputs, place),
        prepare=lambda made: one.prepare(provider, made),
        copies=max(1, min(COPIES, -(-4 * cuda.cache // size))),
        holds=one.prepare is _graph,
    )


def saved_bytes(provider: Provider, which: str, inputs: Inputs, place: torch.device) -> int | None:
    """Return the bytes kept for the backward pass beyond inputs and output, None for passes without one."""
    if not PASSES[which].gradients:
        return None
    given = arguments(provider, which, inputs, place)
    return kept_bytes(_output(provider, given), [*given.leaves, given.initial, given.cu_seqlens])


def errors(
    operator: Operator, provider: Provider, which: str, inputs: Inputs, results: Any, wanted: dict[str, Tensor]
) -> dict[str, float]:
    """Return the relative error of each result, on the channels that the reference has."""
    if which == "step":
        found = provider.after_token(results)
    else:
        one = PASSES[which]
        names = (operator.output,) * one.output + operator.gradients * one.gradients
        found = {name: provider.in_our_form(name, result, inputs) for name, result in zip(names, results, strict=True)}
    channels = checked_channels(inputs)
    return {name: relative_error(result[..., channels], wanted[name]) for name, result in found.items()}


def checked_channels(inputs: Inputs) -> slice:
    """Return the channels that are compared with the reference: all, of very large inputs some, even and odd ones."""
    B, T, C = inputs.shape
    return slice(None, None, -(-B * T * C // CHECKED[inputs.gradient.device.type]) | 1)
