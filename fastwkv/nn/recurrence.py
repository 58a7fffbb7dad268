"""The checks, dtypes and bounds that the layers over :func:`fastwkv.linear_scan` share."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastwkv.ops import checks


def check_sizes(**sizes: int) -> None:
    """Check that each size of a layer is an int, at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_tokens(dims: str, width: int, **tokens: Tensor) -> None:
    """Check that the input of a layer is real and has the axes ``dims``, the last one of ``width`` channels."""
    for name, tensor in tokens.items():
        checks.check_floating(**{name: tensor})
        checks.check_rank(dims, **{name: tensor})
        checks.check_shape(dims, (*tensor.shape[:-1], width), **{name: tensor})


def check_carried(
    state: Tensor | None, width: int, dtype: torch.dtype, tokens: Tensor, cu_seqlens: Tensor | None = None
) -> None:
    """Check that the initial state of a layer has a row of ``width`` channels for each sequence of ``tokens``."""
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, *tokens.shape[:2])
        checks.check_device(**{"the input": tokens, "cu_seqlens": cu_seqlens})
    if state is not None:
        checks.check_floating_or_complex(state=state)
        dims, rows = ("B", tokens.shape[0]) if cu_seqlens is None else ("sequences", cu_seqlens.numel() - 1)
        checks.check_shape(f"{dims} N", (rows, width), state=state)
        checks.check_dtype(dtype, "(states do not round to 16 bits)", state=state)
        checks.check_device(**{"the input": tokens, "state": state})


def compute_dtypes(tokens: Tensor, parameter: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of a layer's matrix products and of its recurrence, which is at least float32."""
    products = torch.promote_types(tokens.dtype, parameter.dtype)
    return products, torch.promote_types(products, torch.float32)


def in_wider_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """Return ``module(x)``, computed in the wider dtype of x and of the parameters; PyTorch's modules refuse two.

    The hooks of the module run, and its running statistics are rounded to the dtype that they are kept in.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype == x.dtype:  # a user's own module may have no weight
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
    """Return the complex dtype of this real one: complex64 for float32, complex128 for float64."""
    return torch.complex128 if real == torch.float64 else torch.complex64


def least_decay(dtype: torch.dtype) -> float:
    """Return the least d for which a decay ``exp(-d + iθ)`` is below 1 in modulus, whatever the rounding errors.

    Two of the four units of rounding are for the errors of exp(-d), cos θ, sin θ and their products, in case no wider
    dtype computes them. The other two exceed √5/2 units, the most that one complex product can add to |h|, so that a
    state without input never grows. In float32 such a state still outlasts a million steps.
    """
    return 4 * torch.finfo(dtype).eps
