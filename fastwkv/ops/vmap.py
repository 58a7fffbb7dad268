"""Operators under vmap: the mapped axis becomes more rows of the batch, or more channels.

No kernel mixes rows or channels, so one call does for all indices. More rows it is where nothing that belongs to a
channel alone, such as w or a fixed a, is mapped or wanted for every index. Packed sequences are a batch of one: there
it is always more channels. Mapped offsets are taken one after the other.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

# Of tensors of each kind: the axes of rows and of channels.
TOKENS = 0, 2  # [B, T, C] or [B, T, C, 2]
ROWS = 0, 1  # [N, C]
STATES = 1, 2  # [fields, N, C]
CHANNELS = None, 0  # [C]
WHOLE = None, None  # what is the same for all rows and channels
Axes = tuple[int | None, int | None]


def plain(t: Tensor) -> Tensor:
    """Return a tensor as it lies in memory: contiguous, and no lazy conjugate of another."""
    return t.resolve_conj().resolve_neg().contiguous()


def vectorised(
    function: type[torch.autograd.Function],
    size: int,
    in_dims: tuple[int | None, ...],
    inputs: tuple[Any, ...],
    kinds: tuple[Axes, ...],
    results: tuple[Axes, ...],
    cu_seqlens: int,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Apply a function of autograd once to all indices of a mapped axis, as its ``vmap`` has to.

    Args:
        function: what is applied. Its results are tensors, empty ones where there is nothing to say.
        size: the length of the mapped axis.
        in_dims: where this axis is in each input, None where it is not.
        inputs: of ``function``; tensors have the mapped axis besides their own.
        kinds: what each input is.
        results: what each result is.
        cu_seqlens: which input has the offsets of packed sequences.

    Returns:
        The results, and where the mapped axis is in each.

    """
    if in_dims[cu_seqlens] is not None:
        return _one_by_one(function, size, in_dims, inputs)
    by_channels = inputs[cu_seqlens] is not None or CHANNELS in results
    by_channels |= any(kind is CHANNELS and dim is not None for kind, dim in zip(kinds, in_dims, strict=True))
    axes = [kind[by_channels] for kind in kinds]
    folded = [
        t if axis is None or t is None else _fold(t, dim, axis, size)
        for t, dim, axis in zip(inputs, in_dims, axes, strict=True)
    ]
    outputs = function.apply(*folded)
    dims = [None if t.numel() == 0 else kind[by_channels] for t, kind in zip(outputs, results, strict=True)]
    unfolded = [t if dim is None else t.unflatten(dim, (size, -1)) for t, dim in zip(outputs, dims, strict=True)]
    return tuple(unfolded), tuple(dims)


def _fold(t: Tensor, dim: int | None, axis: int, size: int) -> Tensor:
    """Return a tensor whose mapped axis is the outer part of another."""
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
    """Let a backward pass take what ``is_grads_batched`` hands it: gradients in a vmap of an older kind.

    That one knows no rules for functions of autograd, and loses the derivatives of its results. So it is exchanged for
    ``torch.vmap``.
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
    given: list[bool] = []

    def wanted(*gradients: Tensor | None) -> tuple[Tensor, ...]:
        results = backward(ctx, *gradients)
        given[:] = [g is not None for g in results]
        return tuple(g for g in results if g is not None)

    # The 1 is for tensors that are not mapped. The checker does not see that those which are mapped are no None.
    whole = [
        torch._remove_batch_dim(g, level, 1, 0) if is_batched else g  # type: ignore[arg-type]
        for g, is_batched in zip(gradients, batched, strict=True)
    ]
    dims = tuple(0 if is_batched else None for is_batched in batched)
    results = iter(torch.vmap(wanted, in_dims=dims)(*whole))
    return tuple(torch._add_batch_dim(next(results), 0, level) if is_given else None for is_given in given)
