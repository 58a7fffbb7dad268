"""The linear scan under autograd: from arguments that have been checked to the kernels."""

from typing import Any

import torch
from torch import Tensor

from fastwkv.kernels.launch import scan_dtypes
from fastwkv.ops import linear_scan_registration  # noqa: F401 (registers what is called below)
from fastwkv.ops.derivatives import apply, differentiated, differentiated_again, forward_alone, in_forward_mode
from fastwkv.ops.linear_scan_derivatives import Composed
from fastwkv.ops.packing import edges_of
from fastwkv.ops.vmap import CHANNELS, ROWS, TOKENS, WHOLE, Axes, plain, takes_batched_gradients, vectorised


def scan(
    a: Tensor, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, log: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return h and the final state, as :func:`fastwkv.linear_scan`; with ``log``, ``a`` is log a."""
    state_dtype = scan_dtypes(a, x)[1]
    pairs, T = x.dim() == 4, x.shape[1]
    given = x.dtype
    if state_dtype.is_complex:
        # The kernels know a complex multiplier as itself only, and beside it nothing real but pairs of 16 bits.
        a, log = multiplier(a, log, state_dtype), False
        if not pairs:
            x = x.to(state_dtype)
        elif given.itemsize > 2 or state_dtype != torch.complex64:
            x = as_complex(x, state_dtype)
    a, x, initial = plain(a), plain(x), None if initial is None else plain(initial)
    inputs = [a, x] if initial is None else [a, x, initial]
    if differentiated(inputs):
        function = _DualLinearScan if in_forward_mode() else LinearScan
        h, final = apply(function, a, x, initial, cu_seqlens, log, reverse, edges_of(cu_seqlens, T, reverse))
    else:
        h, final = torch.ops.fastwkv.linear_scan_fwd(a, x, initial, cu_seqlens, log, reverse)
    if pairs and h.is_complex():
        h = torch.view_as_real(h).to(given)
    return h, final


class LinearScan(torch.autograd.Function):
    """The linear scan under autograd; kernels/linear_scan.py holds the adjoint.

    What is kept for the backward pass are a, the initial state and the result h.
    """

    @staticmethod
    def forward(
        a: Tensor,
        x: Tensor,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        log: bool,
        reverse: bool,
        edges: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute h and the final state."""
        return torch.ops.fastwkv.linear_scan_fwd(a, x, initial, cu_seqlens, log, reverse, edges)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep a, the initial state and h, nothing else."""
        a, x, initial, cu_seqlens, ctx.log, ctx.reverse, edges = inputs
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, initial, cu_seqlens, edges, output[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Take all indices of a mapped axis at once."""
        return _vectorised_scan(LinearScan, info, in_dims, inputs)

    @staticmethod
    @takes_batched_gradients
    def backward(ctx: Any, gh: Tensor | None, gfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the adjoint recurrence, in the other direction of time."""
        a, initial, cu_seqlens, edges, h = ctx.saved_tensors
        gh = torch.zeros_like(h) if gh is None else plain(gh)
        gfinal = None if gfinal is None else plain(gfinal)
        if differentiated_again():
            composed = Composed(scan, a, h, initial, cu_seqlens, ctx.log, ctx.reverse)
            ga, gx, ginitial = composed.backward(gh, gfinal)
            return ga, gx.to(ctx.dtype), ginitial, None, None, None, None
        ga, gx, ginitial = forward_alone(
            LinearScanAdjoint, a, h, initial, cu_seqlens, ctx.log, ctx.reverse, gh, gfinal, ctx.dtype, edges
        )
        return ga, gx, None if initial is None else ginitial, None, None, None, None


class _DualLinearScan(LinearScan):
    """The same in forward mode. On its own, since torch.compile refuses what defines a tangent."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the tangent needs too."""
        LinearScan.setup_context(ctx, inputs, output)
        a, _, initial, cu_seqlens, *_ = inputs
        ctx.save_for_forward(a, initial, cu_seqlens, output[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Take all indices of a mapped axis at once, as itself."""
        return _vectorised_scan(_DualLinearScan, info, in_dims, inputs)

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, dx: Tensor | None, dinitial: Tensor | None, *_: None) -> tuple[Tensor, Tensor]:
        """Run the tangent recurrence, which is the same with another input."""
        a, initial, cu_seqlens, h = ctx.saved_tensors
        return Composed(scan, a, h, initial, cu_seqlens, ctx.log, ctx.reverse).forward(da, dx, dinitial)


class LinearScanAdjoint(torch.autograd.Function):
    """The backward pass, as something that can be mapped. Derivatives of it are ``Composed``'s."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of a, x and the initial state, the last one empty where there is none."""
        return torch.ops.fastwkv.linear_scan_bwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Take all indices of a mapped axis at once."""
        a = _kind_of_multiplier(inputs[0], in_dims[0])
        kinds = a, TOKENS, ROWS, WHOLE, WHOLE, WHOLE, TOKENS, ROWS, WHOLE, WHOLE
        return vectorised(LinearScanAdjoint, info.batch_size, in_dims, inputs, kinds, (a, TOKENS, ROWS), cu_seqlens=3)


def _vectorised_scan(
    function: type[LinearScan], info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    kinds = _kind_of_multiplier(inputs[0], in_dims[0]), TOKENS, ROWS, WHOLE, WHOLE, WHOLE, WHOLE
    return vectorised(function, info.batch_size, in_dims, inputs, kinds, (TOKENS, ROWS), cu_seqlens=3)


def _kind_of_multiplier(a: Tensor, mapped: int | None) -> Axes:
    return TOKENS if a.dim() - (mapped is not None) == 3 else CHANNELS


def multiplier(a: Tensor, log: bool, dtype: torch.dtype) -> Tensor:
    """Return a in this dtype; where log a is given it is made wider first, then exponentiated."""
    if not log:
        return a.to(dtype)
    return a.to(dtype if a.is_complex() else dtype.to_real()).exp().to(dtype)


def as_complex(pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers that are held as pairs."""
    return torch.view_as_complex(pairs.to(torch.float64 if dtype == torch.complex128 else torch.float32).contiguous())
