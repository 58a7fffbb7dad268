"""The Triton kernels behind the public functions, for CPU tensors: interpreted, and rounding as every GPU does."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import fastwkv  # noqa: F401 (registers the operators)
from fastwkv.ops.library import OPERATORS


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Give CPU tensors to the launchers of the Triton kernels too, those without a CPU path among them."""
    override = torch.library.Library("fastwkv", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, module in OPERATORS.items():
            launcher = getattr(importlib.import_module(f"fastwkv.kernels.{module}"), name)
            override.impl(name, launcher, "CPU", allow_override=True)
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
