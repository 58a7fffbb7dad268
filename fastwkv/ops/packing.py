"""Packed sequences: the form of their offsets that the kernels of a GPU read, made once for both passes."""

from typing import Any

import torch
from torch import Tensor

from fastwkv.ops.library import operator


def edges_of(cu_seqlens: Tensor | None, T: int, reverse: bool = False) -> Tensor | None:
    """Return ``packed_edges`` for a GPU, None where the kernels read the offsets themselves.

    The programs of a GPU do not know the sequences: each token says which one it belongs to.
    """
    if cu_seqlens is None or not cu_seqlens.is_cuda:
        return None
    return packed_edges(cu_seqlens, T, reverse)


@operator("packing")
def packed_edges(cu_seqlens: Tensor, T: int, reverse: bool) -> Tensor:
    """Return the sequence of each token, and whether it starts or ends it, int32 ``[T]``: see kernels/packing.py."""
    return cu_seqlens.new_empty(T, dtype=torch.int32)


def _packed_edges_vmap(
    info: Any, in_dims: tuple[int, None, None], cu_seqlens: Tensor, T: int, reverse: bool
) -> tuple[Tensor, int]:
    rows = cu_seqlens.unbind(in_dims[0])
    return torch.stack([packed_edges(row, T, reverse) for row in rows]), 0


torch.library.register_vmap("fastwkv::packed_edges", _packed_edges_vmap)
