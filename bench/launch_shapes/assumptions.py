"""Measuring what gpu_model.py assumes of a device: copy bandwidth, latency of a load, clock, cost of a launch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common.light import reason
from launch_shapes.candidates import Case, call, cases, draw, empty
from launch_shapes.kernels import chase_kernel, empty_kernel
from launch_shapes.turns import REPLAYS, Budget, Emit, replays, timed
from timing.on_gpu import copy_seconds
from torch import Tensor

LINE = 64  # numbers of 4 bytes from one link of the chain to the next: no two lie in one line of a cache
CHAINS = 5  # measured; the median counts
STEP_SECONDS = 2e-6  # of a load, at most: a load beside them lasts for longer than the chain
GRAPH_LAUNCHES = 100


@dataclass(frozen=True)
class Scale:
    """How much is moved."""

    copied: tuple[int, ...] = (2**30, 2**32)  # bytes
    steps: int = 1000  # of a chain
    links: int = 4  # caches that the chain fills


REHEARSED = Scale((2**12, 2**14), 3)


class Chain:
    """A chain of loads that goes through memory in no order, each of a line that no other has."""

    def __init__(self, cuda: Any, scale: Scale) -> None:
        self.cuda, self.steps = cuda, scale.steps
        count = max(scale.steps * (CHAINS + 1), scale.links * cuda.cache // (4 * LINE))
        generator = torch.Generator(cuda.device).manual_seed(0)
        self.order = torch.randperm(count, device=cuda.device, generator=generator, dtype=torch.int32) * LINE
        self.next = torch.zeros(count * LINE, dtype=torch.int32, device=cuda.device)
        self.next[self.order.long()] = self.order.roll(-1)
        self.starts = self.order[:: scale.steps].tolist()
        self.end = torch.empty(1, dtype=torch.int32, device=cuda.device)
        self.counters = torch.empty(2, dtype=torch.int64, device=cuda.device)

    def follow(self, part: int) -> None:
        """Queue the loads of a part of the chain."""
        follow(self.next, self.end, self.counters, self.starts[part], self.steps)

    def check(self, part: int) -> None:
        """Raise RuntimeError if the last kernel did not end where the part does."""
        wanted = int(self.order[(part + 1) * self.steps])
        if int(self.end) != wanted:
            raise RuntimeError(f"the chain of loads ended at {int(self.end)}, not at {wanted}")

    def measure(self, load: Callable[[], Any] | None, times: int) -> tuple[float, float]:
        """Return seconds of a load and clocks a second, medians, beside so many calls of ``load`` or alone."""
        latencies, clocks = [], []
        for part in range(CHAINS):
            self.cuda.evict()
            if load is None:
                self.follow(part)
            elif not self.cuda.beside(load, times, lambda part=part: self.follow(part)):
                raise RuntimeError("the load ended before the chain beside it")
            self.check(part)
            ticks, nanoseconds = self.cuda.counters(self.counters)
            latencies.append(1e-9 * nanoseconds / self.steps)
            clocks.append(1e9 * ticks / nanoseconds)
        return float(np.median(latencies)), float(np.median(clocks))


def follow(next_index: Tensor, end: Tensor, counters: Tensor, first: int, steps: int) -> None:
    """Launch the kernel that follows a chain, of one warp."""
    with torch.cuda.device_of(next_index):
        chase_kernel[(1,)](next_index, end, counters, first, steps, num_warps=1)


def nothing(x: Tensor) -> None:
    """Launch a kernel that does nothing, of one warp."""
    with torch.cuda.device_of(x):
        empty_kernel[(1,)](x, num_warps=1)


def measure(cuda: Any, budget: Budget, emit: Emit, rehearsal: bool = False) -> None:
    """Measure one after the other while there is time; a measurement that fails is a row, and the others go on."""
    scale = REHEARSED if rehearsal else Scale()
    steps = (_device, _copies, _launches, _latency_alone, _latency_beside_copies, _latency_beside_kernel)
    for step in steps:
        name = step.__name__.strip("_")
        if budget.left() <= 0:
            emit({"what": "assumption", "name": name, "skipped": "no time left"})
            continue
        try:
            for row in step(cuda, scale, rehearsal):
                emit({"what": "assumption", **row})
        except Exception as error:
            emit({"what": "assumption", "name": name, "error": reason(error)})
        cuda.release()


def _device(cuda: Any, scale: Scale, rehearsal: bool) -> Iterator[dict[str, Any]]:
    yield {"name": "multiprocessors", "value": cuda.multiprocessors}
    yield {"name": "cache", "unit": "bytes", "value": cuda.cache}


def _copies(cuda: Any, scale: Scale, rehearsal: bool) -> Iterator[dict[str, Any]]:
    for size in scale.copied:
        bandwidth = 2 * size / float(np.median(copy_seconds(cuda, size)))
        yield {"name": "copy_bandwidth", "unit": "bytes/s", "value": bandwidth, "copied_bytes": size}


def _launches(cuda: Any, scale: Scale, rehearsal: bool) -> Iterator[dict[str, Any]]:
    x = torch.zeros(1, device=cuda.device)
    task = timed(cuda, lambda _: nothing(x))
    figures = {"stream": np.median(task.seconds), "host": np.median(task.host)}

    def many() -> None:
        for _ in range(GRAPH_LAUNCHES):
            nothing(x)

    replayed = replays(cuda, {"graph": cuda.record(many)[0]}, REPLAYS)["graph"] / GRAPH_LAUNCHES
    for where, seconds in {**figures, "graph": replayed}.items():
        yield {"name": "launch", "unit": "s", "value": float(seconds), "where": where}


def _latency_alone(cuda: Any, scale: Scale, rehearsal: bool) -> Iterator[dict[str, Any]]:
    yield from _latency(Chain(cuda, scale), "nothing", None)


def _latency_beside_copies(cuda: Any, scale: Scale, rehearsal: bool) -> Iterator[dict[str, Any]]:
    source = torch.zeros(scale.copied[0] // 4, device=cuda.device)
    target = torch.empty_like(source)
    yield from _latency(Chain(cuda, scale), "copies", lambda: target.copy_(source))


def _latency_beside_kernel(cuda: Any, scale: Scale, rehearsal: bool) -> Iterator[dict[str, Any]]:
    case = _load(rehearsal)
    tensors = draw(case, cuda.device, 0)
    launch = case.launch(case.now)
    yield from _latency(Chain(cuda, scale), "wkv backward", lambda: call(case.cell, tensors, launch))


def _latency(chain: Chain, beside: str, load: Callable[[], Any] | None) -> Iterator[dict[str, Any]]:
    times = 0
    if load is not None:
        seconds = float(np.median(timed(chain.cuda, lambda _: load()).seconds))
        times = 2 + math.ceil(chain.steps * STEP_SECONDS / seconds)
    latency, clock = chain.measure(load, times)
    yield {"name": "latency", "unit": "s", "value": latency, "beside": beside}
    yield {"name": "clock", "unit": "Hz", "value": clock, "beside": beside}


def _load(rehearsal: bool) -> Case:
    return next(case for case in cases(rehearsal=rehearsal) if case.cell.op == "wkv" and case.cell.which == "backward")


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the launches of :func:`measure`, by name."""
    index, counters = torch.empty(LINE, dtype=torch.int32), torch.empty(2, dtype=torch.int64)
    yield "chain of loads", lambda: follow(index, index, counters, 0, 1)
    yield "nothing", lambda: nothing(torch.empty(1))
    case = _load(rehearsal=False)
    yield str(case.cell), lambda: call(case.cell, empty(case), case.launch(case.now))
