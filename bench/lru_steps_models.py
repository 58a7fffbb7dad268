"""The networks of lru_steps.py: everything alike but the recurrence in the blocks.

From the tanh RNN to the LRU each recurrence differs from the one before by one step of "Resurrecting Recurrent Neural
Networks for Long Sequences" (arXiv 2303.06349), section 3: the tanh goes; the matrix becomes complex and diagonal; its
entries are written as exp(-exp(nu) + i exp(theta)), which keeps them inside the unit disk, and start on a ring near its
edge; what enters the state is scaled by gamma. What each names as its ``recurrent_parameters`` (A, the matrix B and
gamma) gets the LRU's smaller learning rate and no weight decay.
"""

import math
from typing import ClassVar

import torch
from lru_steps_tasks import Task
from torch import Tensor, nn
from torch.nn import functional as F

import fastwkv
from fastwkv.nn import LRU

NAMES = {
    "tanh": "tanh RNN",
    "linear": "linear RNN",
    "diagonal": "complex diagonal",
    "ring": "exponential, ring",
    "lru": "LRU (with γ)",
    "short": "LRU, short memory",
}


class TanhRNN(nn.Module):
    """h_t = tanh(A h_{t-1} + B u_t),  y_t = C h_t + D u_t."""

    def __init__(self, hidden: int, state: int) -> None:
        """Draw A, B and C as Glorot did."""
        super().__init__()
        self.rnn = nn.RNN(hidden, state, bias=False, batch_first=True)
        self.rnn.recurrent_parameters = ("weight_hh_l0", "weight_ih_l0")
        self.C = nn.Linear(state, hidden, bias=False)
        self.D = nn.Parameter(torch.randn(hidden))
        for weight in (*self.rnn.parameters(), self.C.weight):
            nn.init.xavier_normal_(weight)

    def forward(self, u: Tensor) -> Tensor:
        """Map u [B, T, hidden] to y of the same shape."""
        return torch.addcmul(self.C(self.states(u)), self.D, u)

    def states(self, u: Tensor) -> Tensor:
        """Return h of every step."""
        return self.rnn(u)[0]

    def radius(self) -> float:
        """Return the largest |eigenvalue| of A."""
        return float(torch.linalg.eigvals(self.rnn.weight_hh_l0.detach()).abs().max())


class LinearRNN(TanhRNN):
    """h_t = A h_{t-1} + B u_t,  y_t = C h_t + D u_t, with a dense real A."""

    def states(self, u: Tensor) -> Tensor:
        """Return h of every step."""
        A = self.rnn.weight_hh_l0.t()
        first, *rest = F.linear(u, self.rnn.weight_ih_l0).unbind(1)
        h = [first]
        for x_t in rest:
            h.append(torch.addmm(x_t, h[-1], A))
        return torch.stack(h, 1)


class Diagonal(nn.Module):
    """h_t = a h_{t-1} + B u_t,  y_t = Re(C h_t) + D u_t, with a complex ``a`` that may leave the unit disk.

    It starts uniform on the disk, where the eigenvalues of a Glorot matrix lie.
    """

    recurrent_parameters: ClassVar = ("a_re", "a_im", "B_re", "B_im")

    def __init__(self, hidden: int, state: int) -> None:
        """Draw a, and the matrices as the LRU does."""
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

    def radius(self) -> float:
        """Return the largest |a|."""
        return float(torch.hypot(self.a_re.detach(), self.a_im.detach()).max())


class RingLRU(LRU):
    """The LRU, which can tell how long its memory has become."""

    def radius(self) -> float:
        """Return the largest |λ|."""
        return float(torch.exp(-self.nu_log.detach().exp()).max())


class Block(nn.Module):
    """x + drop(GLU(drop(gelu(recurrence(norm(x)))))): :class:`fastwkv.nn.LRUBlock` around any recurrence."""

    def __init__(self, recurrence: nn.Module, hidden: int, dropout: float) -> None:
        """Put the recurrence into a new block."""
        super().__init__()
        self.norm = nn.BatchNorm1d(hidden)
        self.recurrence = recurrence
        self.gate = nn.Linear(hidden, 2 * hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, hidden] to the same shape."""
        y = self.recurrence(self.norm(x.flatten(0, 1)).view(x.shape))
        return x + self.dropout(F.glu(self.gate(self.dropout(F.gelu(y)))))


class Network(nn.Module):
    """A linear map in, blocks, and a linear map of the last steps to classes."""

    def __init__(self, task: Task, model: str) -> None:
        """Build the network of this task around the recurrences of this model."""
        super().__init__()
        self.answers = task.answers
        self.encoder = nn.Linear(task.features, task.hidden)
        blocks = [Block(recurrence(task, model), task.hidden, task.dropout) for _ in range(task.blocks)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(task.hidden, task.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores [B, answers, classes] for x [B, T, features]."""
        return self.head(self.blocks(self.encoder(x))[:, -self.answers :])

    def radius(self) -> float:
        """Return the largest |eigenvalue| of any recurrence: a state forgets by this factor a step, at the slowest."""
        return max(block.recurrence.radius() for block in self.blocks)


def recurrence(task: Task, model: str) -> nn.Module:
    """Build one recurrence."""
    if model in ("tanh", "linear"):
        return (TanhRNN if model == "tanh" else LinearRNN)(task.hidden, task.real_state)
    if model == "diagonal":
        return Diagonal(task.hidden, task.state)
    lru = RingLRU(task.hidden, task.state, *(task.short if model == "short" else task.ring))
    if model == "ring":  # without the normalisation: gamma is 1 and stays 1
        nn.init.zeros_(lru.gamma_log)
        lru.gamma_log.requires_grad_(False)
    return lru
