"""Timing the bare access patterns of kernels.py: for each launch shape its ceiling, and what a cache holds."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from common.light import reason
from launch_shapes.candidates import ALL, DTYPES, PROGRAMS
from launch_shapes.kernels import backward_pattern, forward_pattern
from launch_shapes.turns import REPLAYS, ROUNDS, Budget, Emit, replays, turn_of
from timing.on_gpu import CudaTask
from torch import Tensor

from fastwkv.kernels.config import STAGES, checkpoint_rows

ROWS = checkpoint_rows(4)
SHAPE = (8, 4096, 2048)
REHEARSED = (1, 2 * ROWS, 128)
PASSES = {"forward": 3, "backward": 5}  # and their streams
# In 16 bits every shape, in float32, where memory decides, those with the tiles that are in use.
SHAPES = {"bfloat16": ALL, "float32": tuple((*program, STAGES) for program in PROGRAMS)}

SLICES = tuple((rows, 1024) for rows in (1024, 2048, 4096, 8192, 16384))  # and channels
SLICE_CHUNKS = 64  # of a slice: two thousand programs
SLICE_SHAPE = (32, 1, STAGES)
REHEARSED_SLICES = ((2 * ROWS, 32),)
CACHES = 3  # that all slices fill: what is read is not there any more when it is read in the next round


@dataclass(frozen=True)
class Pattern:
    """A pattern with a launch shape."""

    which: str
    dtype: str
    block_c: int
    num_warps: int
    stages: int

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the streams."""
        return DTYPES[self.dtype].itemsize

    def moved(self, shape: tuple[int, int, int]) -> float:
        """Return the bytes that are read and written, checkpoints included."""
        state = 3 * 4 / ROWS if self.which == "backward" else 0
        return (PASSES[self.which] * self.itemsize + state) * math.prod(shape)

    def tensors(self, shape: tuple[int, int, int], device: torch.device, fill: Callable[..., Tensor]) -> list[Tensor]:
        """Return the streams, and after those that are read what else the kernel takes."""
        B, T, C = shape
        streams = [fill(B, T, C, dtype=DTYPES[self.dtype], device=device) for _ in range(PASSES[self.which])]
        if self.which == "forward":
            return [*streams, fill(B, C, device=device)]
        return [*streams[:3], fill(B, 3 * (T // ROWS), C, device=device), *streams[3:]]

    def run(self, tensors: Sequence[Tensor]) -> None:
        """Launch the kernel on whole sequences."""
        B, T, C = tensors[0].shape
        grid = (B, C // self.block_c)
        options = self.options(C)
        with torch.cuda.device_of(tensors[0]):
            if self.which == "forward":
                forward_pattern[grid](*tensors, T, T, **options)
            else:
                backward_pattern[grid](*tensors, T, **options)

    def options(self, C: int) -> dict[str, int]:
        """Return what the kernel is compiled for."""
        tiles = {"C": C, "ROWS": ROWS, "STAGES": self.stages, "BLOCK_C": self.block_c}
        return tiles | {"num_warps": self.num_warps}


def patterns() -> list[Pattern]:
    """Return what is measured, 16 bits first."""
    return [Pattern(which, dtype, *shape) for dtype in SHAPES for which in PASSES for shape in SHAPES[dtype]]


def measure(cuda: Any, budget: Budget, emit: Emit, rehearsal: bool = False) -> None:
    """Measure the patterns by turns, those of a pass and dtype among each other, and emit a row for each."""
    shape = REHEARSED if rehearsal else SHAPE
    for dtype in SHAPES:
        for which in PASSES:
            group = [one for one in patterns() if (one.which, one.dtype) == (which, dtype)]
            _group(group[: 2 if rehearsal else None], shape, cuda, budget, emit, 1 if rehearsal else ROUNDS)
            cuda.release()


def _group(
    group: list[Pattern], shape: tuple[int, int, int], cuda: Any, budget: Budget, emit: Emit, rounds: int
) -> None:
    row = {"what": "skeleton", "pass": group[0].which, "dtype": group[0].dtype}
    if budget.left() <= 0:
        emit(row | {"skipped": "no time left"})
        return
    tensors = group[0].tensors(shape, cuda.device, torch.zeros)
    tasks = {}
    for one in group:
        row_of = row | {"block_c": one.block_c, "num_warps": one.num_warps, "stages": one.stages}
        try:
            task = CudaTask(lambda _, one=one: one.run(tensors), cuda.device, cuda=cuda)
            task.first = task.run()[1]
            tasks[one] = (task, row_of, [])
        except Exception as error:  # the others go on
            emit(row_of | {"error": reason(error)})
    for _ in range(rounds):
        for task, _, turns in tasks.values():
            if not turns or budget.left() > 0:
                turns.append(turn_of(task))
    for one, (_, row_of, turns) in tasks.items():
        seconds = float(np.median(turns))
        rate = one.moved(shape) / seconds / 1e9
        row_of |= dict(zip("BTC", shape, strict=True))
        emit(row_of | {"ms": 1e3 * seconds, "gb_per_s": rate, "turns": len(turns)})


def measure_cache(cuda: Any, budget: Budget, emit: Emit, rehearsal: bool = False) -> None:
    """Measure whether a pass over a slice of a sequence finds in the cache what the pass before has read.

    Three CUDA graphs: all summaries; all finishing passes, each slice long gone from the cache; and each finishing pass
    right after the summary of its slice, whose time is the third less the first.
    """
    for rows, channels in REHEARSED_SLICES if rehearsal else SLICES:
        row = {"what": "l2", "rows": rows, "C": channels}
        if budget.left() <= 0:
            emit(row | {"skipped": "no time left"})
            continue
        try:
            emit(row | slice_figures(cuda, rows, channels, 1 if rehearsal else REPLAYS))
        except Exception as error:
            emit(row | {"error": reason(error)})
        cuda.release()


def slice_figures(cuda: Any, rows: int, channels: int, times: int) -> dict[str, Any]:
    """Return what the passes over slices of so many rows take, in microseconds a slice."""
    count = 1 + -(-CACHES * cuda.cache // (2 * 2 * rows * channels))
    slices = [slice_tensors(rows, channels, cuda.device, torch.zeros) for _ in range(count)]
    kinds = {"summary": (summarise,), "finish": (finish,), "pair": (summarise, finish)}

    def run(calls: Sequence[Callable[[Sequence[Tensor]], None]]) -> None:
        for one in slices:
            for call in calls:
                call(one)

    run((summarise, finish))  # compiled before it is recorded
    graphs = {name: cuda.record(partial(run, calls))[0] for name, calls in kinds.items()}
    seconds = replays(cuda, graphs, times, evict=True)
    figures = slice_row({name: one / count for name, one in seconds.items()})
    return {"slices": count, "mb_read": 2 * 2 * rows * channels / 1e6, **figures}


def slice_row(seconds: dict[str, float]) -> dict[str, float]:
    """Return the row of a slice: what finishing takes with its inputs gone from the cache, and right after its summary.

    ``saved`` is the share of the first that the cache spares; 0 if it holds nothing.
    """
    right_after = seconds["pair"] - seconds["summary"]
    finish = {"us_finish_swept": 1e6 * seconds["finish"], "us_finish_right_after": 1e6 * right_after}
    return {"us_summary": 1e6 * seconds["summary"], **finish, "saved": 1 - right_after / seconds["finish"]}


def slice_tensors(rows: int, channels: int, device: torch.device, fill: Callable[..., Tensor]) -> list[Tensor]:
    """Return k, v and y of a slice, and its summaries."""
    streams = [fill(1, rows, channels, dtype=torch.bfloat16, device=device) for _ in range(3)]
    return [*streams, fill(SLICE_CHUNKS, channels, device=device)]


def summarise(tensors: Sequence[Tensor]) -> None:
    """Launch the pass that reads a slice and writes a row for each of its chunks."""
    k, v, _, final = tensors
    _slice(k, v, None, final)


def finish(tensors: Sequence[Tensor]) -> None:
    """Launch the pass that reads a slice and writes as many tokens."""
    _slice(*tensors)


def _slice(k: Tensor, v: Tensor, y: Tensor | None, final: Tensor) -> None:
    _, rows, channels = k.shape
    chunk = max(ROWS, rows // SLICE_CHUNKS)
    pattern = Pattern("forward", "bfloat16", *SLICE_SHAPE)
    grid = (rows // chunk, channels // pattern.block_c)
    with torch.cuda.device_of(k):
        forward_pattern[grid](k, v, y, final, rows, chunk, **pattern.options(channels))


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the launches of :func:`measure` and :func:`measure_cache`, by name."""
    cpu = torch.device("cpu")
    for one in patterns():
        yield f"skeleton {one}", lambda one=one: one.run(one.tensors(SHAPE, cpu, torch.empty))
    some = slice_tensors(*SLICES[0], cpu, torch.empty)
    yield "slice, summary", lambda: summarise(some)
    yield "slice, finish", lambda: finish(some)
