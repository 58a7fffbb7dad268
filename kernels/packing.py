"""Packed sequences on a GPU: which sequence every token belongs to, and whether it starts or ends it.

The grid of the kernels knows nothing of the sequences, and the host never reads their offsets. What a token has to know
is one small integer, found by a binary search in the offsets, by one kernel for all channels and both passes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.held import constants, start

BLOCK = 512  # tokens a program of four warps


@triton.jit(do_not_specialize=["N", "T"])
def _packed_edges_kernel(
    cu_seqlens_ptr,  # [N + 1]
    edge_ptr,  # int32 [T], written
    N,
    T,
    REVERSE: tl.constexpr,  # time runs from the last token to the first
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < T
    token = T - 1 - i if REVERSE else i
    # The sequence is the number of ends, cu_seqlens[1:], that are not after the token.
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + N
    size = N
    while size > 0:
        searching = inside & (low < high)
        middle = (low + high) // 2
        before = tl.load(cu_seqlens_ptr + 1 + middle, mask=searching, other=0) <= token
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & (before == 0), middle, high)
        size //= 2
    # Offsets are not checked: whatever they are, no sequence beyond the last is read or written.
    n = tl.minimum(low, N - 1)
    start = tl.load(cu_seqlens_ptr + n, mask=inside, other=0)
    end = tl.load(cu_seqlens_ptr + n + 1, mask=inside, other=0)
    first = (token == 0) | ((n > 0) & (start == token))
    last = (token == T - 1) | ((n < N - 1) & (end == token + 1))
    starts = (last if REVERSE else first).to(tl.int32)
    ends = (first if REVERSE else last).to(tl.int32)
    tl.store(edge_ptr + i, 4 * n + 2 * ends + starts, mask=inside)


def packed_edges(cu_seqlens: Tensor, T: int, reverse: bool = False) -> Tensor:
    """Return for each token 4 n + 2 e + s, int32 ``[T]``: its sequence n, and whether it ends (e) or starts (s) it.

    With ``reverse`` the tokens are those of a scan from the last to the first, which starts where a sequence ends.
    """
    cu_seqlens = cu_seqlens.contiguous()
    edges = torch.empty(T, dtype=torch.int32, device=cu_seqlens.device)
    numbers, kind = (cu_seqlens.shape[0] - 1, T), constants(REVERSE=reverse, BLOCK=BLOCK)
    start(_packed_edges_kernel, (-(-T // BLOCK),), (cu_seqlens, edges), numbers, kind)
    return edges
