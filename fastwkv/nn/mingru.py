"""minGRU, a gated recurrent unit whose gates do not depend on its state.

Source: "Were RNNs All We Needed?", arXiv 2410.01201.
"""

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastwkv.nn.recurrence import check_carried, check_sizes, check_tokens, compute_dtypes
from fastwkv.ops.checks import check_bool
from fastwkv.ops.linear_scan import linear_scan, linear_scan_step


class MinGRU(nn.Module):
    """The minimal gated recurrent unit.

    ::

        z_t = σ(W_z x_t)    h̃_t = W_h x_t
        h_t = (1 - z_t) ⊙ h_{t-1} + z_t ⊙ h̃_t

    and h is the output. Both maps have a bias. log(1 - z) is computed as such, so that a gate which keeps nearly
    everything keeps its digits. With ``positive``, h̃_t = g(W_h x_t), where ``g(v) = v + 1/2`` for v >= 0 and σ(v)
    below, as in the paper's log-space form: then h is an average of positive numbers.

    Calls, states and steps are those of :class:`LRU`; the state is h itself, and zero at the start. Gates and the
    recurrence are float32 in 16-bit models and under autocast too; the two products with W are rounded to 16 bits
    before. The initial weights are those of :class:`torch.nn.Linear`.

    Args:
        hidden: H, the channels of x.
        state: N, the channels of h; H if None.
        positive: whether to put g around W_h x.

    Source: arXiv 2410.01201, section 3.1; g from its appendix on the log-space form.

    """

    def __init__(self, hidden: int, state: int | None = None, positive: bool = False) -> None:
        super().__init__()
        state = hidden if state is None else state
        check_sizes(hidden=hidden, state=state)
        check_bool(positive=positive)
        self.hidden, self.state, self.positive = hidden, state, positive
        self.gate = nn.Linear(hidden, state)
        self.candidate = nn.Linear(hidden, state)

    def reset_parameters(self) -> None:
        """Set every parameter to its value at the start of training."""
        self.gate.reset_parameters()
        self.candidate.reset_parameters()

    @overload
    def forward(
        self,
        x: Tensor,
        state: Tensor | None = ...,
        *,
        return_state: Literal[False] = ...,
        cu_seqlens: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, state: Tensor | None = ..., *, return_state: Literal[True], cu_seqlens: Tensor | None = ...
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, x: Tensor, state: Tensor | None = ..., *, return_state: bool, cu_seqlens: Tensor | None = ...
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run over whole sequences.

        Args:
            x: ``[B, T, H]``, of any real floating dtype.
            state: h before the first token, float32 ``[B, N]`` (float64 where x or the parameters are float64); zero
                if None.
            return_state: whether to return h after the last token too.
            cu_seqlens: int32 or int64 ``[S + 1]``, for S sequences packed into a batch of one as for
                :func:`fastwkv.linear_scan`; states are then ``[S, N]``.

        Returns:
            h ``[B, T, N]`` of the dtype of x; with ``return_state`` also the state.

        Raises:
            TypeError: an argument is of another type or dtype.
            ValueError: a shape, device or offset does not fit.

        """
        check_bool(return_state=return_state)
        check_tokens("B T H", self.hidden, x=x)
        check_carried(state, self.state, compute_dtypes(x, self.gate.weight)[1], x, cu_seqlens)
        log_a, gated = self._gated(x)
        h, final = linear_scan(None, gated, state, log_a=log_a, return_state=True, cu_seqlens=cu_seqlens)
        h = h.to(x.dtype)
        return (h, final) if return_state else h

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's takes anything and returns Any

    def step(self, x_t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take one token.

        Args:
            x_t: the token, ``[B, H]``.
            state: h before it, as for :meth:`forward`.

        Returns:
            h_t ``[B, N]`` of the dtype of x_t, and the state after it.

        Raises:
            TypeError: as for :meth:`forward`.
            ValueError: as for :meth:`forward`.

        """
        check_tokens("B H", self.hidden, x_t=x_t)
        check_carried(state, self.state, compute_dtypes(x_t, self.gate.weight)[1], x_t)
        log_a, gated = self._gated(x_t)
        state = linear_scan_step(None, gated, torch.zeros_like(gated) if state is None else state, log_a=log_a)
        return state.to(x_t.dtype), state

    def extra_repr(self) -> str:
        """Return the option that the parts do not show, for ``print``."""
        return f"positive={self.positive}"

    def _gated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log(1 - z) and z ⊙ h̃, both without rounding to 16 bits."""
        products, dtype = compute_dtypes(x, self.gate.weight)
        z, candidate = (
            F.linear(x.to(products), part.weight.to(products), part.bias.to(products)).to(dtype)
            for part in (self.gate, self.candidate)
        )
        if self.positive:
            candidate = torch.where(candidate < 0, torch.sigmoid(candidate), candidate + 0.5)
        return F.logsigmoid(-z), torch.sigmoid(z) * candidate
