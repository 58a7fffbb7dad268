"""Launch shapes, and what every implementation of an operator agrees on. Imports nothing."""

from dataclasses import dataclass


def checkpoint_rows(itemsize: int) -> int:
    """Tokens from one of WKV's checkpoints to the next, a power of two; ``itemsize`` is that of the state, in bytes.

    With float32 a checkpoint is 0.75 bytes a token and channel. The backward kernel keeps six numbers of each of these
    tokens in registers: of 16 tokens in float32; of 8 in float64 they would spill.
    """
    return 16 if itemsize == 4 else 4


STAGES = 4
"""Tiles of each input in shared memory: one that is worked on, three on their way. The two of k and v, of 16 rows and
32 channels, are 6 KB a warp in 16 bits. At 12.4 bytes a clock and multiprocessor, and 1400 clocks until they are there,
17 KB have to be on their way: of three warps or more. With two on their way one warp of WKV waited for a quarter of
the time, with four the compiler finds nothing more to win."""

FORWARD_REGISTERS = 128
BACKWARD_REGISTERS = 255
"""Registers that a lane of WKV's kernels may have. Left to itself ptxas aims at 64 and 168: one warp of the forward
kernel then takes 64 clocks a row in place of 51, and with some versions the backward kernel spills."""

CARRY_GROUP = 8
"""Summaries of chunks that the carry of WKV asks for at once. It takes them in order, and each would cost a latency."""

SCAN_ROWS = 16
"""Tokens of a tile of the linear scan's inputs. A chunk is a multiple of them."""


def scan_rows(itemsize: int, parts: int, exact: bool, packed: bool) -> int:
    """Tokens of a tile, for numbers of one part or two of ``itemsize`` bytes in registers, their sums exact or not.

    In float64 16 tokens would spill in the backward pass. Unrolled 16 times, complex numbers take 9 seconds to compile
    if sums are exact, and 17 if sequences are packed.
    """
    rows = SCAN_ROWS * 4 // itemsize
    return rows // 2 if parts == 2 and (exact or packed) else rows


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


ROW_BYTES = 200
"""Bytes of a row of k, of all sequences, a multiprocessor from which WKV takes each sequence as one chunk. One warp
alone takes about 55 clocks a row, however few there are. Chunks move 5e bytes in place of 3e: at 4.3 TB/s and 1.75 GHz,
18.6 bytes a clock and multiprocessor, 200 bytes of k are 5 * 200 / 18.6 = 54 clocks. The compiler's and a model's
figures, not yet measured ones."""
WARPS_WANTED = 12
"""Warps a multiprocessor that sequences are split for. Two for each of its four schedulers use most of its issue slots
(one alone waits for itself 4 clocks of 10), a third hides what the other two wait for in memory. As for ROW_BYTES."""
MIN_CHUNK = 128
"""Tokens below which a chunk is not split further: its summary and carry would cost as much as its tokens."""


def wkv_launch(B: int, T: int, C: int, multiprocessors: int, itemsize: int) -> Launch:
    """Choose the launch shape for WKV on ``[B, T, C]``; ``itemsize`` is that of k and v, in bytes.

    A program is one warp of one channel a lane. Sequences are split along time only where batch and channels alone
    leave the device waiting (``ROW_BYTES``), and then as far as it takes to give every multiprocessor ``WARPS_WANTED``
    warps.
    """
    rows = checkpoint_rows(4)
    if B * C * itemsize >= ROW_BYTES * multiprocessors:
        return Launch(32, 1, -(-T // rows) * rows)
    return _launch(B, T, C, 32, WARPS_WANTED * multiprocessors, rows)


SCAN_ROW_BYTES = 130
"""ROW_BYTES of the linear scan. One warp takes about 35 clocks a row; in chunks a forward pass moves 5e bytes in place
of 3e, 5 * 130 / 18.6 = 35 clocks. A compiler's and a model's figures, not yet measured ones."""
SCAN_WARPS_WANTED = 8
"""WARPS_WANTED of the linear scan. A warp moves 6e bytes a clock at most; eight have 48 KB on their way in 16 bits."""


def scan_launch(B: int, T: int, C: int, multiprocessors: int, itemsize: int) -> Launch:
    """Choose the launch shape for the linear scan on ``[B, T, C]``; ``itemsize`` is that of a number of x, in bytes.

    A program is one warp of one channel a lane, as in :func:`wkv_launch`. Complex numbers of 8 bytes and more take
    about three times as many clocks a row as real ones, for their exact sums.
    """
    slow = 3 if itemsize >= 8 else 1
    if B * C * itemsize >= slow * SCAN_ROW_BYTES * multiprocessors:
        return Launch(32, 1, -(-T // SCAN_ROWS) * SCAN_ROWS)
    return _launch(B, T, C, 32, SCAN_WARPS_WANTED * multiprocessors, SCAN_ROWS)


def _launch(B: int, T: int, C: int, block_c: int, warps: int, rows: int) -> Launch:
    programs = B * -(-C // block_c)
    chunks = max(1, min(-(-warps // programs), T // MIN_CHUNK))
    return Launch(block_c, 1, -(-T // (chunks * rows)) * rows)
