"""A provider computes an operator: this package or a peer, each in its own form.

A peer that is not there says so and why (:meth:`Provider.missing`); it is imported when it is first asked for.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from peers import fetched
from torch import Tensor

fetched.add_to_path()

OURS = "fastwkv"  # the provider that is this package


class Provider(ABC):
    """One implementation of an operator, with tensors and states in its own form."""

    name: str
    label: str  # in tables of errors
    about: str
    packages: tuple[str, ...] = ()
    """Packages that have to be installed, by the name that is imported."""
    distribution: str | None = None
    """The package whose version the record names."""
    language: str | None = None
    """Of its own GPU kernels, Triton or CUDA, if it is made of such. Triton can be interpreted elsewhere."""
    packs = False
    """Whether it takes packed sequences."""
    longest: int | None = None
    """Tokens that it is asked for on a GPU, if it takes too long for more."""
    loops = False
    """Whether it runs through the tokens in Python, so that nothing is compiled or tuned for a shape."""

    def missing(self, device: torch.device, *, interpreted: bool = False) -> str | None:
        """Return why it cannot run on this device, None if it can."""
        if self.language and device.type != "cuda" and not (interpreted and self.language == "Triton"):
            return "runs on a GPU only"
        return next((reason for package in self.packages if (reason := not_installed(package))), None)

    def refuses(self, which: str, inputs: Any) -> str | None:
        """Return why it has no such pass, or not with such inputs; None if it has."""
        return "takes no packed sequences" if inputs.cu_seqlens is not None and not self.packs else None

    def too_long(self, device: torch.device, which: str, tokens: int) -> str | None:
        """Return why it is not asked for so many tokens on this device, None if it is."""
        if device.type == "cpu" or self.longest is None or which == "step" or tokens <= self.longest:
            return None
        what = "a loop in Python" if self.loops else "compiled anew for every shape"
        return f"{what}, asked for {self.longest} tokens at most"

    @abstractmethod
    def leaves(self, inputs: Any, *, token: bool = False) -> Sequence[Tensor]:
        """Return what the output is differentiated by; with ``token`` that of the first token alone."""

    @abstractmethod
    def initial(self, states: Sequence[Tensor] | None, leaves: Sequence[Tensor]) -> Any:
        """Return what it takes in place of an initial state, or of none."""

    @abstractmethod
    def gradient_of_output(self, inputs: Any) -> Tensor:
        """Return what the backward pass starts from."""

    @abstractmethod
    def forward(self, leaves: Sequence[Tensor], initial: Any, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return the output; with ``cu_seqlens``, if it :attr:`packs`, that of packed sequences."""

    @abstractmethod
    def one_token(self, leaves: Sequence[Tensor], initial: Any) -> Any:
        """Return output and state after one token."""

    @abstractmethod
    def after_token(self, result: Any) -> dict[str, Tensor]:
        """Return what is compared of the result of :meth:`one_token`."""

    def in_our_form(self, name: str, result: Tensor, inputs: Any) -> Tensor:
        """Return an output, or the gradient of a leaf, in the form of the reference."""
        return result


def not_installed(package: str) -> str | None:
    """Return why a package cannot be used, None if it is there."""
    return None if importlib.util.find_spec(package) else "not installed"
