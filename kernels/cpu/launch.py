"""How the CPU kernels divide their work, and how tensors are made to fit their vectors."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastwkv.kernels.cpu.numerics import VECTOR_BYTES
from fastwkv.kernels.cpu.threads import parallel

# Below this many elements a second thread costs more (about 20 µs until it runs) than it saves.
PARALLEL_ELEMENTS = 16_384
# Vectors side by side in one unit of work: long enough runs of memory for the prefetcher, short enough for the cache.
WIDTH = 16
# Pieces of work for each thread: more than one, so that a thread which the system delays can leave some to the others.
PIECES_PER_THREAD = 4


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any argument is float64, else float32: the dtype of sums and states."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def fits(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels take tensors like this one, with sums of this dtype."""
    return t.shape[-1] * dtype.itemsize >= VECTOR_BYTES and (dtype == torch.float32 or t.dtype == dtype)


def fitted(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors with at least one vector of channels, in float64 if sums are."""
    result = []
    for t in tensors:
        if t is not None:
            t = t.double() if dtype == torch.float64 else t
            t = pad(t, (0, max(0, VECTOR_BYTES // dtype.itemsize - t.shape[-1])))
        result.append(t)
    return tuple(result)


def run(
    sequences: int,
    channels: int,
    elements: int,
    dtype: torch.dtype,
    kernel: Callable[[tuple[int, int, int]], None],
) -> None:
    """Call ``kernel((width, first, last))`` for all units of work, on several threads if that pays.

    A unit is one sequence of one block of ``width`` vectors of channels.
    """
    vectors = -(-channels * dtype.itemsize // VECTOR_BYTES)
    threads = torch.get_num_threads() if elements > PARALLEL_ELEMENTS else 1
    if threads == 1:
        width = min(WIDTH, vectors)
        kernel((width, 0, sequences * -(-vectors // width)))
        return
    width = min(WIDTH, max(1, vectors * sequences // (threads * PIECES_PER_THREAD)))
    units = sequences * -(-vectors // width)
    pieces = min(units, threads * PIECES_PER_THREAD)
    parallel(
        lambda i: kernel((width, i * units // pieces, (i + 1) * units // pieces)),
        pieces,
    )
