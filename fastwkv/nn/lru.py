"""The linear recurrent unit.

Source: "Resurrecting Recurrent Neural Networks for Long Sequences", arXiv 2303.06349.
"""

import math
from typing import TYPE_CHECKING, ClassVar, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastwkv.nn.recurrence import (
    check_carried,
    check_sizes,
    check_tokens,
    complex_dtype,
    compute_dtypes,
    least_decay,
)
from fastwkv.ops.checks import check_bool
from fastwkv.ops.derivatives import transformed
from fastwkv.ops.linear_scan import linear_scan, linear_scan_step
from fastwkv.ops.linear_scan_products import scan_between_products


class LRU(nn.Module):
    """The linear recurrent unit: a diagonal complex recurrence between two matrices.

    ::

        λ   = exp(-exp(ν_log) + i exp(θ_log))
        h_t = λ ⊙ h_{t-1} + exp(γ_log) ⊙ (B u_t)
        y_t = Re(C h_t) + D ⊙ u_t

    At the start of training, λ is uniform on the ring ``r_min <= |λ| <= r_max`` with a phase in ``[0, max_phase]``, and
    ``exp(γ_log) = √(1 - |λ|²)``, which gives h the variance of B u. For all values of the parameters |λ| < 1:
    exp(ν_log) counts as at least 4 units of rounding (5e-7 in float32).

    A whole sequence and its tokens one by one give the same, as does any split of it whose state is carried::

        y = lru(u)
        y, state = lru(u, state, return_state=True)
        y_t, state = lru.step(u_t, state)

    Gradients flow through a carried state; ``state.detach()`` cuts them. λ and the recurrence are complex64 in 16-bit
    models and under autocast too; there, B u and h in memory are pairs of real and imaginary parts of 16 bits. Under
    ``torch.device("meta")`` the layer is built without memory.

    Args:
        hidden: H, the channels of u and y.
        state: N, the channels of h.
        r_min: the inner radius of the ring, at least 0.
        r_max: the outer radius of the ring, at least ``r_min`` and at most 1.
        max_phase: the largest phase of λ, in radians. Long sequences need a small one.
        bidirectional: whether to run a second recurrence from the last token to the first, with the same λ, γ and B. C,
            of shape ``[H, 2 N]``, then reads both, the forward one first. Such a layer sees the whole sequence at once:
            it has no state and no step.

    At the start of training each part of B is N(0, 1/2H), each part of C is N(0, 1/columns), and D is N(0, 1).

    Source: arXiv 2303.06349, sections 3.1 to 3.4 and appendix A; both directions as in its experiment on Pathfinder.

    """

    # The paper trains these at a smaller rate and without weight decay; see param_groups.
    recurrent_parameters: ClassVar = ("nu_log", "theta_log", "gamma_log", "B_re", "B_im")

    def __init__(
        self,
        hidden: int,
        state: int,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(hidden=hidden, state=state)
        check_bool(bidirectional=bidirectional)
        if not 0 <= r_min <= r_max <= 1 or r_max == 0 or r_min == 1:
            raise ValueError(f"the ring must be 0 <= r_min <= r_max <= 1 and within (0, 1), got [{r_min}, {r_max}]")
        if not 0 < max_phase < math.inf:
            raise ValueError(f"max_phase must be above 0 and finite, got {max_phase}")
        self.hidden, self.state = hidden, state
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        self.bidirectional = bidirectional
        H, N, read = hidden, state, 2 * state if bidirectional else state
        self.nu_log = nn.Parameter(torch.empty(N))
        self.theta_log = nn.Parameter(torch.empty(N))
        self.gamma_log = nn.Parameter(torch.empty(N))
        self.B_re = nn.Parameter(torch.empty(N, H))
        self.B_im = nn.Parameter(torch.empty(N, H))
        self.C_re = nn.Parameter(torch.empty(H, read))
        self.C_im = nn.Parameter(torch.empty(H, read))
        self.D = nn.Parameter(torch.empty(H))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its value at the start of training, computed in float64."""
        u1, u2 = torch.rand(2, self.state, dtype=torch.float64, device=self.D.device)
        self.nu_log.copy_((-0.5 * (u1 * (self.r_max**2 - self.r_min**2) + self.r_min**2).log()).log())
        self.theta_log.copy_((self.max_phase * u2).log())
        # It is computed from the stored ν, which 16 bits round. 1 - |λ|² as written would lose half of its digits.
        self.gamma_log.copy_(0.5 * (-torch.expm1(-2 * self.nu_log.double().exp())).log())
        for matrix, scale in (
            (self.B_re, 2 * self.hidden),
            (self.B_im, 2 * self.hidden),
            (self.C_re, self.C_re.shape[1]),
            (self.C_im, self.C_im.shape[1]),
            (self.D, 1),
        ):
            matrix.copy_(torch.randn_like(matrix, dtype=torch.float64) / math.sqrt(scale))

    @overload
    def forward(
        self,
        u: Tensor,
        state: Tensor | None = ...,
        *,
        return_state: Literal[False] = ...,
        cu_seqlens: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self, u: Tensor, state: Tensor | None = ..., *, return_state: Literal[True], cu_seqlens: Tensor | None = ...
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, u: Tensor, state: Tensor | None = ..., *, return_state: bool, cu_seqlens: Tensor | None = ...
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(
        self,
        u: Tensor,
        state: Tensor | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run over whole sequences.

        Args:
            u: ``[B, T, H]``, of any real floating dtype.
            state: h before the first token, complex64 ``[B, N]`` (complex128 where u or the parameters are float64);
                zero if None.
            return_state: whether to return h after the last token too.
            cu_seqlens: int32 or int64 ``[S + 1]``, for S sequences packed into a batch of one as for
                :func:`fastwkv.linear_scan`; states are then ``[S, N]``.

        Returns:
            y ``[B, T, H]`` of the dtype of u; with ``return_state`` also the state.

        Raises:
            TypeError: an argument is of another type or dtype.
            ValueError: a shape, device or offset does not fit, or a bidirectional layer is given or asked for a state.

        """
        check_bool(return_state=return_state)
        check_tokens("B T H", self.hidden, u=u)
        self._check_one_direction(state is not None or return_state)
        products, recurrence = compute_dtypes(u, self.D)
        check_carried(state, self.state, complex_dtype(recurrence), u, cu_seqlens)
        # With gradients D u comes first: so the backward pass comes to it last, and keeps its gradient of u briefly.
        skip = self._skip(u, products) if torch.is_grad_enabled() else None
        a, into, out = self._decay(recurrence), self._into(products, recurrence), self._out(products)
        scanned = _scan_both_ways if self.bidirectional else scan_between_products
        y, final = scanned(u, into, a, out, state, cu_seqlens)
        y = _plus(y.to(products), self._skip(u, products) if skip is None else skip).to(u.dtype)
        return (y, final) if return_state else y

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's takes anything and returns Any

    def step(self, u_t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take one token.

        Args:
            u_t: the token, ``[B, H]``.
            state: h before it, as for :meth:`forward`.

        Returns:
            y_t ``[B, H]`` of the dtype of u_t, and the state after it.

        Raises:
            TypeError: as for :meth:`forward`.
            ValueError: as for :meth:`forward`.

        """
        check_tokens("B H", self.hidden, u_t=u_t)
        self._check_one_direction(True)
        products, recurrence = compute_dtypes(u_t, self.D)
        state_dtype = complex_dtype(recurrence)
        check_carried(state, self.state, state_dtype, u_t)
        if state is None:
            state = torch.zeros(u_t.shape[0], self.state, dtype=state_dtype, device=u_t.device)
        x_t = F.linear(u_t.to(products), self._into(products, recurrence)).unflatten(-1, (-1, 2))
        state = linear_scan_step(self._decay(recurrence), x_t, state)
        y_t = F.linear(torch.view_as_real(state).flatten(-2).to(products), self._out(products)).to(products)
        return _plus(y_t, self._skip(u_t, products)).to(u_t.dtype), state

    def extra_repr(self) -> str:
        """Return the sizes, which ``print`` shows."""
        return f"hidden={self.hidden}, state={self.state}, bidirectional={self.bidirectional}"

    def _decay(self, dtype: torch.dtype) -> Tensor:
        """Return λ. It is computed in float64, since its error counts as many times as h remembers steps."""
        info = torch.finfo(dtype)
        # Beyond these bounds |λ| is 0 or a phase has no digits left, but gradients would be 0 times infinity.
        nu_log = self.nu_log.double().clamp(math.log(least_decay(dtype)), math.log(-math.log(info.tiny)))
        theta_log = self.theta_log.double().clamp(max=-math.log(info.eps))
        return torch.polar(torch.exp(-nu_log.exp()), theta_log.exp()).to(complex_dtype(dtype))

    def _into(self, products: torch.dtype, dtype: torch.dtype) -> Tensor:
        """Return exp(γ_log) ⊙ B, computed in ``dtype``: the matrix whose product with u is pairs of parts."""
        weight = torch.stack((self.B_re, self.B_im), 1).to(dtype) * self.gamma_log.to(dtype).exp()[:, None, None]
        return weight.flatten(0, 1).to(products)

    def _out(self, products: torch.dtype) -> Tensor:
        """Return C as the matrix whose product with pairs of parts of h is Re(C h)."""
        return torch.stack((self.C_re, -self.C_im), 2).flatten(1).to(products)

    def _skip(self, u: Tensor, products: torch.dtype) -> Tensor:
        return self.D.to(products) * u.to(products)

    def _check_one_direction(self, state_asked: bool) -> None:
        if self.bidirectional and state_asked:
            raise ValueError("a bidirectional layer reads a sequence from both ends: it has no state and no step")


def _scan_both_ways(
    u: Tensor, into: Tensor, a: Tensor, out: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Do as ``scan_between_products``, for an ``out`` that reads a scan from the last token to the first as well."""
    assert initial is None
    x = F.linear(u.to(into.dtype), into).unflatten(-1, (-1, 2))
    h, final = linear_scan(a, x, return_state=True, cu_seqlens=cu_seqlens)
    both = torch.cat((h, linear_scan(a, x, reverse=True, cu_seqlens=cu_seqlens)), 2)
    return F.linear(both.flatten(-2), out), final


def _plus(y: Tensor, skip: Tensor) -> Tensor:
    # In vmap a mapped tensor cannot be added in place to one that is not.
    return y + skip if transformed() else y.add_(skip)
