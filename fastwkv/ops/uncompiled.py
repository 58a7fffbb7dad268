"""Autograd functions within transforms, which compilers leave to Python. The module is imported only within one."""

from typing import Any

import torch


def _not_compiled_within_transforms(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    if torch.compiler.is_exporting():
        raise RuntimeError("fastwkv's operators cannot be exported within forward mode and transforms of functions")
    return function.apply(*inputs)


# Compilers trace only the forward pass of such a function and the operators that it calls: tangents, and gradients of
# mapped tensors, would be lost silently. So it is left to Python. A graph that must be whole refuses that, with an
# error that names the function above.
apply_uncompiled = torch.compiler.disable(_not_compiled_within_transforms)
