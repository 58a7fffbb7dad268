"""Who computes an operator: what every provider has, this package's or a peer's, and how Triton is interpreted.

A peer that is not there says so and why (:meth:`Provider.missing`); it is imported when it is first asked for.
"""

import importlib
import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from ready import peers
from torch import Tensor

peers.add_to_path()

OPERATORS = {  # of this package, and the file of their Triton launchers; below, those without CPU path
    "wkv_fwd": "wkv",
    "wkv_bwd": "wkv_bwd",
    "wkv_step": "wkv_step",
    "linear_scan_fwd": "linear_scan",
    "linear_scan_bwd": "linear_scan_bwd",
    "linear_scan_bwd_": "linear_scan_bwd",
    "linear_scan_step": "linear_scan",
    "packed_edges": "packing",
}
ONLY_GPU = dict.fromkeys(("norm_mix_", "wkv_step_gated_", "relu_squared_", "add_gated_"), "rwkv4_step")


class Provider(ABC):
    """One implementation of an operator, with tensors and states in its own form."""

    name: str
    label: str  # in tables of errors
    about: str
    packages: tuple[str, ...] = ()
    """What has to be installed, by the name that is imported."""
    distribution: str | None = None
    """What records the version that was measured."""
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


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Put the Triton kernels behind the public functions for CPU tensors too, where they are interpreted."""
    override = torch.library.Library("fastwkv", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for operator, module in OPERATORS.items():
            launcher = getattr(importlib.import_module(f"fastwkv.kernels.{module}"), operator)
            override.impl(operator, launcher, "CPU", allow_override=True)
    try:
        yield
    finally:
        override._destroy()


@contextmanager
def rounding_interpreter() -> Iterator[None]:
    """Have Triton's interpreter round to bfloat16 as every GPU does. By itself it cuts the digits off."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != language.bfloat16 or source.dtype.scalar not in (language.float32, language.float64):
            return cast(self, source, target)
        bits = torch.tensor(source.data).bfloat16().view(torch.int16).numpy().view("uint16")
        return interpreter.TensorHandle(bits, target.scalar)

    builder.cast_impl = rounded
    try:
        yield
    finally:
        builder.cast_impl = cast


@contextmanager
def untuned() -> Iterator[None]:
    """Have Triton's autotuner take the first configuration. To compare them it needs a GPU."""
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    run = tuner.run

    def first(self: Any, *args: Any, **options: Any) -> Any:
        return self.fn.run(*args, **options, **self.configs[0].all_kwargs())

    tuner.run = first
    try:
        yield
    finally:
        tuner.run = run


def not_installed(package: str) -> str | None:
    """Return why a package cannot be used, None if it is there."""
    return None if importlib.util.find_spec(package) else "not installed"
