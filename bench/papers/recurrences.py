"""Recurrences on the way from the tanh RNN to the LRU, and the network around them.

Each differs from the one before by one step of "Resurrecting Recurrent Neural Networks for Long Sequences" (arXiv
2303.06349), section 3: the tanh goes; the matrix becomes complex and diagonal; its entries are written as
exp(-exp(nu) + i exp(theta)), which keeps them inside the unit disk, and start on a ring near its edge; what enters the
state is scaled by gamma. What each names as its ``recurrent_parameters`` (A, the matrix B and gamma) gets the LRU's
smaller learning rate and no weight decay.
"""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastwkv
from fastwkv.nn import LRU


class Dense(nn.Module):
    """h_t = f(A h_{t-1} + B u_t),  y_t = C h_t + D u_t, with a dense real A; f is tanh or nothing.

    A, B and C start as Glorot's do.
    """

    def __init__(self, hidden: int, state: int, tanh: bool) -> None:
        super().__init__()
        self.tanh = tanh
        self.rnn = nn.RNN(hidden, state, bias=False, batch_first=True)
        self.rnn.recurrent_parameters = ("weight_hh_l0", "weight_ih_l0")
        self.C = nn.Linear(state, hidden, bias=False)
        self.D = nn.Parameter(torch.randn(hidden))
        for weight in (*self.rnn.parameters(), self.C.weight):
            nn.init.xavier_normal_(weight)

    def forward(self, u: Tensor) -> Tensor:
        """Map u [B, T, hidden] to y of the same shape."""
        h = self.rnn(u)[0] if self.tanh else self._linear(u)
        return torch.addcmul(self.C(h), self.D, u)

    def _linear(self, u: Tensor) -> Tensor:
        A = self.rnn.weight_hh_l0.t()
        first, *rest = F.linear(u, self.rnn.weight_ih_l0).unbind(1)
        h = [first]
        for x_t in rest:
            h.append(torch.addmm(x_t, h[-1], A))
        return torch.stack(h, 1)


class Diagonal(nn.Module):
    """h_t = a h_{t-1} + B u_t,  y_t = Re(C h_t) + D u_t, with a complex ``a`` that may leave the unit disk.

    It starts uniform on the disk, where the eigenvalues of a Glorot matrix lie; B, C and D start as the LRU's do.
    """

    recurrent_parameters: ClassVar = ("a_re", "a_im", "B_re", "B_im")

    def __init__(self, hidden: int, state: int) -> None:
        super().__init__()
        a = torch.polar(torch.rand(state).sqrt(), 2 * math.pi * torch.rand(state))
        self.a_re, self.a_im = nn.Parameter(a.real.clone()), nn.Parameter(a.imag.clone())
        self.B_re, self.B_im = (nn.Parameter(torch.randn(state, hidden) / math.sqrt(2 * hidden)) for _ in range(2))
        self.C_re, self.C_im = (nn.Parameter(torch.randn(hidden, state) / math.sqrt(state)) for _ in range(2))
        self.D = nn.Parameter(torch.randn(hidden))

    def forward(self, u: Tensor) -> Tensor:
        """Map u [B, T, hidden] to y of the same shape."""
        x = torch.complex(F.linear(u, self.B_re), F.linear(u, self.B_im))
        h = fastwkv.linear_scan(torch.complex(self.a_re, self.a_im), x)
        y = F.linear(h.real, self.C_re) - F.linear(h.imag, self.C_im)
        return torch.addcmul(y, self.D, u)


@torch.no_grad()
def radius(recurrence: nn.Module) -> float:
    """Return the largest |eigenvalue|: a state forgets by this factor a step, at the slowest."""
    if isinstance(recurrence, Dense):
        moduli = torch.linalg.eigvals(recurrence.rnn.weight_hh_l0).abs()
    elif isinstance(recurrence, Diagonal):
        moduli = torch.hypot(recurrence.a_re, recurrence.a_im)
    else:
        assert isinstance(recurrence, LRU)
        moduli = torch.exp(-recurrence.nu_log.exp())
    return float(moduli.max())


class Block(nn.Module):
    """x + drop(GLU(drop(gelu(recurrence(norm(x)))))): :class:`fastwkv.nn.LRUBlock` around any recurrence."""

    def __init__(self, recurrence: nn.Module, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(hidden)
        self.recurrence = recurrence
        self.gate = nn.Linear(hidden, 2 * hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, hidden] to the same shape."""
        y = self.recurrence(self.norm(x.flatten(0, 1)).view(x.shape))
        return x + self.dropout(F.glu(self.gate(self.dropout(F.gelu(y)))))


class Sizes(NamedTuple):
    """The sizes of a network."""

    features: int
    classes: int
    answers: int  # how many of the last steps are told
    blocks: int
    hidden: int
    dropout: float


class Network(nn.Module):
    """A linear map in, blocks around recurrences, and a linear map of the last steps to classes."""

    def __init__(self, sizes: Sizes, recurrence: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.answers = sizes.answers
        self.encoder = nn.Linear(sizes.features, sizes.hidden)
        blocks = [Block(recurrence(), sizes.hidden, sizes.dropout) for _ in range(sizes.blocks)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(sizes.hidden, sizes.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores [B, answers, classes] for x [B, T, features]."""
        return self.head(self.blocks(self.encoder(x))[:, -self.answers :])
