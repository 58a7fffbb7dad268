"""What the autograd of every operator shares."""

from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Return ``function.apply(*inputs)``, where every input of ``forward`` is given and none by name.

    ``apply`` reads the signature of ``forward`` at every call, to fill in defaults: three quarters of what it costs.
    What it does after that is done here; transforms of functions and compilers look for ``apply`` itself.
    """
    if torch.compiler.is_compiling():
        return _apply_uncompiled(function, *inputs) if transformed() else function.apply(*inputs)
    if torch._C._are_functorch_transforms_active():
        return _apply_uncompiled(function, *inputs)  # what calls this may have been left to Python by a compiler
    # The checker wants a super() of the class that it stands in; this one is handed in.
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(inputs))  # type: ignore[misc]


def _apply_uncompiled(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    from fastwkv.ops.uncompiled import apply_uncompiled  # brings PyTorch's compiler, which takes a second to import

    return apply_uncompiled(function, *inputs)


def forward_alone(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Return the results of ``function``, of which no derivative is asked for; vmap finds its rule."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _apply_uncompiled(function, *inputs)
    return function.forward(*inputs)


def differentiated(inputs: list[Tensor]) -> bool:
    """Whether a derivative may be asked for, in reverse or in forward mode.

    Of a tensor that is mapped nothing can be known: its ``requires_grad`` says nothing about the one inside.
    """
    if torch.is_grad_enabled() and True in [t.requires_grad for t in inputs]:
        return True
    return transformed()


def transformed() -> bool:
    """Whether tangents are carried along, or a transform of ``torch.func`` is at work."""
    return in_forward_mode() or torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Whether tangents are carried along."""
    return torch.autograd.forward_ad._current_level >= 0


def differentiated_again() -> bool:
    """Within a backward pass: whether somebody is going to differentiate its result, or carries tangents along."""
    return (torch.is_grad_enabled() or in_forward_mode()) and not torch.compiler.is_compiling()


def batched(t: Tensor) -> bool:
    """Whether a tensor stands for many, as vmap makes them, or for itself within another transform."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)
