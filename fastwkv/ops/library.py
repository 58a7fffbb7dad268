"""Registration with PyTorch: one schema an operator, one implementation a device. The only dispatch there is."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

_library = torch.library.Library("fastwkv", "DEF")

OPERATORS: dict[str, str] = {}
"""Registered operators, and the module below ``kernels`` that has the launcher of that name."""


def register(schema: str, module: str, fake: Callable[..., Any], cpu: bool = True) -> None:
    """Register an operator whose launcher has the same name in ``kernels.<module>`` and ``kernels.cpu.<module>``.

    Without ``cpu`` it is one for GPUs only, which their callers have another way around.

    The launchers are imported when they are first called, so that importing the package needs neither Triton nor
    numba, and a machine without Triton still has the CPU path.
    """
    name = schema.partition("(")[0]
    OPERATORS[name] = module
    _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    if cpu:
        _library.impl(name, _launcher(f"fastwkv.kernels.cpu.{module}", name), "CPU")
    _library.impl(name, _launcher(f"fastwkv.kernels.{module}", name), "CUDA")
    torch.library.register_fake(f"fastwkv::{name}", fake, lib=_library)


def _launcher(module: str, name: str) -> Callable[..., Any]:
    launcher: Callable[..., Any] | None = None

    def launch(*args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = getattr(import_module(module), name)
        return launcher(*args)

    return launch
