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
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    # The checker wants a super() of the class that it stands in; this one is handed in.
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(inputs))  # type: ignore[misc]


def differentiated(inputs: list[Tensor]) -> bool:
    """Whether a derivative may be asked for, in reverse or in forward mode."""
    if torch.is_grad_enabled() and True in [t.requires_grad for t in inputs]:
        return True
    return in_forward_mode()


def in_forward_mode() -> bool:
    """Whether tangents are carried along."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def differentiated_again() -> bool:
    """Within a backward pass: whether somebody is going to differentiate its result."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def batched(t: Tensor) -> bool:
    """Whether a tensor stands for many, as vmap makes them: those that are written to need rules of their own."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(t) or functorch.is_functorch_wrapped_tensor(t)
