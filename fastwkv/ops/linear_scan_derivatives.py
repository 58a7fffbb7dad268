"""The derivatives of the linear scan as linear scans, which can be differentiated themselves."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastwkv.kernels.launch import scan_dtypes
from fastwkv.ops import packing  # noqa: F401 (registers what is called below)


class Composed:
    """Derivatives at one point, in PyTorch's operators and ``scan``, which is handed in."""

    def __init__(
        self,
        scan: Callable[..., tuple[Tensor, Tensor]],
        a: Tensor,
        h: Tensor,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        log: bool,
        reverse: bool,
    ) -> None:
        """Take what the forward pass had and returned; ``a`` is log a if ``log``."""
        T = h.shape[1]
        self.pairs, self.dtype = h.dim() == 4, h.dtype
        state_dtype = scan_dtypes(a, h)[1]
        self.scan, self.given_dtype, self.fixed = scan, a.dtype, a.dim() == 1
        self.cu_seqlens, self.reverse, self.log = cu_seqlens, reverse, log
        self.given = a.to(state_dtype)
        self.a = self.given.exp() if log else self.given
        offsets = torch.tensor([0, T], device=h.device) if cu_seqlens is None else cu_seqlens
        edges = torch.ops.fastwkv.packed_edges(offsets, T, reverse)
        edges = edges.flip(0) if reverse else edges
        first, self.last = (edges & 1) != 0, (edges & 2) != 0  # of the sequences, in the order of the scan
        self.initial = initial
        before: Tensor | int = 0
        if initial is not None:
            before = initial[:, None] if cu_seqlens is None else initial[edges >> 2]
        self.h_before = torch.where(
            first[:, None], before, self._numbers(h).to(state_dtype).roll(-1 if reverse else 1, 1)
        )

    def backward(self, gh: Tensor, gfinal: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients of a, x and the initial state."""
        a, given = (t.expand(self.h_before.shape).conj() for t in (self.a, self.given))
        one = 0 if self.log else 1
        after = torch.where(self.last[:, None], one, given.roll(1 if self.reverse else -1, 1))
        g, _ = self._scan(after, self._numbers(gh).to(a.dtype), gfinal, not self.reverse)
        ga = g * self.h_before.conj()
        ga = ga * a if self.log else ga
        ga = (ga.sum((0, 1)) if self.fixed else ga).to(self.given_dtype)
        return ga, self._as_given(g), None if self.initial is None else self._before_first_tokens(a * g, gfinal)

    def forward(self, da: Tensor | None, dx: Tensor | None, dinitial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tangents of h and of the final state."""
        total = torch.zeros_like(self.h_before) if dx is None else self._numbers(dx).to(self.h_before.dtype)
        if da is not None:
            total = total + (da * self.a if self.log else da) * self.h_before
        dh, dfinal = self._scan(self.given, total, dinitial, self.reverse)
        return self._as_given(dh).to(self.dtype), dfinal

    def _numbers(self, t: Tensor) -> Tensor:
        """Return complex numbers where pairs of 16 bits were given."""
        return torch.view_as_complex(t.float().contiguous()) if self.pairs else t

    def _as_given(self, t: Tensor) -> Tensor:
        return torch.view_as_real(t) if self.pairs else t

    def _scan(self, given: Tensor, x: Tensor, initial: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        # Not with e^{log a}: as one number it is rounded, at every token in the same way.
        return self.scan(given, x, initial, self.cu_seqlens, self.log, reverse)

    def _before_first_tokens(self, q: Tensor, gfinal: Tensor | None) -> Tensor:
        """Return what comes out of the first token of every sequence, and through one that is empty."""
        if self.cu_seqlens is None:
            return q[:, -1 if self.reverse else 0]
        begin, end = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        first = (end - 1 if self.reverse else begin).clamp(0, q.shape[1] - 1)
        through = torch.zeros((), dtype=q.dtype, device=q.device) if gfinal is None else gfinal
        return torch.where((begin == end)[:, None], through, q[0, first])
