"""The linear scan between two matrix products, as one autograd function, which takes less memory than three."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastwkv.ops.derivatives import apply, batched, differentiated_again, forward_alone, transformed
from fastwkv.ops.linear_scan_autograd import LinearScanAdjoint, ScanDerivatives, scan
from fastwkv.ops.linear_scan_registration import linear_scan_bwd_, linear_scan_fwd
from fastwkv.ops.packing import edges_of
from fastwkv.ops.vmap import plain, takes_batched_gradients


def scan_between_products(
    u: Tensor, into: Tensor, a: Tensor, out: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``x_t = W_in u_t``, ``h_t = a h_{t-1} + x_t``, ``y_t = W_out h_t``: matrices see complex numbers as pairs.

    x is freed before y is computed. With gradients, all three are one autograd function, unless compilers or transforms
    have to look inside. Only its backward pass sees the gradient of h, which is as large as h: the gradient of x is
    written over it, and h is freed before the gradient of u is computed. Nothing is checked.

    Args:
        u: ``[B, T, H]``, which is converted to the dtype of the matrices.
        into: W_in, ``[2 N, H]``; rows 2 n and 2 n + 1 are the real and the imaginary part of x_n.
        a: complex ``[N]``, of complex64 or wider.
        out: W_out, ``[M, 2 N]``, of the dtype of ``into``.
        initial: h before the first token, as for :func:`fastwkv.linear_scan`.
        cu_seqlens: the offsets of packed sequences, likewise.

    Returns:
        y ``[B, T, M]``, of the dtype of the matrices or, under autocast, of autocast's, and the final state.

    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        h, final = scan(a, F.linear(u.to(into.dtype), into).unflatten(-1, (-1, 2)), initial, cu_seqlens, False, False)
        return F.linear(h.flatten(-2), out), final
    dtype = _rounded_by_autocast(out.dtype, u.device.type)
    u, into, out = u.to(dtype), into.to(dtype), out.to(dtype)
    initial = None if initial is None else plain(initial)
    y, _, final = apply(
        _ScanBetweenProducts, u, into, plain(a), out, initial, cu_seqlens, edges_of(cu_seqlens, u.shape[1])
    )
    return y, final


class _ScanBetweenProducts(torch.autograd.Function):
    """The products and the scan under autograd. h is a result as well, for the second derivatives alone."""

    @staticmethod
    def forward(
        u: Tensor,
        into: Tensor,
        a: Tensor,
        out: Tensor,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        edges: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute y, h and the final state."""
        h, final = linear_scan_fwd(a, _numbers(F.linear(u, into), a.dtype), initial, cu_seqlens, False, False, edges)
        return F.linear(_parts(h), out), h, final

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the inputs and h."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    @takes_batched_gradients
    def backward(ctx: Any, gy: Tensor | None, gh: Tensor | None, gfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the adjoints, the last first."""
        u, into, a, out, initial, cu_seqlens, edges, h = ctx.saved_tensors
        gfinal = None if gfinal is None else plain(gfinal)
        total, gout = gh, None
        if gy is not None:
            total = _numbers(torch.matmul(gy, out).to(out.dtype), a.dtype)  # autocast may have changed it
            total = total if gh is None else total + gh
            if ctx.needs_input_grad[3]:
                gout = _summed(gy, _parts(h)).to(out.dtype)
        total = torch.zeros_like(h) if total is None else total
        scanned = a, h, initial, cu_seqlens, False, False
        if differentiated_again():
            ga, gx, ginitial = ScanDerivatives(*scanned).gradients(total, gfinal)
            gx = gx.to(h.dtype)
        elif total is gh or batched(total) or (gfinal is not None and batched(gfinal)):  # gh belongs to its caller
            ga, gx, ginitial = forward_alone(LinearScanAdjoint, *scanned, plain(total), gfinal, h.dtype, edges)
        else:
            gx = plain(total)
            ga, ginitial = linear_scan_bwd_(*scanned, gx, gfinal, edges)
        # As in PyTorch's compiled functions, h is freed before the gradient of u is computed, unless the graph is kept.
        getattr(ctx, "maybe_clear_saved_tensors", _nothing)()
        del h, scanned, total
        gx = _parts(gx)
        gu = torch.matmul(gx, into).to(u.dtype) if ctx.needs_input_grad[0] else None
        ginto = None
        if ctx.needs_input_grad[1]:
            ginto = _summed(gx, u).to(into.dtype)
        return gu, ginto, ga, gout, None if initial is None else ginitial, None, None


def _rounded_by_autocast(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the dtype that matrix products of this dtype have on a device of this type under autocast."""
    if dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def _nothing() -> None:
    pass


def _summed(g: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of the matrix of a product with x, which is a sum over all tokens."""
    return torch.matmul(g.reshape(-1, g.shape[-1]).transpose(0, 1), x.reshape(-1, x.shape[-1]))


def _numbers(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of these parts as the scan takes them: as pairs of 16 bits, or in this complex dtype."""
    pairs = parts.reshape(*parts.shape[:-1], -1, 2)
    return pairs if parts.dtype.itemsize == 2 else torch.view_as_complex(pairs).to(dtype)


def _parts(h: Tensor) -> Tensor:
    """Return real and imaginary parts in turns: the inverse of ``_numbers``."""
    pairs = torch.view_as_real(h) if h.is_complex() else h
    return pairs.reshape(*pairs.shape[:-2], -1)
