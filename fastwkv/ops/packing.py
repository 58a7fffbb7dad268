"""Packed sequences: what the kernels make of their offsets, once for both passes."""

from typing import Any

import torch
from torch import Tensor

from fastwkv.ops.library import register


def edges_of(cu_seqlens: Tensor | None, T: int, reverse: bool = False) -> Tensor | None:
    """Return what the kernels of both passes read in the place of offsets; None where they read the offsets.

    A GPU's programs do not know the sequences: every token says which one it belongs to (``packed_edges``).
    """
    if cu_seqlens is None or not cu_seqlens.is_cuda:
        return None
    return torch.ops.fastwkv.packed_edges(cu_seqlens, T, reverse)


def _packed_edges_fake(cu_seqlens: Tensor, T: int, reverse: bool) -> Tensor:
    return cu_seqlens.new_empty(T, dtype=torch.int32)


register("packed_edges(Tensor cu_seqlens, SymInt T, bool reverse) -> Tensor", "packing", _packed_edges_fake)


def _packed_edges_vmap(
    info: Any, in_dims: tuple[int, None, None], cu_seqlens: Tensor, T: int, reverse: bool
) -> tuple[Tensor, int]:
    rows = cu_seqlens.unbind(in_dims[0])
    return torch.stack([torch.ops.fastwkv.packed_edges(row, T, reverse) for row in rows]), 0


torch.library.register_vmap("fastwkv::packed_edges", _packed_edges_vmap)
