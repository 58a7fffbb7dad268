"""The residual block of a deep LRU network.

Source: "Resurrecting Recurrent Neural Networks for Long Sequences", arXiv 2303.06349.
"""

import math
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastwkv.nn.lru import LRU
from fastwkv.nn.recurrence import check_tokens, in_wider_dtype
from fastwkv.ops.checks import check_bool


class LRUBlock(nn.Module):
    """One residual block of a deep LRU network.

    ::

        y = x + drop(GLU(drop(gelu(LRU(norm(x))))))

    with ``GLU(z) = a ⊙ σ(b)``, where a and b are the halves of one linear map of z. Calls, states, steps and dtypes are
    those of :class:`LRU`: if the dtypes of x and of the parameters differ, the wider of both is that of the
    computation. With ``norm="batch"`` the mean and variance of a channel are taken over all tokens of all sequences in
    training, so that only in ``eval()`` a token depends on nothing but the tokens before it.

    Args:
        hidden: H, the channels of x and y.
        state: N, the channels of the state.
        r_min: as for :class:`LRU`.
        r_max: as for :class:`LRU`.
        max_phase: as for :class:`LRU`.
        dropout: the probability of both dropouts.
        norm: "batch", as in the paper, or "layer".
        bidirectional: as for :class:`LRU`.

    Source: arXiv 2303.06349, figure 1 and its appendix on the experiments.

    """

    def __init__(
        self,
        hidden: int,
        state: int,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        dropout: float = 0.0,
        norm: Literal["batch", "layer"] = "batch",
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "layer"):
            raise ValueError(f'norm must be "batch" or "layer", got {norm!r}')
        self.lru = LRU(hidden, state, r_min, r_max, max_phase, bidirectional)
        self.norm: nn.BatchNorm1d | nn.LayerNorm = nn.BatchNorm1d(hidden) if norm == "batch" else nn.LayerNorm(hidden)
        self.gate = nn.Linear(hidden, 2 * hidden)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Set every parameter to its value at the start of training."""
        self.lru.reset_parameters()
        self.norm.reset_parameters()
        self.gate.reset_parameters()

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
        """Run over whole sequences; arguments, results and errors are those of :meth:`LRU.forward`."""
        check_bool(return_state=return_state)
        check_tokens("B T H", self.lru.hidden, x=x)
        u = in_wider_dtype(self.norm, x.flatten(0, 1)).view(x.shape)  # BatchNorm1d looks for channels there
        if not return_state:
            return self._residual(x, self.lru(u, state, cu_seqlens=cu_seqlens))
        y, final = self.lru(u, state, return_state=True, cu_seqlens=cu_seqlens)
        return self._residual(x, y), final

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's takes anything and returns Any

    def step(self, x_t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take one token; arguments, results and errors are those of :meth:`LRU.step`."""
        check_tokens("B H", self.lru.hidden, x_t=x_t)
        y, state = self.lru.step(in_wider_dtype(self.norm, x_t), state)
        return self._residual(x_t, y), state

    def _residual(self, x: Tensor, y: Tensor) -> Tensor:
        gated = F.glu(in_wider_dtype(self.gate, self.dropout(F.gelu(y))))
        return torch.add(x, self.dropout(gated)).to(x.dtype)
