"""The linear scan under autograd: from checked arguments to the operators, and derivatives of every order.

The derivatives of a scan are scans: the gradients are one in the other direction of time, the tangents one with another
input. So this module is recursive, and whole: ``scan`` is differentiated by ``LinearScan``, whose derivatives,
where they are differentiated themselves, are those of ``ScanDerivatives``, which calls ``scan``.
"""

from typing import Any

import torch
from torch import Tensor

from fastwkv.kernels.launch import scan_dtypes
from fastwkv.ops.derivatives import apply, differentiated, differentiated_again, forward_alone, in_forward_mode
from fastwkv.ops.linear_scan_registration import linear_scan_bwd, linear_scan_fwd
from fastwkv.ops.packing import edges_of, packed_edges
from fastwkv.ops.vmap import CHANNELS, ROWS, TOKENS, WHOLE, Axes, plain, takes_batched_gradients, vectorised


def scan(
    a: Tensor, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, log: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return h and the final state, as :func:`fastwkv.linear_scan`; with ``log``, ``a`` is log a."""
    state_dtype = scan_dtypes(a, x)[1]
    pairs, T, x_dtype = x.dim() == 4, x.shape[1], x.dtype
    if state_dtype.is_complex:
        # The kernels take a complex decay as itself only, and beside it nothing real but pairs of 16 bits.
        a, log = decay_in(a, log, state_dtype), False
        if not pairs:
            x = x.to(state_dtype)
        elif x_dtype.itemsize > 2 or state_dtype != torch.complex64:
            x = as_complex(x, state_dtype)
    a, x, initial = plain(a), plain(x), None if initial is None else plain(initial)
    inputs = [a, x] if initial is None else [a, x, initial]
    if differentiated(inputs):
        function = _DualLinearScan if in_forward_mode() else LinearScan
        h, final = apply(function, a, x, initial, cu_seqlens, log, reverse, edges_of(cu_seqlens, T, reverse))
    else:
        h, final = linear_scan_fwd(a, x, initial, cu_seqlens, log, reverse)
    if pairs and h.is_complex():
        h = torch.view_as_real(h).to(x_dtype)
    return h, final


def decay_in(a: Tensor, log: bool, dtype: torch.dtype) -> Tensor:
    """Return the decay in this dtype. With ``log``, ``a`` is log a: it is converted first, then exponentiated."""
    if not log:
        return a.to(dtype)
    return a.to(dtype if a.is_complex() else dtype.to_real()).exp().to(dtype)


def as_complex(pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pairs of real and imaginary parts as complex numbers of this dtype."""
    return torch.view_as_complex(pairs.to(torch.float64 if dtype == torch.complex128 else torch.float32).contiguous())


class LinearScan(torch.autograd.Function):
    """The linear scan under autograd; kernels/linear_scan.py has the formulas of its adjoint.

    The backward pass keeps a, the initial state and the result h.
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
        return linear_scan_fwd(a, x, initial, cu_seqlens, log, reverse, edges)

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
            derivatives = ScanDerivatives(a, h, initial, cu_seqlens, ctx.log, ctx.reverse)
            ga, gx, ginitial = derivatives.gradients(gh, gfinal)
            return ga, gx.to(ctx.dtype), ginitial, None, None, None, None
        ga, gx, ginitial = forward_alone(
            LinearScanAdjoint, a, h, initial, cu_seqlens, ctx.log, ctx.reverse, gh, gfinal, ctx.dtype, edges
        )
        return ga, gx, None if initial is None else ginitial, None, None, None, None


class _DualLinearScan(LinearScan):
    """The linear scan in forward mode, which is a class of its own since torch.compile refuses one with tangents."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the same for the tangents too."""
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
        return ScanDerivatives(a, h, initial, cu_seqlens, ctx.log, ctx.reverse).tangents(da, dx, dinitial)


class LinearScanAdjoint(torch.autograd.Function):
    """The backward pass as a function that vmap knows. It is not differentiated: see ``ScanDerivatives``."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of a, x and the initial state, the last one empty where there is none."""
        return linear_scan_bwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Take all indices of a mapped axis at once."""
        a = _axes_of_decay(inputs[0], in_dims[0])
        axes = a, TOKENS, ROWS, WHOLE, WHOLE, WHOLE, TOKENS, ROWS, WHOLE, WHOLE
        return vectorised(LinearScanAdjoint, info.batch_size, in_dims, inputs, axes, (a, TOKENS, ROWS), cu_seqlens=3)


def _vectorised_scan(
    function: type[LinearScan], info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    axes = _axes_of_decay(inputs[0], in_dims[0]), TOKENS, ROWS, WHOLE, WHOLE, WHOLE, WHOLE
    return vectorised(function, info.batch_size, in_dims, inputs, axes, (TOKENS, ROWS), cu_seqlens=3)


def _axes_of_decay(a: Tensor, mapped: int | None) -> Axes:
    return TOKENS if a.dim() - (mapped is not None) == 3 else CHANNELS


class ScanDerivatives:
    """The derivatives of a scan at one point, in ``scan`` and PyTorch's operators, which can be differentiated."""

    def __init__(
        self, a: Tensor, h: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, log: bool, reverse: bool
    ) -> None:
        """Take the arguments of the forward pass, and h, its result; with ``log``, ``a`` is log a."""
        T = h.shape[1]
        self.pairs, self.h_dtype = h.dim() == 4, h.dtype
        state_dtype = scan_dtypes(a, h)[1]
        self.a_dtype, self.fixed = a.dtype, a.dim() == 1
        self.cu_seqlens, self.reverse, self.log = cu_seqlens, reverse, log
        self.a_or_log = a.to(state_dtype)
        self.a = self.a_or_log.exp() if log else self.a_or_log
        offsets = torch.tensor([0, T], device=h.device) if cu_seqlens is None else cu_seqlens
        edges = packed_edges(offsets, T, reverse)
        edges = edges.flip(0) if reverse else edges
        first, self.last = (edges & 1) != 0, (edges & 2) != 0  # of the sequences, in the order of the scan
        self.initial = initial
        before: Tensor | int = 0
        if initial is not None:
            before = initial[:, None] if cu_seqlens is None else initial[edges >> 2]
        self.h_before = torch.where(
            first[:, None], before, self._numbers(h).to(state_dtype).roll(-1 if reverse else 1, 1)
        )

    def gradients(self, gh: Tensor, gfinal: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients of a, x and the initial state."""
        a, a_or_log = (t.expand(self.h_before.shape).conj() for t in (self.a, self.a_or_log))
        one = 0 if self.log else 1
        after = torch.where(self.last[:, None], one, a_or_log.roll(1 if self.reverse else -1, 1))
        g, _ = self._scan(after, self._numbers(gh).to(a.dtype), gfinal, not self.reverse)
        ga = g * self.h_before.conj()
        ga = ga * a if self.log else ga
        ga = (ga.sum((0, 1)) if self.fixed else ga).to(self.a_dtype)
        return ga, self._like_h(g), None if self.initial is None else self._before_first_tokens(a * g, gfinal)

    def tangents(self, da: Tensor | None, dx: Tensor | None, dinitial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tangents of h and of the final state."""
        total = torch.zeros_like(self.h_before) if dx is None else self._numbers(dx).to(self.h_before.dtype)
        if da is not None:
            total = total + (da * self.a if self.log else da) * self.h_before
        dh, dfinal = self._scan(self.a_or_log, total, dinitial, self.reverse)
        return self._like_h(dh).to(self.h_dtype), dfinal

    def _numbers(self, t: Tensor) -> Tensor:
        """Return complex numbers where h is held as pairs of 16 bits."""
        return torch.view_as_complex(t.float().contiguous()) if self.pairs else t

    def _like_h(self, t: Tensor) -> Tensor:
        return torch.view_as_real(t) if self.pairs else t

    def _scan(self, a_or_log: Tensor, x: Tensor, initial: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        # The scan takes log a, since e^{log a} as one number is rounded, at every token in the same way.
        return scan(a_or_log, x, initial, self.cu_seqlens, self.log, reverse)

    def _before_first_tokens(self, q: Tensor, gfinal: Tensor | None) -> Tensor:
        """Return the gradient that leaves the first token of every sequence, or passes through an empty one."""
        if self.cu_seqlens is None:
            return q[:, -1 if self.reverse else 0]
        begin, end = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        first = (end - 1 if self.reverse else begin).clamp(0, q.shape[1] - 1)
        through = torch.zeros((), dtype=q.dtype, device=q.device) if gfinal is None else gfinal
        return torch.where((begin == end)[:, None], through, q[0, first])
