"""What the autograd of every operator shares."""

import torch
from torch import Tensor


def differentiated(inputs: list[Tensor]) -> bool:
    """Whether a derivative may be asked for, in reverse or in forward mode."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
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
