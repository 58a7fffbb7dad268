"""An operator as ops.py and accuracy.py see it: its inputs, passes, bytes, targets and bounds, and its providers.

A new operator is described in one file of this room, as wkv.py is, and listed in operators.py.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from peers.provider import Provider
from torch import Tensor
from torch.utils._pytree import tree_map

Shape = tuple[int, int, int]
CPU = torch.device("cpu")
ROUNDING = {"bfloat16": 4e-3, "float16": 5e-4}  # of what is stored in 16 bits
# ‖error‖/‖reference‖ beyond which a result is wrong: far above rounding, far below any mistake.
WRONG = {
    "float64": 1e-9,
    "complex128": 1e-9,
    "float32": 1e-4,
    "complex64": 1e-4,
    "float16": 5e-3,
    "bfloat16": 3e-2,
}
GPU_SHAPES: tuple[Shape, ...] = (  # training, then long sequences by themselves
    (8, 1024, 768),
    (8, 4096, 2048),
    (8, 4096, 4096),
    (32, 1024, 1024),
    (1, 16384, 1024),
    (1, 65536, 1024),
    (1, 131072, 2560),
)
DOCUMENT = (16, 8192)  # tokens of the shortest and of the longest packed document


@dataclass(frozen=True)
class Inputs(ABC):
    """One call and the gradient of its output, whose tensors ``[B, T, C]``, ``[B, C]`` or ``[C]`` an operator adds."""

    cu_seqlens: Tensor | None = field(default=None, kw_only=True)
    """Offsets of packed sequences."""

    @property
    @abstractmethod
    def gradient(self) -> Tensor:
        """The gradient of the output, ``[B, T, C]``."""

    @property
    @abstractmethod
    def states(self) -> tuple[Tensor, ...]:
        """The initial state."""

    @property
    def shape(self) -> Shape:
        """B, T, C."""
        B, T, C = self.gradient.shape
        return B, T, C

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensors that are read and written at every token."""
        return self.gradient.dtype

    def part(self, tokens: int, channels: slice = slice(None)) -> "Inputs":
        """Return the first tokens of some channels."""
        cut = self._each(lambda t: t[..., channels][:, :tokens] if t.dim() == 3 else t[..., channels])
        return replace(cut, cu_seqlens=first_tokens(self.cu_seqlens, tokens))

    def packed(self, cu_seqlens: Tensor) -> "Inputs":
        """Return the same tokens as packed sequences."""
        return replace(self, cu_seqlens=cu_seqlens.to(self.gradient.device))

    def on(self, device: torch.device) -> "Inputs":
        """Return the same on a device."""
        moved = self._each(lambda t: t.to(device))
        return moved if self.cu_seqlens is None else moved.packed(self.cu_seqlens)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "cu_seqlens"}
        return replace(self, **tree_map(change, own))


@dataclass(frozen=True)
class Traffic:
    """Numbers that a pass has to read and write, for each token and channel."""

    elements: int
    """In the dtype of the inputs."""
    states: int = 0
    """In the dtype of the states."""


class Goal(NamedTuple):
    """The speed that this package should reach on a GPU."""

    where: Callable[[int, int, int], bool]
    """Whether it is meant for B, T, C."""
    least: Mapping[tuple[str, str], float]
    """Of the copy bandwidth, on compulsory bytes, by pass and dtype."""


class Operator(ABC):
    """An operator: its inputs, its reference, the results and the traffic of its passes, its providers."""

    name: ClassVar[str]
    title: ClassVar[str]  # of figures
    dtypes: ClassVar[tuple[str, ...]]
    default_dtype: ClassVar[str]  # of ops.py on a CPU; the targets hold in it
    gpu_dtypes: ClassVar[tuple[str, ...]]  # of ops.py on a GPU
    accuracy_dtypes: ClassVar[tuple[str, ...]]  # of accuracy.py
    shapes: ClassVar[tuple[Shape, ...]]  # of ops.py on a CPU
    quick_shapes: ClassVar[tuple[Shape, ...]]
    output: ClassVar[str]
    gradients: ClassVar[tuple[str, ...]]  # of a provider's leaves, in their order
    results: ClassVar[tuple[str, ...]]  # in the order of tables, the gradient of the initial state last
    traffic: ClassVar[Mapping[str, Traffic]]  # of every pass
    # Speed-ups over a peer that this package should reach on two CPU cores, by pass, shape and peer.
    targets: ClassVar[Mapping[tuple[str, Shape, str], float]] = {}
    goals: ClassVar[tuple[Goal, ...]] = ()
    # Speed-ups over the best peer that it should reach on a GPU; the first that is meant for a shape counts.
    gpu_ratios: ClassVar[tuple[tuple[Callable[[int, int, int], bool], float], ...]] = ()
    providers: Mapping[str, Provider]
    stateless: Mapping[str, Provider] = MappingProxyType({})
    """Providers without an initial state, which accuracy.py leaves out."""

    @abstractmethod
    def draw(self, kind: str, shape: Shape, dtype: torch.dtype, seed: int, device: torch.device = CPU) -> Inputs:
        """Return inputs of a kind, "ordinary" or "adversarial". They differ from device to device."""

    @abstractmethod
    def expected(self, inputs: Inputs, *, state: bool, own: bool = False) -> dict[str, Tensor]:
        """Return output and gradients by the float64 reference; with ``state`` the initial state takes part.

        The reference is a loop. ``own`` has this package's CPU path compute the same, in float64 too.
        """

    @abstractmethod
    def expected_step(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return all that is compared after the first token, which follows the initial state."""

    @abstractmethod
    def allowed(self, kind: str, dtype: str, tokens: int) -> dict[str, float]:
        """Return the largest error of each result that this package promises."""

    def compulsory_bytes(self, which: str, inputs: Inputs) -> int:
        """Return the bytes that a pass has to read or write whatever the implementation."""
        B, T, C = inputs.shape
        one = self.traffic[which]
        size = one.elements * inputs.dtype.itemsize + one.states * state_dtype(inputs.dtype).itemsize
        return size * B * C * (1 if which == "step" else T)

    def all_providers(self) -> dict[str, Provider]:
        """Return everyone that ops.py knows, this package first."""
        return {**self.providers, **self.stateless}

    def gpu_fraction(self, which: str, dtype: str, shape: Shape) -> float | None:
        """Return the fraction of the copy bandwidth to be reached on a GPU, if there is a goal."""
        found = [goal.least.get((which, dtype)) for goal in self.goals if goal.where(*shape)]
        return max((one for one in found if one is not None), default=None)

    def gpu_ratio(self, shape: Shape) -> float | None:
        """Return how many times faster than every peer it should be on a GPU, if there is a goal."""
        return next((ratio for where, ratio in self.gpu_ratios if where(*shape)), None)


def shape_name(shape: Shape) -> str:
    """Return 8x1024x768, as options take it and tables show it."""
    return "x".join(map(str, shape))


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


def judged(errors: dict[Any, float], dtype: str) -> dict[str, Any]:
    """Return the entries of a row about the errors of its results, whose status is "wrong" if one is too large."""
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    found: dict[str, Any] = {"error": errors[worst], "errors": errors, "status": "ok", "reason": None}
    if errors[worst] <= WRONG[dtype]:  # NaN is not
        return found
    return found | {"status": "wrong", "reason": f"error of {worst} {errors[worst]:.1e} > {WRONG[dtype]:.0e}"}


def draws(seed: int, device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return two functions that draw float64 tensors of a shape: normal, and uniform on [0, 1)."""
    options = {"generator": torch.Generator(device).manual_seed(seed), "dtype": torch.float64, "device": device}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, **options)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, **options)

    return normal, uniform


def documents(tokens: int, seed: int) -> Tensor:
    """Return cu_seqlens of documents that fill so many tokens, their lengths log-uniform; the last one is cut off."""
    _, uniform = draws(seed, CPU)
    shortest, longest = DOCUMENT
    lengths = (shortest * (longest / shortest) ** uniform(1 + tokens // shortest)).long().tolist()
    ends = [end for end in accumulate(lengths) if end < tokens]
    return torch.tensor([0, *ends, tokens])


def first_tokens(cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
    """Return cu_seqlens of the first tokens alone."""
    return None if cu_seqlens is None else cu_seqlens.clamp(max=tokens).unique_consecutive()
