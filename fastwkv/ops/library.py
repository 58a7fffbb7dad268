"""Registration with PyTorch's dispatcher, which picks the launcher by the device: there is no other dispatch."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

_library = torch.library.Library("fastwkv", "DEF")

OPERATORS: dict[str, str] = {}
"""The registered operators, each with the module of ``kernels`` that has its launcher."""


def operator(module: str, *, mutates: tuple[str, ...] = (), cpu: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Register the operator that the decorated function describes, ``torch.ops.fastwkv.<name>``, and return it.

    The function is the operator's fake: it has its name, its annotated arguments make the schema, and it returns
    tensors of the shapes and dtypes of the results, of which nothing is computed. The launchers have the same name and
    take the same arguments.

    A launcher is imported at its first call. So importing the package needs neither Triton nor numba, and a machine
    without Triton still has the CPU path.

    Args:
        module: the module of ``kernels`` and of ``kernels.cpu`` that the launchers are in.
        mutates: the arguments that the operator writes to.
        cpu: whether there is a launcher for the CPU. Without one the callers do without the operator there.

    """

    def register(fake: Callable[..., Any]) -> Any:
        name = fake.__name__
        OPERATORS[name] = module
        schema = torch.library.infer_schema(fake, op_name=name, mutates_args=mutates)
        _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
        if cpu:
            _library.impl(name, _launcher(f"fastwkv.kernels.cpu.{module}", name), "CPU")
        _library.impl(name, _launcher(f"fastwkv.kernels.{module}", name), "CUDA")
        torch.library.register_fake(f"fastwkv::{name}", fake, lib=_library)
        return getattr(torch.ops.fastwkv, name)

    return register


def _launcher(module: str, name: str) -> Callable[..., Any]:
    launcher: Callable[..., Any] | None = None

    def launch(*args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = getattr(import_module(module), name)
        return launcher(*args)

    return launch
