"""The passes that ops.py times: how each is called, what it returns, how many bytes it has to move."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import wkv_inputs
from ops_timing import Task
from providers import Provider
from torch import Tensor
from wkv_inputs import Inputs

from fastwkv import WKVState

CHECKED = 4_000_000  # elements; of larger inputs only some channels are compared with the reference


@dataclass(frozen=True)
class Pass:
    """What is timed: ``call`` of what ``prepare`` made of (decay, u, k, v, state, gy)."""

    prepare: Callable[[Provider, tuple], Any]
    call: Callable[[Provider, Any], tuple]
    results: tuple[str, ...]
    elements: int  # read and written for each of k's, in its dtype
    states: int = 0  # float32 numbers read and written for each of k's


def _as_it_is(provider: Provider, arguments: tuple) -> tuple:
    return arguments


def _forward(provider: Provider, arguments: tuple) -> tuple:
    with torch.no_grad():
        return (provider.wkv(*arguments[:5]),)


def _graph(provider: Provider, arguments: tuple) -> tuple:
    return provider.wkv(*arguments[:5]), arguments


def _backward(provider: Provider, prepared: tuple) -> tuple:
    y, arguments = prepared
    return torch.autograd.grad(y, arguments[:4], arguments[5])


def _forward_backward(provider: Provider, arguments: tuple) -> tuple:
    y = provider.wkv(*arguments[:5])
    return y.detach(), *torch.autograd.grad(y, arguments[:4], arguments[5])


def _step(provider: Provider, arguments: tuple) -> tuple:
    decay, u, k, v, state, _ = arguments
    with torch.no_grad():
        return provider.step(decay, u, k, v, state)


GRADIENTS = ("gw", "gu", "gk", "gv")
PASSES = {
    "forward": Pass(_as_it_is, _forward, ("y",), 3),
    "backward": Pass(_graph, _backward, GRADIENTS, 5),
    "forward+backward": Pass(_as_it_is, _forward_backward, ("y", *GRADIENTS), 8),
    "step": Pass(_as_it_is, _step, ("y", "mean", "log_weight"), 3, 6),
}


def arguments(provider: Provider, which: str, inputs: Inputs, place: torch.device) -> tuple:
    """Return (decay, u, k, v, state, gy) in the form of the provider; a step follows the inputs' initial state."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(place, copy=True, memory_format=torch.contiguous_format).requires_grad_()

    step = which == "step"
    k, v = (inputs.k[:, 0], inputs.v[:, 0]) if step else (inputs.k, inputs.v)
    decay, u, k, v = map(leaf, (provider.decay(inputs), inputs.u, k, v))
    state = WKVState(*(s.to(place) for s in inputs.state)) if step else None
    return decay, u, k, v, provider.state(state, inputs.k.to(place)), inputs.gy.to(place)


def task(provider: Provider, which: str, inputs: Inputs, place: torch.device, copies: int = 1) -> Task:
    """Return the call that is timed. It takes so many copies of the inputs in turn."""
    one = PASSES[which]
    ring = itertools.cycle([arguments(provider, which, inputs, place) for _ in range(copies)])
    return Task(lambda prepared: one.call(provider, prepared), place, lambda: one.prepare(provider, next(ring)))


def errors(provider: Provider, which: str, inputs: Inputs, results: tuple, wanted: dict[str, Tensor]) -> dict:
    """Return the relative error of each result, on the channels that the reference has."""
    if which == "step":
        y, state = results
        found = {"y": y, **wkv_inputs.invariants(provider.unpacked(state))}
    else:
        found = dict(zip(PASSES[which].results, results, strict=True))
    if "gw" in found:
        found["gw"] = provider.gradient_of_w(found["gw"].cpu(), inputs.w)
    channels = checked_channels(inputs)
    return {name: wkv_inputs.relative_error(found[name][..., channels], wanted[name]) for name in found}


def checked_channels(inputs: Inputs) -> slice:
    """Return the channels that are compared with the reference: all, of very large inputs some."""
    return slice(None, None, -(-inputs.k.numel() // CHECKED))


def compulsory_bytes(which: str, inputs: Inputs) -> int:
    """Return the bytes that have to be read or written whatever the implementation."""
    one, k = PASSES[which], inputs.k
    wide = 8 if k.dtype == torch.float64 else 4
    return (one.elements * k.itemsize + one.states * wide) * (k[:, 0] if which == "step" else k).numel()
