"""The division of the CPU kernels' work over threads, and tensors made to fit their vectors."""

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fastwkv.kernels.cpu.threads import parallel
from fastwkv.kernels.cpu.vectors import HAS_FLOAT16, VECTOR_BYTES

# A second thread takes some 50 µs to wake; one alone does this many elements of the forward pass in 110 µs.
PARALLEL_ELEMENTS = 2**18
# Vectors side by side in one unit of work. Long runs of memory are fast to read: 4 take 1.3 times as long as 48.
WIDTH = 64
# Pieces of work for each thread: more than one, so that a thread which the system delays can leave some to the others.
PIECES_PER_THREAD = 2
# torch.empty has fresh memory for every large tensor. In pages of 4 KiB the system takes longer to hand it out than a
# scan takes for the rest: with huge pages (4, 4096, 256) in complex64 is done in a third of the time.
HUGE_PAGE = 2**21


def sequence_bounds(T: int, cu_seqlens: Tensor | None) -> np.ndarray:
    """Return where the sequences of one batch row begin and end.

    Raises:
        ValueError: ``cu_seqlens`` does not run from 0 to T without decreasing. The kernels would leave their memory; a
            compiled or exported call comes here without the checks of the public function.

    """
    if cu_seqlens is None:
        return np.array((0, T))
    bounds = cu_seqlens.to(torch.int64).numpy()
    if bounds[0] != 0 or bounds[-1] != T or (np.diff(bounds) < 0).any():
        raise ValueError(f"cu_seqlens must run from 0 to T = {T} without decreasing")
    return bounds


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return what the kernels take tensors as, 0 for None. The caller keeps the tensors alive."""
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def _system_call() -> Any:
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


_madvise = _system_call() if hasattr(mmap, "MADV_HUGEPAGE") else None


def large_empty_like(t: Tensor) -> Tensor:
    """Return ``torch.empty_like(t)``, in huge pages if it is large and the system has them."""
    result = torch.empty_like(t)
    first = -(-result.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (result.data_ptr() + result.nbytes) // HUGE_PAGE * HUGE_PAGE - first
    if size > 0 and _madvise is not None:
        _madvise(first, size, mmap.MADV_HUGEPAGE)  # advice: it may fail
    return result


def fits(t: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the kernels take a tensor as it is, for sums of this dtype."""
    converts = dtype == torch.float32 and (t.dtype == torch.bfloat16 or (t.dtype == torch.float16 and HAS_FLOAT16))
    return t.shape[-1] * dtype.itemsize >= VECTOR_BYTES and (t.dtype == dtype or converts)


def fitted(dtype: torch.dtype, *tensors: Tensor | None) -> Any:
    """Return the arguments of a launcher with at least one vector of channels, in the dtype of sums."""
    result = []
    for t in tensors:
        if t is not None and (t.is_floating_point() or t.is_complex()):
            t = pad(t.to(dtype), (0, max(0, VECTOR_BYTES // dtype.itemsize - t.shape[-1])))
        result.append(t)
    return result


def as_complex(pairs: Tensor) -> Tensor:
    """Return pairs of 16 bits as complex64: numba's vectors have one type for a and for x."""
    return torch.view_as_complex(pairs.float())


def run(kernel: Callable[[tuple[int, int, int]], None], N: int, C: int, elements: int, dtype: torch.dtype) -> None:
    """Call ``kernel((channels in a block, first unit, stop))`` for all units, on several threads if that pays.

    A unit of work is one of N sequences in one block of channels.
    """
    lanes = VECTOR_BYTES // dtype.itemsize
    vectors = -(-C // lanes)
    threads = torch.get_num_threads() if elements > PARALLEL_ELEMENTS else 1
    pieces = 1 if threads == 1 else threads * PIECES_PER_THREAD
    width = min(WIDTH, max(1, vectors * N // pieces))
    units = N * -(-vectors // width)
    pieces = min(pieces, units)
    if pieces == 1:
        kernel((width * lanes, 0, units))
    else:
        parallel(lambda i: kernel((width * lanes, i * units // pieces, (i + 1) * units // pieces)), pieces)
