"""Parts of both passes of the linear scan on a GPU: gates, edges of packed sequences, constants. See linear_scan.py.

A state is a tuple (h, low, product, product_low) of numbers, each a tuple of its parts: h + low is the state, and
product + product_low the product of a chunk's gates, if a summary is wanted.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwkv.kernels.arithmetic import LOG2_E, exp_sum, load, store
from fastwkv.kernels.config import Launch, scan_rows
from fastwkv.kernels.held import Constants, constants
from fastwkv.kernels.packing import in_sequence


@triton.jit
def edges_of(edge_ptr, rows, inside):
    """Return in which of these tokens, 16 at most, a sequence starts (bit 2 i of the result) or ends (bit 2 i + 1).

    One number has the bits of all of them: with a load for each, a tile would wait for 16.
    """
    return tl.sum((tl.load(edge_ptr + rows, mask=inside, other=0) & 3) << (2 * rows), 0)


@triton.jit
def load_of_sequence(ptr, edge_ptr, C: tl.constexpr, channels, like):
    """Read what a token's sequence has at ``ptr`` [N, C], zeros if that is None; NaN for a token without a sequence."""
    c, in_c = channels
    edge = tl.load(edge_ptr)
    if ptr is not None:
        at = (edge >> 2).to(tl.int64) * C + c
        return load(ptr, at, in_sequence(edge, in_c), like, float("nan"))
    else:
        part = tl.where(edge < 0, float("nan"), tl.zeros_like(like[0]))
        return (part, part) if len(like) == 2 else (part,)


@triton.jit
def store_of_sequence(ptr, edge_ptr, C: tl.constexpr, channels, z):
    """Write what a token's sequence has at ``ptr`` [N, C], if the token belongs to one."""
    c, in_c = channels
    edge = tl.load(edge_ptr)
    store(ptr, (edge >> 2).to(tl.int64) * C + c, z, in_sequence(edge, in_c))


@triton.jit
def gate_of(a, LOG: tl.constexpr, EXACT: tl.constexpr):
    """Return a of what a_ptr has, and with LOG and EXACT what its rounding cuts off: a tuple of one number, or two.

    The second is not None, since Triton below 3.7 lets no function return None beside a tensor.
    """
    if not LOG:
        return (a,)
    elif EXACT:
        high, low = exp_sum(a[0])
        return (high,), (low,)
    else:
        # Triton's exp2 is one instruction. Its exp adds three that keep subnormal results, which nothing would miss.
        return ((tl.exp2(a[0] * LOG2_E),),)


@lru_cache
def row_constants(
    launch: Launch,
    C: int,
    dtype: torch.dtype,
    is_complex: bool,
    fixed: bool,
    log: bool,
    reverse: bool,
    packed: bool,
    state_dtype: torch.dtype | None = None,
) -> Constants:
    """Return what a pass is compiled for; ``dtype`` is that of h, and ``state_dtype`` None in the forward pass.

    The backward kernel, some of whose states may be absent, is told their dtype.
    """
    parts, exact = 2 if is_complex else 1, dtype.itemsize >= 4
    itemsize = 8 if dtype in (torch.float64, torch.complex128) else 4
    backward = state_dtype is not None
    accumulator = {}
    if state_dtype is not None:
        accumulator["ACC"] = tl.float64 if state_dtype.to_real() == torch.float64 else tl.float32
    return constants(
        STEP=-C if reverse else C,
        PARTS=parts,
        EXACT=exact,
        FIXED=fixed,
        LOG=log,
        ROWS=scan_rows(itemsize, parts, exact, packed, backward),
        STAGES=launch.stages,
        **accumulator,
        **launch.constants(C),
    )


def as_parts(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return what the kernels take complex tensors as."""
    return [torch.view_as_real(t) if t is not None and t.is_complex() else t for t in tensors]


def summaries(chunks: int, C: int, like: Tensor) -> list[Tensor | None]:
    """Return memory for what comes out of every chunk and what goes into it."""
    return as_parts(like.new_empty(2, chunks, C), like.new_empty(chunks, C))
