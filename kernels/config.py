"""Launch shapes, and what every implementation of an operator agrees on. Imports nothing."""

from dataclasses import dataclass, replace


def checkpoint_rows(itemsize: int) -> int:
    """Return the tokens between two checkpoints of WKV, a power of two; ``itemsize`` is that of the state, in bytes.

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
"""Registers that a lane of WKV's kernels may have. Without a bound ptxas aims at 64 and 168: one warp of the forward
kernel then takes 64 clocks a row in place of 51, and with some versions the backward kernel spills."""

CARRY_GROUP = 8
"""Summaries of chunks that the carry of WKV asks for at once. It takes them in order, and each would cost a latency."""

SCAN_ROWS = 16
"""Tokens of a tile of the linear scan's inputs. A chunk is a multiple of them."""


def scan_rows(itemsize: int, parts: int, exact: bool, packed: bool, backward: bool) -> int:
    """Return the tokens of a tile, for numbers of one or two parts of ``itemsize`` bytes, their sums exact or not.

    In float64 16 tokens would spill in the backward pass, and so they do in float32 where sequences are packed and rows
    are not aligned. Unrolled 16 times, complex numbers take 9 seconds to compile if sums are exact, and 17 if sequences
    are packed.
    """
    rows = SCAN_ROWS * 4 // itemsize
    return rows // 2 if (parts == 2 and (exact or packed)) or (packed and backward) else rows


FP_FUSION = False
"""The permission for compilers to make fused multiply-adds of products and sums. They have none: the exact sums rest on
the rounding of each, and kernels give on a device what is written, and tested, without one."""


@dataclass(frozen=True)
class Launch:
    """How a kernel that walks along time is laid over the device."""

    block_c: int
    """Channels a program."""
    num_warps: int
    """Warps a program."""
    chunk: int
    """Tokens a program, a multiple of the tokens that it treats at once."""
    stages: int = STAGES
    """Tiles of each input in shared memory."""

    def constants(self, C: int) -> dict[str, int]:
        """Return what every kernel that walks along time is compiled for."""
        return {"C": C, "BLOCK_C": self.block_c, "num_warps": self.num_warps, "enable_fp_fusion": FP_FUSION}


@dataclass(frozen=True)
class Plan:
    """How a pass of an operator is laid over a device, and when its sequences are split along time."""

    row_bytes: int
    """Bytes of a row of k or x, of all sequences, a multiprocessor from which a sequence is one chunk."""
    warps: int
    """Warps a multiprocessor that sequences are split for, where they are."""
    block_c: int = 32
    num_warps: int = 1
    stages: int = STAGES

    def launch(self, B: int, T: int, C: int, multiprocessors: int, itemsize: int, rows: int) -> Launch:
        """Return the shape of a launch; ``itemsize`` is in bytes, and a chunk a multiple of ``rows`` tokens."""
        programs = B * -(-C // self.block_c)
        chunks = 1
        if B * C * itemsize < self.row_bytes * multiprocessors:
            wanted = -(-self.warps * multiprocessors // (programs * self.num_warps))
            chunks = max(1, min(wanted, T // MIN_CHUNK))
        return Launch(self.block_c, self.num_warps, -(-T // (chunks * rows)) * rows, self.stages)


# None of these figures has been measured; they are the compiler's and a model's.
#
# row_bytes. One warp alone takes about 55 clocks a row forward, however few there are. Chunks move 5e bytes in place of
# 3e: at 4.3 TB/s and 1.75 GHz, 18.6 bytes a clock and multiprocessor, 200 bytes of k are 5 * 200 / 18.6 = 54 clocks.
# Backward it is 8e and 84 clocks, nearly the same. One warp of the scan takes about 35 clocks: 5 * 130 / 18.6 = 35.
#
# warps. Two for each of a multiprocessor's four schedulers use most of its issue slots (one alone waits for itself 4
# clocks of 10), a third hides what the other two wait for in memory. WKV's backward kernel has registers for two: a
# wave of twelve would be followed by one of four, with half of the device idle. A warp of the scan moves 6e bytes a
# clock at most; eight have 48 KB on their way in 16 bits.
WKV_FORWARD = Plan(row_bytes=200, warps=12)
WKV_BACKWARD = Plan(row_bytes=200, warps=8)
SCAN_FORWARD = Plan(row_bytes=130, warps=8)
SCAN_BACKWARD = Plan(row_bytes=130, warps=8)

MIN_CHUNK = 128
"""Tokens below which a chunk is not split further: its summary and carry would cost as much as its tokens."""


def wkv_launch(B: int, T: int, C: int, multiprocessors: int, itemsize: int, backward: bool = False) -> Launch:
    """Choose the launch shape for a pass of WKV on ``[B, T, C]``; ``itemsize`` is that of k and v, in bytes."""
    plan = WKV_BACKWARD if backward else WKV_FORWARD
    return plan.launch(B, T, C, multiprocessors, itemsize, checkpoint_rows(4))


def scan_launch(B: int, T: int, C: int, multiprocessors: int, itemsize: int, backward: bool = False) -> Launch:
    """Choose the launch shape for a pass of the linear scan; ``itemsize`` is that of a number of x, in bytes.

    Complex numbers of 8 bytes and more take about three times as many clocks a row as real ones, for their exact sums.
    """
    plan = SCAN_BACKWARD if backward else SCAN_FORWARD
    if itemsize >= 8:
        plan = replace(plan, row_bytes=3 * plan.row_bytes)
    return plan.launch(B, T, C, multiprocessors, itemsize, SCAN_ROWS)
