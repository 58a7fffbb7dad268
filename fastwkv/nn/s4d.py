"""S4D, the diagonal state space layer.

Source: "On the Parameterization and Initialization of Diagonal State Space Models", arXiv 2206.11893.
"""

import math
from typing import TYPE_CHECKING, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from fastwkv.nn.recurrence import (
    check_carried,
    check_sizes,
    check_tokens,
    complex_dtype,
    compute_dtypes,
    least_decay,
)
from fastwkv.ops.checks import check_bool
from fastwkv.ops.linear_scan import linear_scan, linear_scan_step


class S4D(nn.Module):
    """H diagonal state space models, one a channel, each discretised with a step Δ of its own.

    A channel has N complex states, in conjugate pairs, of which one each is computed: n = 0 ... N/2 - 1. With
    zero-order hold::

        A_n = -exp(log_A_real_n) + i A_imag_n
        Ā_n = exp(Δ A_n)    B̄_n = (Ā_n - 1) / A_n · B_n,    Δ = exp(log_dt)
        h_{t,n} = Ā_n h_{t-1,n} + B̄_n u_t
        y_t = 2 Re Σ_n C_n h_{t,n} + D u_t

    For all values of the parameters |Ā| < 1: Δ exp(log_A_real) counts as at least 4 units of rounding. Ā - 1 is
    computed without cancellation. Calls, states, steps and dtypes are those of :class:`LRU`. The recurrence has H·N/2
    complex channels: states are ``[B, H * N // 2]``, and h takes N times the memory of u in float32.

    At the start of training, A is the same for every channel, Δ is log-uniform on ``[dt_min, dt_max]``, B is 1, the
    real and imaginary parts of C are N(0, 1/2) and D is N(0, 1).

    Args:
        hidden: H, the channels of u and y.
        state: N, the states of a channel, an even number.
        init: A at the start, "lin" for ``-1/2 + i π n`` or "inv" for ``-1/2 + i N/π (N/(2n+1) - 1)``.
        dt_min: the least Δ at the start, above 0.
        dt_max: the largest Δ at the start.

    Source: arXiv 2206.11893, sections 3 (discretisation, conjugate pairs) and 4 (S4D-Lin and S4D-Inv).

    """

    # The paper trains these at a smaller rate and without weight decay; see param_groups.
    recurrent_parameters: ClassVar = ("log_dt", "log_A_real", "A_imag", "B_re", "B_im")

    def __init__(
        self,
        hidden: int,
        state: int = 64,
        init: Literal["lin", "inv"] = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__()
        check_sizes(hidden=hidden, state=state)
        if state % 2:
            raise ValueError(f"state must be even, for conjugate pairs, got {state}")
        if init not in ("lin", "inv"):
            raise ValueError(f'init must be "lin" or "inv", got {init!r}')
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"the range of Δ must be 0 < dt_min <= dt_max, got [{dt_min}, {dt_max}]")
        self.hidden, self.state, self.init = hidden, state, init
        self.dt_min, self.dt_max = dt_min, dt_max
        self.log_dt = nn.Parameter(torch.empty(hidden))
        self.log_A_real = nn.Parameter(torch.empty(hidden, state // 2))
        self.A_imag = nn.Parameter(torch.empty(hidden, state // 2))
        self.B_re = nn.Parameter(torch.empty(hidden, state // 2))
        self.B_im = nn.Parameter(torch.empty(hidden, state // 2))
        self.C_re = nn.Parameter(torch.empty(hidden, state // 2))
        self.C_im = nn.Parameter(torch.empty(hidden, state // 2))
        self.D = nn.Parameter(torch.empty(hidden))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its value at the start of training, computed in float64."""
        N, device = self.state, self.D.device
        n = torch.arange(N // 2, dtype=torch.float64, device=device)
        self.log_A_real.fill_(math.log(0.5))
        self.A_imag.copy_(math.pi * n if self.init == "lin" else N / math.pi * (N / (2 * n + 1) - 1))
        least, most = math.log(self.dt_min), math.log(self.dt_max)
        self.log_dt.copy_(least + (most - least) * torch.rand(self.hidden, dtype=torch.float64, device=device))
        self.B_re.fill_(1)
        self.B_im.fill_(0)
        for tensor, std in ((self.C_re, math.sqrt(0.5)), (self.C_im, math.sqrt(0.5)), (self.D, 1.0)):
            tensor.copy_(std * torch.randn_like(tensor, dtype=torch.float64))

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
        """Run over whole sequences ``[B, T, H]``; arguments, results and errors are those of :meth:`LRU.forward`."""
        check_bool(return_state=return_state)
        check_tokens("B T H", self.hidden, u=u)
        self._check_state(state, u, cu_seqlens)
        a, x = self._discretised(u)
        h, final = linear_scan(a, x, state, return_state=True, cu_seqlens=cu_seqlens)
        y = self._read(h, u)
        return (y, final) if return_state else y

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's takes anything and returns Any

    def step(self, u_t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take one token ``[B, H]``; arguments, results and errors are those of :meth:`LRU.step`."""
        check_tokens("B H", self.hidden, u_t=u_t)
        self._check_state(state, u_t)
        a, x = self._discretised(u_t)
        state = linear_scan_step(a, x, torch.zeros_like(x) if state is None else state)
        return self._read(state, u_t), state

    def extra_repr(self) -> str:
        """Return the sizes, which ``print`` shows."""
        return f"hidden={self.hidden}, state={self.state}, init={self.init!r}"

    def _check_state(self, state: Tensor | None, u: Tensor, cu_seqlens: Tensor | None = None) -> None:
        dtype = complex_dtype(compute_dtypes(u, self.D)[1])
        check_carried(state, self.hidden * self.state // 2, dtype, u, cu_seqlens)

    def _discretised(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return Ā, one row of H·N/2 channels, and B̄ u; like λ of the LRU, Ā and B̄ are computed in float64."""
        _, dtype = compute_dtypes(u, self.D)
        most = -math.log(torch.finfo(dtype).eps)  # far beyond, exp overflows, and its gradient is 0 times infinity
        dt = self.log_dt.double().clamp(max=most).exp()[:, None]
        decay = (dt * self.log_A_real.double().clamp(max=most).exp()).clamp(min=least_decay(dtype))
        angle = dt * self.A_imag.double()
        modulus = torch.exp(-decay)
        a = torch.polar(modulus, angle)
        # This is exp(-d + iθ) - 1; the addends of the real part have the same sign while it is small.
        real = torch.expm1(-decay) * torch.cos(angle) - 2 * torch.sin(angle / 2).square()
        change = torch.complex(real, modulus * torch.sin(angle))
        B = torch.complex(self.B_re.double(), self.B_im.double())
        B_bar = change / torch.complex(-decay, angle) * dt * B
        x = B_bar.to(complex_dtype(dtype)) * u.to(dtype)[..., None]
        return a.flatten().to(complex_dtype(dtype)), x.flatten(-2)

    def _read(self, h: Tensor, u: Tensor) -> Tensor:
        """Return 2 Re Σ_n C_n h_n + D u."""
        _, dtype = compute_dtypes(u, self.D)
        weight = 2 * torch.stack((self.C_re, -self.C_im), -1).to(dtype).flatten(1)
        parts = torch.view_as_real(h).flatten(-2).unflatten(-1, (self.hidden, self.state))
        y = torch.einsum("...hn,hn->...h", parts, weight).to(dtype)
        return torch.addcmul(y, self.D.to(dtype), u.to(dtype)).to(u.dtype)
