"""The passes that ops.py times, of any operator: how each is called, what it returns, how far that is from right."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from operator_base import Inputs, Operator, relative_error
from ops_timing import Task
from providers import Provider
from torch import Tensor

CHECKED = 4_000_000  # elements; of larger inputs only some channels are compared with the reference


@dataclass(frozen=True)
class Arguments:
    """What a provider is called with, in its own form."""

    leaves: tuple[Tensor, ...]
    initial: Any
    gradient: Tensor


@dataclass(frozen=True)
class Pass:
    """What is timed: ``call`` of what ``prepare`` made of the arguments."""

    prepare: Callable[[Provider, Arguments], Any]
    call: Callable[[Provider, Any], Any]
    output: bool
    """Whether it returns the output."""
    gradients: bool = False
    """Whether it returns the gradients, after the output."""


def _as_it_is(provider: Provider, arguments: Arguments) -> Arguments:
    return arguments


def _forward(provider: Provider, arguments: Arguments) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (provider.forward(arguments.leaves, arguments.initial),)


def _graph(provider: Provider, arguments: Arguments) -> tuple[Tensor, Arguments]:
    return provider.forward(arguments.leaves, arguments.initial), arguments


def _backward(provider: Provider, prepared: tuple[Tensor, Arguments]) -> tuple[Tensor, ...]:
    output, arguments = prepared
    return torch.autograd.grad(output, arguments.leaves, arguments.gradient)


def _forward_backward(provider: Provider, arguments: Arguments) -> tuple[Tensor, ...]:
    output, _ = _graph(provider, arguments)
    return output.detach(), *_backward(provider, (output, arguments))


def _step(provider: Provider, arguments: Arguments) -> Any:
    with torch.no_grad():
        return provider.one_token(arguments.leaves, arguments.initial)


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
    return Arguments(leaves, provider.initial(states, leaves), provider.gradient_of_output(inputs).to(place))


def task(provider: Provider, which: str, inputs: Inputs, place: torch.device, copies: int = 1) -> Task:
    """Return the call that is timed. It takes so many copies of the inputs in turn."""
    one = PASSES[which]
    ring = itertools.cycle([arguments(provider, which, inputs, place) for _ in range(copies)])
    return Task(lambda prepared: one.call(provider, prepared), place, lambda: one.prepare(provider, next(ring)))


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
    """Return the channels that are compared with the reference: all, of very large inputs some."""
    B, T, C = inputs.shape
    return slice(None, None, -(-B * T * C // CHECKED))
