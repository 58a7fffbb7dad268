"""Prompts of any length are read in parallel, and in bounded memory."""

from torch import Tensor

from fastwkv.nn.rwkv4 import RWKV4
from fastwkv.nn.state import RWKV4State

PIECE = 4096
"""The number of tokens, of all sequences together, that are read at once. Reading them takes 2 * 4096 operations for
every weight. A GPU that reads 4 TB/s and does 1e15 operations a second is kept busy by 1000 operations for a weight of
16 bits, and needs more time for these than the host for starting the kernels. The largest tensor of a layer, of 4 D
numbers a token, has 84 MB in 16 bits for D = 2560."""


def piece_length(batch: int) -> int:
    """Return how many tokens of each sequence of a batch are read at once."""
    return max(1, PIECE // batch)


def read(model: RWKV4, tokens: Tensor, state: RWKV4State | None) -> tuple[Tensor, RWKV4State]:
    """Read sequences, int64 or int32 ``[B, T]``, piece by piece, and carry the state from piece to piece.

    The memory beside the tokens does not grow with T. A sequence of one piece gives the bits of :meth:`RWKV4.features`.
    A longer one gives the same numbers up to rounding: matrix products of other sizes may be summed in another order,
    and so may WKV's sums over time.

    Returns:
        The features ``[B, D]`` of the last token of every sequence, and the state after it.

    """
    for piece in tokens.split(piece_length(tokens.shape[0]), 1):
        x, state = model.features(piece, state)
    assert state is not None
    return x[:, -1], state
