"""Functions of autograd within transforms, which compilers leave to Python. Imported where one is at work only."""

from typing import Any

import torch


def _not_compiled_within_transforms(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    if torch.compiler.is_exporting():
        raise RuntimeError("fastwkv's operators cannot be exported within forward mode and transforms of functions")
    return function.apply(*inputs)


# Compilers trace the forward pass of such a function alone, and what it calls: tangents, and the gradients of tensors
# that are mapped, would be lost without a word. So it is left to Python; a graph that must be whole refuses that, and
# tells the name of what is above.
apply_uncompiled = torch.compiler.disable(_not_compiled_within_transforms)
