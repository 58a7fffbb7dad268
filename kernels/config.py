"""Launch shapes, and what every implementation of an operator agrees on. Imports nothing."""

from dataclasses import dataclass

CHECKPOINT_ROWS = 16
"""WKV keeps its state before every 16th token for the backward pass: three float32, 0.75 bytes a token and channel."""

BACKWARD_ROWS = 8
"""Tokens that the backward kernel keeps in registers between recomputation and adjoint. With 16, float64 spills."""


FP_FUSION = True
"""Multiplications and additions become one instruction with one rounding. Said, since Triton's default will change."""


@dataclass(frozen=True)
class WKVLaunch:
    """How the WKV kernels are laid over the device."""

    block_c: int
    """Channels a program."""
    num_warps: int
    """Warps a program."""
    chunk: int
    """Tokens a program, a multiple of CHECKPOINT_ROWS."""

    def options(self, C: int) -> dict[str, int]:
        """What every kernel that walks along time is compiled for."""
        return {"C": C, "BLOCK_C": self.block_c, "num_warps": self.num_warps, "enable_fp_fusion": FP_FUSION}


WARPS_WANTED = 8
"""Warps of the main kernels that each multiprocessor should have. Of a bandwidth of 4.3 TB/s and a latency of about
0.8 µs, 26 KB a multiprocessor must be in flight; a warp of the forward kernel asks for 4 KB at once (16 rows of k and
v, 64 channels, 16 bits) and spends about as long on computing. A model's figure, not yet a measured one."""
MIN_CHUNK = 128
"""Tokens below which a chunk is not split further: its summary and carry would cost as much as its tokens."""


def wkv_launch(B: int, T: int, C: int, multiprocessors: int, itemsize: int) -> WKVLaunch:
    """Choose the launch shape for WKV on ``[B, T, C]``; ``itemsize`` is that of the accumulation dtype, in bytes.

    A program is one warp of two channels a lane (one in float64, whose rows take twice the registers). Sequences are
    split along time only as far as it takes to give every multiprocessor ``WARPS_WANTED`` of them.
    """
    block_c = 256 // itemsize
    programs = B * -(-C // block_c)
    wanted = -(-WARPS_WANTED * multiprocessors // programs)
    chunks = max(1, min(wanted, T // MIN_CHUNK))
    return WKVLaunch(block_c, 1, -(-T // (chunks * CHECKPOINT_ROWS)) * CHECKPOINT_ROWS)
