"""What an operator and its inputs are to ops.py and accuracy.py. What each one is says its own file."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from providers import Provider
from torch import Tensor

Shape = tuple[int, int, int]
ROUNDING = {"bfloat16": 4e-3, "float16": 5e-4}  # of what is stored in 16 bits


class Inputs(Protocol):
    """One call and the gradient of its output."""

    @property
    def shape(self) -> Shape:
        """B, T, C."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what is read and written at every token."""

    @property
    def states(self) -> tuple[Tensor, ...]:
        """The initial state."""

    def part(self, tokens: int, channels: slice = slice(None)) -> "Inputs":
        """Return the first tokens of some channels."""


@dataclass(frozen=True)
class Traffic:
    """What a pass has to read and write, in numbers for each token and channel."""

    elements: int
    """In the dtype of the inputs."""
    states: int = 0
    """In the dtype of the states."""


class Operator(ABC):
    """An operator: its inputs, its reference, what its passes return and move, who computes it."""

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    default_dtype: ClassVar[str]  # of ops.py; the targets hold in it
    accuracy_dtypes: ClassVar[tuple[str, ...]]  # of accuracy.py
    shapes: ClassVar[tuple[Shape, ...]]
    quick_shapes: ClassVar[tuple[Shape, ...]]
    output: ClassVar[str]
    gradients: ClassVar[tuple[str, ...]]  # of a provider's leaves, in their order
    results: ClassVar[tuple[str, ...]]  # in the order of tables, the gradient of the initial state last
    traffic: ClassVar[Mapping[str, Traffic]]  # of every pass
    # How many times faster than a peer this package should be on two CPU cores, by pass, shape and peer.
    targets: ClassVar[Mapping[tuple[str, Shape, str], float]] = {}
    providers: Mapping[str, Provider]

    @abstractmethod
    def draw(self, kind: str, shape: Shape, dtype: torch.dtype, seed: int) -> Inputs:
        """Return inputs of a kind, "ordinary" or "adversarial"."""

    @abstractmethod
    def expected(self, inputs: Inputs, *, state: bool) -> dict[str, Tensor]:
        """Return output and gradients by the float64 reference; with ``state`` the initial state takes part."""

    @abstractmethod
    def expected_step(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return what is compared after the first token, which follows the initial state."""

    @abstractmethod
    def allowed(self, kind: str, dtype: str, tokens: int) -> dict[str, float]:
        """Return the largest error of each result that this package promises."""

    def compulsory_bytes(self, which: str, inputs: Inputs) -> int:
        """Return the bytes that a pass has to read or write whatever the implementation."""
        B, T, C = inputs.shape
        one = self.traffic[which]
        size = one.elements * inputs.dtype.itemsize + one.states * state_dtype(inputs.dtype).itemsize
        return size * B * C * (1 if which == "step" else T)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states and parameters: float32 beside 16 bits, else the same."""
    return torch.promote_types(dtype, torch.float32)


def relative_error(result: Tensor, wanted: Tensor) -> float:
    """Return ‖result - wanted‖₂ / ‖wanted‖₂, NaN if the result has one."""
    result, wanted = (t.detach().cpu().to(torch.promote_types(t.dtype, torch.float64)) for t in (result, wanted))
    if (result.shape, result.dtype) != (wanted.shape, wanted.dtype):
        got, expected = (f"{list(t.shape)} {t.dtype}" for t in (result, wanted))
        raise ValueError(f"expected {expected}, got {got}")
    error, size = (result - wanted).norm().item(), wanted.norm().item()
    return error / size if size else error


def draws(seed: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return two functions that draw float64 tensors of a shape: normal, and uniform on [0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    return normal, uniform
