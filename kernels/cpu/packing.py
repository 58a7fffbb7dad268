"""Packed sequences in plain PyTorch: what the derivatives of derivatives ask for. The CPU kernels take the offsets."""

import torch
from torch import Tensor


def packed_edges(cu_seqlens: Tensor, T: int, reverse: bool) -> Tensor:
    """Return what :func:`fastwkv.kernels.packing.packed_edges` does."""
    tokens = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True, out_int32=True)
    sequence.clamp_(max=cu_seqlens.shape[0] - 2)
    changes = torch.nn.functional.pad(sequence.diff() != 0, (1, 1), value=True).int()
    if reverse:
        sequence, changes = sequence.flip(0), changes.flip(0)
    return 4 * sequence + 2 * changes[1:] + changes[:-1]
