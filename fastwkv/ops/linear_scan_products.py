"""The linear scan between two products with matrices, as one operator of autograd: it needs less memory than three."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastwkv.ops.derivatives import apply, batched, differentiated_again, forward_alone
from fastwkv.ops.linear_scan_autograd import LinearScanAdjoint, scan
from fastwkv.ops.linear_scan_derivatives import Composed
from fastwkv.ops.packing import edges_of
from fastwkv.ops.vmap import plain, takes_batched_gradients


def scan_between_products(
    u: Tensor, into: Tensor, a: Tensor, out: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``x_t = W_in u_t``, ``h_t = a h_{t-1} + x_t``, ``y_t = W_out h_t``, where matrices see parts of complex numbers.

    x is gone before y is there. The gradient of h, as large as h, is seen by this backward pass alone: that of x takes
    its memory, and h is gone before the gradient of u is there. Derivatives of second order are those of
    :func:`fastwkv.linear_scan`; there is no forward mode, and no vmap but of its gradients. Nothing is checked.

    Args:
        u: ``[B, T, H]``.
        into: W_in, ``[2 N, H]``, of the dtype of u; rows 2 n and 2 n + 1 are real and imaginary part of x_n.
        a: complex ``[N]``, of complex64 or wider.
        out: W_out, ``[M, 2 N]``, of the dtype of u.
        initial: h before the first token, as for :func:`fastwkv.linear_scan`.
        cu_seqlens: likewise.

    Returns:
        y ``[B, T, M]`` and the final state.

    """
    initial = None if initial is None else plain(initial)
    y, _, final = apply(
        _ScanBetweenProducts, u, into, plain(a), out, initial, cu_seqlens, edges_of(cu_seqlens, u.shape[1])
    )
    return y, final


class _ScanBetweenProducts(torch.autograd.Function):
    """The three under autograd. h is a result as well, so that second derivatives find it; nobody else keeps it."""

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
        h, final = torch.ops.fastwkv.linear_scan_fwd(
            a, _numbers(F.linear(u, into), a.dtype), initial, cu_seqlens, False, False, edges
        )
        return F.linear(_parts(h), out), h, final

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep what was given, and h."""
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
            total = _numbers(torch.matmul(gy, out).to(out.dtype), a.dtype)  # autocast may have made it another
            total = total if gh is None else total + gh
            if ctx.needs_input_grad[3]:
                gout = _summed(gy, _parts(h)).to(out.dtype)
        total = torch.zeros_like(h) if total is None else total
        scanned = a, h, initial, cu_seqlens, False, False
        if differentiated_again():
            composed = Composed(scan, *scanned[:4], log=False, reverse=False)
            ga, gx, ginitial = composed.backward(total, gfinal)
            gx = gx.to(h.dtype)
        elif total is gh or batched(total) or (gfinal is not None and batched(gfinal)):  # gh is somebody else's
            ga, gx, ginitial = forward_alone(LinearScanAdjoint, *scanned, plain(total), gfinal, h.dtype, edges)
        else:
            gx = plain(total)
            ga, ginitial = torch.ops.fastwkv.linear_scan_bwd_(*scanned, gx, gfinal, edges)
        # As PyTorch's compiled functions do: unless the graph is kept, h is gone before the gradient of u is there.
        getattr(ctx, "maybe_clear_saved_tensors", _nothing)()
        del h, scanned, total
        gx = _parts(gx)
        gu = torch.matmul(gx, into).to(u.dtype) if ctx.needs_input_grad[0] else None
        ginto = None
        if ctx.needs_input_grad[1]:
            ginto = _summed(gx, u).to(into.dtype)
        return gu, ginto, ga, gout, None if initial is None else ginitial, None, None


def _nothing() -> None:
    pass


def _summed(g: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a matrix that x was multiplied with, the sum over all tokens."""
    return torch.matmul(g.reshape(-1, g.shape[-1]).transpose(0, 1), x.reshape(-1, x.shape[-1]))


def _numbers(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the scan takes for numbers of this dtype: pairs of 16 bits, or complex numbers."""
    pairs = parts.reshape(*parts.shape[:-1], -1, 2)
    return pairs if parts.dtype.itemsize == 2 else torch.view_as_complex(pairs).to(dtype)


def _parts(h: Tensor) -> Tensor:
    """Return real and imaginary parts by turns: the inverse of :func:`_numbers`."""
    pairs = torch.view_as_real(h) if h.is_complex() else h
    return pairs.reshape(*pairs.shape[:-2], -1)
