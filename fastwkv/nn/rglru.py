"""RG-LRU, the real-gated linear recurrent unit of Hawk, Griffin and RecurrentGemma.

Source: "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models", arXiv 2402.19427.
"""

import math
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastwkv.nn.recurrence import check_carried, check_sizes, check_tokens, compute_dtypes
from fastwkv.ops import checks
from fastwkv.ops.linear_scan import linear_scan, linear_scan_step

EXPONENT = 8.0  # c in the paper: the recurrence gate reaches from a^0 to a^c


class RGLRU(nn.Module):
    """The real-gated linear recurrent unit.

    ::

        r_t = σ(W_a x_t + b_a)    i_t = σ(W_x x_t + b_x)
        log a_t = -8 softplus(Λ) ⊙ r_t
        h_t = a_t ⊙ h_{t-1} + √(1 - a_t²) ⊙ (i_t ⊙ x_t)

    and h is the output. At the first token of a segment, which has no h_{t-1}, the factor √(1 - a_t²) is 1 as in
    RecurrentGemma: there is no past to average x with. A segment starts at the start of every sequence that carries no
    state on, and at the tokens that ``segment_starts`` marks.

    (The paper writes a = σ(Λ), but its appendix A and the published weights have log a = -softplus(Λ), so a = σ(-Λ).)

    Calls, states and steps are those of :class:`LRU`; the state is h itself. Gates, log a and the recurrence are
    float32 in 16-bit models and under autocast too; the two products with W are rounded to 16 bits before.

    At the start of training, a_t for r_t = 1, which is a^8, is uniform on ``[a_min, a_max]``, W is N(0, heads/H) and b
    is 0.

    Args:
        hidden: H, the channels of x and h.
        heads: the number of blocks on the diagonals of W_a and W_x; it divides H.
        a_min: the least a^8 at the start, above 0.
        a_max: the largest a^8 at the start, at least ``a_min`` and below 1.

    Source: arXiv 2402.19427, section 2.4, equations 1 to 4, and appendix A.

    """

    def __init__(self, hidden: int, heads: int = 1, a_min: float = 0.9, a_max: float = 0.999) -> None:
        super().__init__()
        check_sizes(hidden=hidden, heads=heads)
        if hidden % heads:
            raise ValueError(f"heads must divide hidden = {hidden}, got {heads}")
        if not 0 < a_min <= a_max < 1:
            raise ValueError(f"the range of a must be 0 < a_min <= a_max < 1, got [{a_min}, {a_max}]")
        self.hidden, self.heads, self.a_min, self.a_max = hidden, heads, a_min, a_max
        block = hidden // heads
        self.Lambda = nn.Parameter(torch.empty(hidden))
        self.W_a = nn.Parameter(torch.empty(heads, block, block))
        self.b_a = nn.Parameter(torch.empty(hidden))
        self.W_x = nn.Parameter(torch.empty(heads, block, block))
        self.b_x = nn.Parameter(torch.empty(hidden))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its value at the start of training, computed in float64."""
        u = torch.rand(self.hidden, dtype=torch.float64, device=self.Lambda.device)
        a = self.a_min + (self.a_max - self.a_min) * u
        self.Lambda.copy_(torch.expm1(-a.log() / EXPONENT).log())
        for weight, bias in ((self.W_a, self.b_a), (self.W_x, self.b_x)):
            weight.copy_(torch.randn_like(weight, dtype=torch.float64) / math.sqrt(weight.shape[1]))
            bias.zero_()

    @overload
    def forward(
        self,
        x: Tensor,
        state: Tensor | None = ...,
        *,
        return_state: Literal[False] = ...,
        cu_seqlens: Tensor | None = ...,
        segment_starts: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        state: Tensor | None = ...,
        *,
        return_state: Literal[True],
        cu_seqlens: Tensor | None = ...,
        segment_starts: Tensor | None = ...,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        x: Tensor,
        state: Tensor | None = ...,
        *,
        return_state: bool,
        cu_seqlens: Tensor | None = ...,
        segment_starts: Tensor | None = ...,
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        segment_starts: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run over whole sequences.

        Args:
            x: ``[B, T, H]``, of any real floating dtype.
            state: h before the first token, float32 ``[B, H]`` (float64 where x or the parameters are float64); if
                None, every sequence starts a segment.
            return_state: whether to return h after the last token too.
            cu_seqlens: int32 or int64 ``[S + 1]``, for S sequences packed into a batch of one as for
                :func:`fastwkv.linear_scan`; states are then ``[S, H]``.
            segment_starts: bool ``[B, T]``, True at further tokens that start a segment: a finite state before them
                is forgotten.

        Returns:
            h ``[B, T, H]`` of the dtype of x; with ``return_state`` also the state.

        Raises:
            TypeError: an argument is of another type or dtype.
            ValueError: a shape, device or offset does not fit.

        """
        checks.check_bool(return_state=return_state)
        check_tokens("B T H", self.hidden, x=x)
        check_carried(state, self.hidden, compute_dtypes(x, self.Lambda)[1], x, cu_seqlens)
        _check_starts("B T", segment_starts, x)
        starts = segment_starts
        if state is None:
            offsets = torch.zeros(1, dtype=torch.int64, device=x.device) if cu_seqlens is None else cu_seqlens
            first = torch.isin(torch.arange(x.shape[1], dtype=offsets.dtype, device=x.device), offsets)
            starts = first if starts is None else first | starts
        log_a, gated = self._gated(x, starts)
        h, final = linear_scan(None, gated, state, log_a=log_a, return_state=True, cu_seqlens=cu_seqlens)
        h = h.to(x.dtype)
        return (h, final) if return_state else h

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's takes anything and returns Any

    def step(
        self, x_t: Tensor, state: Tensor | None = None, *, segment_starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take one token.

        Args:
            x_t: the token, ``[B, H]``.
            state: h before it, as for :meth:`forward`.
            segment_starts: bool ``[B]``, as for :meth:`forward`.

        Returns:
            h_t ``[B, H]`` of the dtype of x_t, and the state after it.

        Raises:
            TypeError: as for :meth:`forward`.
            ValueError: as for :meth:`forward`.

        """
        check_tokens("B H", self.hidden, x_t=x_t)
        check_carried(state, self.hidden, compute_dtypes(x_t, self.Lambda)[1], x_t)
        _check_starts("B", segment_starts, x_t)
        if state is None:
            segment_starts = torch.ones(1, dtype=torch.bool, device=x_t.device)
        log_a, gated = self._gated(x_t, segment_starts)
        state = linear_scan_step(None, gated, torch.zeros_like(gated) if state is None else state, log_a=log_a)
        return state.to(x_t.dtype), state

    def extra_repr(self) -> str:
        """Return the sizes, which ``print`` shows."""
        return f"hidden={self.hidden}, heads={self.heads}"

    def _gated(self, x: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return log a and the input of the recurrence, both without rounding to 16 bits."""
        products, dtype = compute_dtypes(x, self.Lambda)
        blocks, wide = x.to(products).unflatten(-1, (self.heads, -1)), x.to(dtype)
        r, i = (
            torch.sigmoid(torch.einsum("...hi,hij->...hj", blocks, weight.to(products)).flatten(-2).to(dtype) + bias)
            for weight, bias in ((self.W_a, self.b_a), (self.W_x, self.b_x))
        )
        log_a = EXPONENT * F.logsigmoid(-self.Lambda.to(dtype)) * r  # softplus itself is cut off above 20
        # Where r is 0, so is 1 - a², and the gradient of its root would be infinity times 0.
        scale = (-torch.expm1(2 * log_a)).clamp(min=torch.finfo(dtype).tiny).sqrt()
        if starts is not None:
            log_a = torch.where(starts[..., None], -torch.inf, log_a)
            scale = torch.where(starts[..., None], 1, scale)
        return log_a, scale * i * wide


def _check_starts(dims: str, segment_starts: Tensor | None, x: Tensor) -> None:
    if segment_starts is None:
        return
    checks.check_dense(segment_starts=segment_starts)
    checks.check_dtype(torch.bool, "(True where a segment starts)", segment_starts=segment_starts)
    checks.check_shape(dims, tuple(x.shape[:-1]), segment_starts=segment_starts)
    checks.check_device(x=x, segment_starts=segment_starts)
