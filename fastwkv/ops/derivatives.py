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
