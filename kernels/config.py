"""Launch shapes, and what every implementation of an operator agrees on. Imports nothing."""

from dataclasses import dataclass

CHECKPOINT_ROWS = 16
"""WKV keeps its state before every 16th token for the backward pass: three float32, 0.75 bytes a token and channel."""

BACKWARD_ROWS = 8
"""Tokens that the backward kernel keeps in registers between recomputation and adjoint. With 16, float64 spills."""

SCAN_ROWS = 16
"""Tokens whose a and x the kernel of the linear scan asks for at once; half as many complex ones, whose exact sums,
unrolled 16 times, take 9 seconds to compile."""

SCAN_BACKWARD_ROWS = 8
"""The same of its backward kernel, which asks for a, h and gh."""

FP_FUSION = False
"""Whether compilers may turn products and sums into fused multiply-adds where none is written. They may not: the exact
sums rest on the rounding of each, and kernels give on a device what is written, and tested, without one."""


@dataclass(frozen=True)
class Launch:
    """How a kernel that walks along time is laid over the device."""

    block_c: int
    """Channels a program."""
    num_warps: int
    """Warps a program."""
    chunk: int
    """Tokens a program, a multiple of the tokens that it treats at once."""

    def options(self, C: int) -> dict[str, int]:
        """What every kernel that walks along time is compiled for."""
        return {"C": C, "BLOCK_C": self.block_c, "num_warps": self.num_warps, "enable_fp_fusion": FP_FUSION}


WARPS_WANTED = 8
"""Warps of the main kernels that each multiprocessor should have. Of a bandwidth of 4.3 TB/s and a latency of about
0.8 µs, 26 KB a multiprocessor must be in flight; a warp of the forward kernel asks for 4 KB at once (16 rows of k and
v, 64 channels, 16 bits) and spends about as long on computing. A model's figure, not yet a measured one."""
MIN_CHUNK = 128
"""Tokens below which a chunk is not split further: its summary and carry would cost as much as its tokens."""


def wkv_launch(B: int, T: int, C: int, multiprocessors: int, itemsize: int) -> Launch:
    """Choose the launch shape for WKV on ``[B, T, C]``; ``itemsize`` is that of the accumulation dtype, in bytes.

    A program is one warp of two channels a lane (one in float64, whose rows take twice the registers). Sequences are
    split along time only as far as it takes to give every multiprocessor ``WARPS_WANTED`` of them.
    """
    return _launch(B, T, C, 256 // itemsize, multiprocessors, CHECKPOINT_ROWS)


def scan_launch(B: int, T: int, C: int, multiprocessors: int, itemsize: int) -> Launch:
    """Choose the launch shape for the linear scan on ``[B, T, C]``; ``itemsize`` is that of x, in bytes.

    A program is one warp that reads 8 bytes a lane and row, one number of 16 bytes. A row of a and x is as many bytes
    as one of k and v for WKV: sequences are split as they are there.
    """
    return _launch(B, T, C, 32 * max(1, 8 // itemsize), multiprocessors, SCAN_ROWS)


def _launch(B: int, T: int, C: int, block_c: int, multiprocessors: int, rows: int) -> Launch:
    programs = B * -(-C // block_c)
    wanted = -(-WARPS_WANTED * multiprocessors // programs)
    chunks = max(1, min(wanted, T // MIN_CHUNK))
    return Launch(block_c, 1, -(-T // (chunks * rows)) * rows)
