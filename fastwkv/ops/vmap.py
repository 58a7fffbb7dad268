"""Operators under vmap: the mapped axis becomes more rows of the batch, or more channels.

No kernel mixes rows or channels, so one call does for all indices. They become more channels if an argument or a
result of one number a channel, such as w or a fixed a, is mapped, and more rows otherwise. Packed sequences are a batch
of one: there they always become more channels. Mapped offsets are taken one after the other.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

# The axis of rows and the axis of channels of each kind of tensor.
TOKENS = 0, 2  # [B, T, C] or [B, T, C, 2]
ROWS = 0, 1  # [N, C]
STATES = 1, 2  # [fields, N, C]
CHANNELS = None, 0  # [C]
WHOLE = None, None  # an argument that all rows and channels share
Axes = tuple[int | None, int | None]


def plain(t: Tensor) -> Tensor:
    """Return a contiguous tensor of the same values that is no lazy conjugate or negative of another."""
    return t.resolve_conj().resolve_neg().contiguous()


def vectorised(
    function: type[torch.autograd.Function],
    size: int,
    in_dims: tuple[int | None, ...],
    inputs: tuple[Any, ...],
    axes: tuple[Axes, ...],
    results: tuple[Axes, ...],
    cu_seqlens: int,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Apply an autograd function once to all indices of a mapped axis, as its ``vmap`` has to.

    Args:
        function: the function. Its results are tensors, an empty one where there is none.
        size: the length of the mapped axis.
        in_dims: the position of this axis in each input, None where it is not mapped.
        inputs: the inputs of ``function``; tensors have the mapped axis besides their own.
        axes: the axes of rows and channels of each input, but for the mapped one.
        results: the same of each result.
        cu_seqlens: the index of the input that has the offsets of packed sequences.

    Returns:
        The results, and the position of the mapped axis in each.

    """
    if in_dims[cu_seqlens] is not None:
        return _one_by_one(function, size, in_dims, inputs)
    by_channels = inputs[cu_seqlens] is not None or CHANNELS in results
    by_channels |= any(kind is CHANNELS and dim is not None for kind, dim in zip(axes, in_dims, strict=True))
    lengthened = [kind[by_channels] for kind in axes]
    folded = [
        t if axis is None or t is None else _fold(t, dim, axis, size)
        for t, dim, axis in zip(inputs, in_dims, lengthened, strict=True)
    ]
    outputs = function.apply(*folded)
    dims = [None if t.numel() == 0 else kind[by_channels] for t, kind in zip(outputs, results, strict=True)]
    unfolded = [t if dim is None else t.unflatten(dim, (size, -1)) for t, dim in zip(outputs, dims, strict=True)]
    return tuple(unfolded), tuple(dims)


def _fold(t: Tensor, dim: int | None, axis: int, size: int) -> Tensor:
    """Return a tensor whose mapped axis has become the outer part of the axis ``axis``."""
    shape = *t.shape[:axis], size, *t.shape[axis:]
    t = t.unsqueeze(axis).expand(shape) if dim is None else t.movedim(dim, axis)
    return plain(t.flatten(axis, axis + 1))


def _one_by_one(
    function: type[torch.autograd.Function], size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    outputs = [
        function.apply(*(t if dim is None else plain(t.select(dim, i)) for t, dim in zip(inputs, in_dims, strict=True)))
        for i in range(size)
    ]
    stacked = [torch.stack(column) for column in zip(*outputs, strict=True)]
    return tuple(stacked), (0,) * len(stacked)


def takes_batched_gradients(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backward pass take the gradients of ``is_grads_batched``, which come in a vmap of an older kind.

    The older vmap knows no rules for autograd functions, and loses the derivatives of its results. So ``torch.vmap``
    takes its place.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> Any:
        if not torch.compiler.is_compiling():
            is_older = torch._C._functorch.is_legacy_batchedtensor
            batched = [g is not None and is_older(g) for g in gradients]
            if True in batched:
                return _in_vmap(backward, ctx, gradients, batched)
        return backward(ctx, *gradients)

    return wrapped


def _in_vmap(
    backward: Callable[..., Any], ctx: Any, gradients: tuple[Tensor | None, ...], batched: list[bool]
) -> tuple[Tensor | None, ...]:
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    present: list[bool] = []  # of the results

    def wanted(*gradients: Tensor | None) -> tuple[Tensor, ...]:
        results = backward(ctx, *gradients)
        present[:] = [g is not None for g in results]
        return tuple(g for g in results if g is not None)

    # The 1 is for tensors that are not mapped. The type checker does not see that a mapped one is never None.
    whole = [
        torch._remove_batch_dim(g, level, 1, 0) if is_batched else g  # type: ignore[arg-type]
        for g, is_batched in zip(gradients, batched, strict=True)
    ]
    dims = tuple(0 if is_batched else None for is_batched in batched)
    results = iter(torch.vmap(wanted, in_dims=dims)(*whole))
    return tuple(torch._add_batch_dim(next(results), 0, level) if is_present else None for is_present in present)
