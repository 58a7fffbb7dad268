"""What the layers over :func:`fastwkv.linear_scan` share: checks, dtypes and what keeps them stable."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastwkv.ops import checks


def check_sizes(**sizes: int) -> None:
    """Each size of a layer is an int, at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_tokens(dims: str, width: int, **tokens: Tensor) -> None:
    """The input of a layer is real, with the axes ``dims``, of which the last has ``width`` channels."""
    for name, tensor in tokens.items():
        checks.check_floating(**{name: tensor})
        checks.check_rank(dims, **{name: tensor})
        checks.check_shape(dims, (*tensor.shape[:-1], width), **{name: tensor})


def check_carried(
    state: Tensor | None, width: int, dtype: torch.dtype, tokens: Tensor, cu_seqlens: Tensor | None = None
) -> None:
    """The state that a layer starts from has one row of ``width`` channels for each sequence among ``tokens``."""
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, *tokens.shape[:2])
    if state is not None:
        checks.check_floating_or_complex(state=state)
        dims, rows = ("B", tokens.shape[0]) if cu_seqlens is None else ("sequences", cu_seqlens.numel() - 1)
        checks.check_shape(f"{dims} N", (rows, width), state=state)
        checks.check_dtype(dtype, "(states do not round to 16 bits)", state=state)


def compute_dtypes(tokens: Tensor, parameter: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of a layer's products with matrices, and of its recurrence: there, 16 bits become float32."""
    products = torch.promote_types(tokens.dtype, parameter.dtype)
    return products, torch.promote_types(products, torch.float32)


def in_wider_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module of PyTorch's, which takes the dtype of its parameters only, in the wider dtype of both.

    Its hooks run, and running statistics are rounded to the dtype that they are kept in.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype == x.dtype:  # the former is of what somebody put in its place
        return module(x)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    x = x.to(dtype)
    if weight.dtype == dtype:
        return module(x)
    kept = dict(module.named_buffers())
    named = chain(module.named_parameters(), kept.items())
    wide = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in named}
    y: Tensor = functional_call(module, wide, (x,))
    if module.training:
        for name, buffer in kept.items():
            buffer.copy_(wide[name])
    return y


def complex_dtype(real: torch.dtype) -> torch.dtype:
    """Return complex64 for float32, complex128 for float64."""
    return torch.complex128 if real == torch.float64 else torch.complex64


def least_decay(dtype: torch.dtype) -> float:
    """Return the least d for which a multiplier ``exp(-d + iθ)`` is below 1 in modulus whatever is rounded.

    Two of the four units are for the roundings of exp(-d), cos θ, sin θ and their products, should no wider dtype
    compute them. The other two exceed what one complex product can add to |h|, √5/2 units, so that a state without
    input never grows. In float32 it still outlasts a million steps.
    """
    return 4 * torch.finfo(dtype).eps
