"""The measurement of lru_layer.py: a layer in several forms, each first compared with float64, then timed by turns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common.command_line import DTYPES
from common.light import reason
from layer.forms import FORMS
from peers.operator import judged, relative_error
from timing import by_turns
from timing.by_turns import Task
from timing.live_bytes import LiveBytes
from timing.on_gpu import Cuda, CudaTask
from timing.saved_bytes import kept_bytes
from torch import Tensor

from fastwkv.nn import LRU

RING = {"r_min": 0.9, "r_max": 0.999}  # |λ| as for long sequences
# This package's CPU path, which tests hold to 1e-12 of a loop; and the Fourier transforms do not know it.
REFERENCE = "fastwkv.nn.LRU in float64 on the CPU, of the same parameters and tokens"
COPIES = 16  # of small inputs, at most
FIGURES = ("ms", "ms_min", "quantiles", "ms_first", "repeats", *by_turns.ONLY_GPU, "saved_bytes", "error", "errors")

Shape = tuple[int, int, int, int]
Call = Callable[[LRU, Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A shape ``B, T, H, N`` and a dtype."""

    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Inputs:
    """The inputs of all forms: parameters by name, tokens and the gradient of the output."""

    parameters: dict[str, Tensor]
    u: Tensor
    gradient: Tensor

    def to(self, place: torch.device | torch.dtype) -> "Inputs":
        """Return the same on a device or in another dtype."""
        parameters = {name: one.to(place) for name, one in self.parameters.items()}
        return Inputs(parameters, self.u.to(place), self.gradient.to(place))

    def layer(self, form: type[LRU]) -> LRU:
        """Return a layer with these parameters."""
        N, H = self.parameters["B_re"].shape
        with torch.device("meta"):
            layer = form(H, N)
        layer.load_state_dict(self.parameters, assign=True)
        return layer.requires_grad_()

    def tokens(self) -> Tensor:
        """Return a copy of the tokens that asks for a gradient."""
        return self.u.clone().requires_grad_()


def draw(case: Case, seed: int) -> Inputs:
    """Draw inputs on the CPU: the same for every device."""
    B, T, H, N = case.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parameters = LRU(H, N, **RING).state_dict()
        return Inputs(parameters, torch.randn(B, T, H), torch.randn(B, T, H)).to(DTYPES[case.dtype])


def forward(layer: LRU, u: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Return the output."""
    with torch.no_grad():
        return (layer(u),)


def forward_backward(layer: LRU, u: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Return the output and all gradients."""
    y = layer(u)
    return y.detach(), *torch.autograd.grad(y, (u, *layer.parameters()), gradient)


PASSES: dict[str, Call] = {"forward": forward, "forward+backward": forward_backward}


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """Return output and gradients in float64."""
    exact = inputs.to(torch.float64)
    return named(forward_backward(exact.layer(LRU), exact.tokens(), exact.gradient))


def named(results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return results by what they are; those of the forward pass alone are the first."""
    parameters = [name for name, _ in LRU(1, 1).named_parameters()]
    return dict(zip(["y", "gu", *(f"g{name}" for name in parameters)], results, strict=False))


@dataclass
class Measurement:
    """The measurement of one case. ``done`` is called for every row."""

    case: Case
    providers: list[str]
    effort: by_turns.Effort
    cuda: Cuda | None
    done: Callable[[], Any]

    def rows(self, inputs: Inputs) -> list[dict[str, Any]]:
        """Compare and time all passes; return a row for each and each form."""
        wanted = expected(inputs)
        given = inputs.to(self.cuda.device) if self.cuda else inputs
        return [row for which in PASSES for row in self._pass(which, given, wanted)]

    def _pass(self, which: str, inputs: Inputs, wanted: dict[str, Tensor]) -> list[dict[str, Any]]:
        rows = {name: _row(self.case, which, name) for name in self.providers}
        others = by_turns.OtherWork()
        tasks: dict[str, Task] = {}
        for name, row in rows.items():
            try:
                task = _task(inputs.layer(FORMS[name]), which, inputs, self.cuda)
                row |= _looked_at(task, which, wanted, self.case.dtype)
                if row["status"] == "ok":
                    row |= _memory(FORMS[name], which, inputs, self.cuda)
                    tasks[name] = task
            except Exception as error:
                row |= _failed(error)
            if name not in tasks:
                self.done()
        by_turns.measure(list(tasks.values()), self.effort, self.done)
        cores = others.cores()
        for name, task in tasks.items():
            counted = {} if self.cuda else {"peak_bytes": rows[name]["peak_bytes"]}  # which no task on a CPU knows
            figures = _failed(task.failure) if task.failure else task.figures() | counted
            rows[name] |= figures | {"other_cores": cores}
        return list(rows.values())


def _task(layer: LRU, which: str, inputs: Inputs, cuda: Cuda | None) -> Task:
    def call(u: Tensor) -> tuple[Tensor, ...]:
        return PASSES[which](layer, u, inputs.gradient)

    if not cuda:
        u = inputs.tokens()
        return Task(call, inputs.u.device, lambda: u)
    copies = max(1, min(COPIES, -(-4 * cuda.cache // inputs.u.nbytes)))
    return CudaTask(call, cuda.device, cuda=cuda, make=inputs.tokens, copies=copies)


def _looked_at(task: Task, which: str, wanted: dict[str, Tensor], dtype: str) -> dict[str, Any]:
    """Call twice, the first time to have everything compiled, and compare."""
    task.run()
    results, task.first = task.run()
    errors = {name: relative_error(result.double(), wanted[name]) for name, result in named(results).items()}
    return judged(errors, dtype)


def _memory(form: type[LRU], which: str, inputs: Inputs, cuda: Cuda | None) -> dict[str, Any]:
    """Count the bytes that a graph keeps, and on a CPU those that a call takes; on a GPU its task knows them."""
    layer, u = inputs.layer(form), inputs.tokens()
    found: dict[str, Any] = {}
    if which != "forward":
        found["saved_bytes"] = kept_bytes(layer(u), [u, *layer.parameters()])
    if not cuda:
        with LiveBytes() as memory:
            results = PASSES[which](layer, u, inputs.gradient)
        del results
        found["peak_bytes"] = memory.peak
    return found


def _row(case: Case, which: str, provider: str) -> dict[str, Any]:
    row = {"pass": which, "dtype": case.dtype, **dict(zip("BTHN", case.shape, strict=True)), "provider": provider}
    return row | dict.fromkeys((*FIGURES, "other_cores")) | {"status": "ok", "reason": None}


def _failed(error: Exception) -> dict[str, Any]:
    return {"status": "failed", "reason": reason(error)}
