"""Packed sequences on a GPU: the sequence that every token belongs to, and the states of sequences without any token.

The grid of the kernels knows nothing of the sequences, and the host never reads their offsets. A token has to know one
small integer. One kernel finds it by binary searches in the offsets, for all channels and both passes.

Nobody has checked the offsets. A token belongs to a sequence only if all tokens of the sequence are there and lead to
it. Any other token belongs to none, and the kernels make NaN of it. Offsets that run from 0 to T without decreasing
give every token a sequence.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.held import Constants, constants, start

BLOCK = 512  # tokens a program of four warps
ROW_BLOCK = 512  # channels of a row
NOWHERE = tl.constexpr(-1)  # edge of a token that belongs to no sequence: it has both flags


@triton.jit
def _ends_until(cu_seqlens_ptr, token, N, inside):
    """Return how many sequences end at these tokens or before. It never falls from a token to a later one."""
    low = tl.zeros_like(token)
    high = tl.zeros_like(token) + N
    size = N
    while size > 0:
        searching = inside & (low < high)
        middle = (low + high) // 2
        before = tl.load(cu_seqlens_ptr + 1 + middle, mask=searching, other=0) <= token
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & (before == 0), middle, high)
        size //= 2
    return low


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
    n = _ends_until(cu_seqlens_ptr, token, N, inside)
    inside &= n < N
    begin = tl.load(cu_seqlens_ptr + n, mask=inside, other=0)
    end = tl.load(cu_seqlens_ptr + n + 1, mask=inside, other=0)
    inside &= (begin >= 0) & (begin <= token) & (token < end) & (end <= T)
    begin = begin.to(tl.int32)
    end = end.to(tl.int32)
    # Where offsets decrease, the first and the last token tell whether all of them come to this sequence.
    inside &= _ends_until(cu_seqlens_ptr, begin, N, inside) == n
    inside &= _ends_until(cu_seqlens_ptr, end - 1, N, inside) == n
    first = (begin == token).to(tl.int32)
    last = (end == token + 1).to(tl.int32)
    edge = 4 * n + (2 * first + last if REVERSE else 2 * last + first)
    tl.store(edge_ptr + i, tl.where(inside, edge, NOWHERE), mask=i < T)


def packed_edges(cu_seqlens: Tensor, T: int, reverse: bool = False) -> Tensor:
    """Return for each token 4 n + 2 e + s, int32 ``[T]``: its sequence n, and whether it ends (e) or starts (s) it.

    With ``reverse`` the tokens are those of a scan from the last to the first, which starts where a sequence ends.
    A token of no sequence has -1, which has both flags.
    """
    cu_seqlens = cu_seqlens.contiguous()
    edges = torch.empty(T, dtype=torch.int32, device=cu_seqlens.device)
    numbers = (cu_seqlens.shape[0] - 1, T)
    start(_packed_edges_kernel, (-(-T // BLOCK),), (cu_seqlens, edges), numbers, _edge_constants(reverse))
    return edges


@triton.jit
def is_start(edge):
    """Return whether a token starts a sequence."""
    return (edge & 1) != 0


@triton.jit
def is_end(edge):
    """Return whether a token ends a sequence."""
    return (edge & 2) != 0


@triton.jit
def in_sequence(edge, in_c):
    """Return in which of these channels a token belongs to a sequence: in all of them or in none."""
    return tl.where(in_c, edge, NOWHERE) >= 0


@triton.jit(do_not_specialize=["N", "T"])
def _idle_rows_kernel(
    cu_seqlens_ptr,  # [N + 1]
    edge_ptr,  # int32 [T]
    source_ptr,  # [FIELDS, N, C], or None
    row_ptr,  # [FIELDS, N, C], written where a sequence has no token
    N,
    T,
    C: tl.constexpr,
    FIELDS: tl.constexpr,
    STATE: tl.constexpr,  # the last field is an exponent, -inf without a source
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(cu_seqlens_ptr + n).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + n + 1).to(tl.int64)
    empty = (begin == end) & (begin >= 0) & (end <= T)
    first = T - end if REVERSE else begin
    edge = tl.load(edge_ptr + tl.minimum(tl.maximum(first, 0), T - 1))
    if (begin >= end) | (edge >> 2 != n):
        for field in tl.static_range(FIELDS):
            at = (field * tl.num_programs(0).to(tl.int64) + n) * C + c
            if source_ptr is not None:
                row = tl.load(source_ptr + at, mask=c < C, other=0.0)
            else:
                nothing: tl.constexpr = -float("inf") if STATE and field == FIELDS - 1 else 0.0
                row = tl.full([BLOCK], nothing, row_ptr.dtype.element_ty)
            tl.store(row_ptr + at, tl.where(empty, row, float("nan")), mask=c < C)


def fill_idle_rows(
    cu_seqlens: Tensor, edges: Tensor, source: Tensor | None, rows: Tensor, reverse: bool = False, state: bool = False
) -> None:
    """Write the rows ``[..., N, C]``, real or complex, of those sequences that no token writes.

    An empty sequence ends as it began, with its row of ``source``. Without a source it has zeros, and -inf for the
    exponent of a WKV ``state``. A sequence whose tokens are not all there has NaN.
    """
    if rows.is_complex():
        rows, source = (None if t is None else torch.view_as_real(t).flatten(1) for t in (rows, source))
    N, C = rows.shape[-2:]
    grid, numbers = (N, -(-C // ROW_BLOCK)), (N, edges.shape[0])
    constants = _row_constants(C, rows.numel() // (N * C), state, reverse)
    start(_idle_rows_kernel, grid, (cu_seqlens.contiguous(), edges, source, rows), numbers, constants)


@lru_cache
def _edge_constants(reverse: bool) -> Constants:
    return constants(REVERSE=reverse, BLOCK=BLOCK)


@lru_cache
def _row_constants(C: int, fields: int, state: bool, reverse: bool) -> Constants:
    return constants(C=C, FIELDS=fields, STATE=state, REVERSE=reverse, BLOCK=ROW_BLOCK)
