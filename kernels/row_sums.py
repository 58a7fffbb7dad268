"""Sums over chunks and sequences on a GPU: gradients of what is the same at every token. One launch makes them all."""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import rounded_sum, two_sum
from fastwkv.kernels.config import FP_FUSION
from fastwkv.kernels.held import Constants, constants, start

BLOCK_C = 32  # channels a program of four warps
ROWS = 64  # terms that are asked for at once


@triton.jit(do_not_specialize=["rows"])
def _row_sums_kernel(
    terms_ptr,  # [1 or 2, rows, C]
    first_ptr,  # [C], the sum of the first terms
    second_ptr,  # [C], that of the second; None: there are none
    rows,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    which = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    row = tl.arange(0, ROWS)
    terms_ptr += which.to(tl.int64) * rows * C
    total = tl.zeros([BLOCK_C], terms_ptr.dtype.element_ty)
    low = total  # low has what roundings cut off, for there may be a million rows
    for begin in range(0, rows, ROWS):  # the order is always this one, so that two runs give the same bits
        there = (row < rows - begin)[:, None] & in_c[None, :]
        block = tl.sum(tl.load(terms_ptr + row[:, None] * C + c[None, :], mask=there, other=0.0), 0)
        total, error = two_sum(total, block)
        low += error
        terms_ptr += ROWS * C
    total = rounded_sum((total,), (low,))[0]
    if which == 0:
        tl.store(first_ptr + c, total, mask=in_c)
    if second_ptr is not None:
        if which == 1:
            tl.store(second_ptr + c, total, mask=in_c)


def row_sums(terms: Tensor, *sums: Tensor) -> None:
    """Add up the terms ``[K, rows, C]`` of one or two sums ``[C]``, each in a memory and a dtype of its own."""
    _, rows, C = terms.shape
    first, second = (*sums, None)[:2]
    start(_row_sums_kernel, (-(-C // BLOCK_C), len(sums)), (terms, first, second), (rows,), _constants(C))


@lru_cache
def _constants(C: int) -> Constants:
    return constants(C=C, ROWS=ROWS, BLOCK_C=BLOCK_C, enable_fp_fusion=FP_FUSION)
