"""Edges of packed sequences in plain PyTorch, for derivatives of derivatives. The CPU kernels take the offsets."""

import torch
from torch import Tensor


def packed_edges(cu_seqlens: Tensor, T: int, reverse: bool) -> Tensor:
    """Return what :func:`fastwkv.kernels.packing.packed_edges` does."""
    tokens = torch.arange(T, device=cu_seqlens.device)
    n = _ends_until(cu_seqlens, tokens)
    known = n < cu_seqlens.shape[0] - 1
    n = torch.where(known, n, 0)
    begin, end = cu_seqlens[n], cu_seqlens[n + 1]
    known &= (begin >= 0) & (begin <= tokens) & (tokens < end) & (end <= T)
    known &= (_ends_until(cu_seqlens, begin) == n) & (_ends_until(cu_seqlens, end - 1) == n)
    first, last = (begin == tokens).int(), (end == tokens + 1).int()
    edges = torch.where(known, 4 * n.int() + (2 * first + last if reverse else 2 * last + first), -1)
    return edges.flip(0) if reverse else edges


def _ends_until(cu_seqlens: Tensor, tokens: Tensor) -> Tensor:
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
