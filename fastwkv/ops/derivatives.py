"""Helpers that the autograd functions of every operator share."""

from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Return ``function.apply(*inputs)``, where every input of ``forward`` is given by its position.

    ``apply`` reads the signature of ``forward`` at every call, to fill in defaults, which takes three quarters of its
    time. This function does the rest of its work. Transforms of functions and compilers need ``apply`` itself.
    """
    if torch.compiler.is_compiling():
        return _apply_uncompiled(function, *inputs) if transformed() else function.apply(*inputs)
    if torch._C._are_functorch_transforms_active():
        return _apply_uncompiled(function, *inputs)  # a compiler may have left the caller to Python
    # The type checker expects super() of the class around the call, and here the class is an argument.
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(inputs))  # type: ignore[misc]


def _apply_uncompiled(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    # The import is here since it brings PyTorch's compiler along, which takes a second to import.
    from fastwkv.ops.uncompiled import apply_uncompiled

    return apply_uncompiled(function, *inputs)


def forward_alone(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Return the results of ``function`` without recording them for derivatives; under vmap its rule applies."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _apply_uncompiled(function, *inputs)
    return function.forward(*inputs)


def differentiated(inputs: list[Tensor]) -> bool:
    """Return whether a derivative may be asked for, in reverse or in forward mode.

    Within a transform it always may: the ``requires_grad`` of a mapped tensor says nothing about the tensor inside.
    """
    if torch.is_grad_enabled() and True in [t.requires_grad for t in inputs]:
        return True
    return transformed()


def transformed() -> bool:
    """Return whether tangents are carried along, or a transform of ``torch.func`` is at work."""
    return in_forward_mode() or torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Return whether tangents are carried along."""
    return torch.autograd.forward_ad._current_level >= 0


def differentiated_again() -> bool:
    """Return whether the result of the backward pass at work is to be differentiated, or carries tangents along."""
    return (torch.is_grad_enabled() or in_forward_mode()) and not torch.compiler.is_compiling()


def batched(t: Tensor) -> bool:
    """Return whether a tensor is a transform's stand-in: for many tensors under vmap, or for one elsewhere."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)
