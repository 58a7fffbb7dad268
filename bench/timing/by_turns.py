"""Timing of several calls by turns, so that other work of the machine falls on all of them alike."""

import gc
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.program import no_garbage_collection

SLOW = 0.1  # seconds: what takes longer has no uncounted call at the beginning of its turn
ONLY_GPU = ("ms_host", "peak_bytes", "head_start")  # of the figures
QUANTILES = (0.1, 0.25, 0.75, 0.9)


@dataclass(frozen=True)
class Effort:
    """The time and the number of measurements that one call gets: until both have been reached."""

    repeats: int
    seconds: float
    turn: float = 0.03
    """Seconds of one turn, in which a quick call runs several times."""
    once: float = 10.0
    """Seconds: what takes longer is measured once."""
    most: float = math.inf
    """Measurements that are enough, however short each is."""


FULL = Effort(repeats=3, seconds=3.0)
QUICK = Effort(repeats=2, seconds=0.1)
# On a GPU there are several hundred to be timed, in minutes.
GPU = Effort(repeats=7, seconds=0.02, turn=0.01, once=0.25, most=100)
GPU_QUICK = Effort(repeats=3, seconds=0.005, turn=0.005, once=0.25, most=30)


def effort(device: torch.device, *, quick: bool) -> Effort:
    """Return how long to measure each call on a device."""
    if device.type == "cuda":
        return GPU_QUICK if quick else GPU
    return QUICK if quick else FULL


@dataclass
class Task:
    """A call and how long it took, each time. ``prepare`` runs before each call, outside the measurement."""

    call: Callable[[Any], Any]
    device: torch.device
    prepare: Callable[[], Any] = lambda: None
    first: float = 0.0
    """Seconds of a run before the measurement, whose result was looked at."""
    seconds: list[float] = field(default_factory=list)
    failure: Exception | None = None

    def run(self) -> tuple[Any, float]:
        """Call once; return the result and the seconds until the device had it."""
        prepared = self.prepare()
        _synchronize(self.device)
        begin = time.perf_counter()
        result = self.call(prepared)
        _synchronize(self.device)
        return result, time.perf_counter() - begin

    def enough(self, effort: Effort) -> bool:
        """Whether it has been measured for long enough."""
        count, long = len(self.seconds), self.spent() >= effort.seconds
        return self.first > effort.once or count >= effort.most or (count >= effort.repeats and long)

    def spent(self) -> float:
        """Return the seconds of all calls that were measured."""
        return sum(self.seconds)

    def take_turn(self, effort: Effort) -> None:
        """Call as often as fits into a turn, at least once."""
        estimate = min(self.seconds, default=self.first)
        if estimate < SLOW:
            self.run()
        self.seconds += [self.run()[1] for _ in range(max(1, round(effort.turn / estimate)))]

    def figures(self) -> dict[str, Any]:
        """Return median, minimum, quantiles and what the first run took, in milliseconds, and how many were measured.

        Figures that only a GPU tells are None: on a CPU all time is the host's, and no allocator knows its peak.
        """
        ms = [1e3 * second for second in self.seconds]
        quantiles = np.quantile(ms, QUANTILES)
        return {
            "ms": float(np.median(ms)),
            "ms_min": min(ms),
            "quantiles": {str(q): float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
            "ms_first": 1e3 * self.first,
            "repeats": len(ms),
            **dict.fromkeys(ONLY_GPU),
        }


def measure(tasks: list[Task], effort: Effort, done: Callable[[], Any]) -> None:
    """Measure all tasks by turns, calling ``done`` for each that is. Python's garbage collector waits meanwhile.

    The first run of a task does not count, unless it took so long that it is the only one. A task that fails keeps its
    failure, and the others go on.
    """
    waiting = list(tasks)
    with no_garbage_collection():
        while waiting:
            for task in waiting:
                try:
                    if task.first > effort.once:
                        task.seconds.append(task.first)
                    else:
                        task.take_turn(effort)
                except Exception as error:
                    task.failure = error.with_traceback(None)  # which would keep tensors
                if task.first > SLOW:
                    gc.collect()
                if task.failure or task.enough(effort):
                    done()
            waiting = [task for task in waiting if not (task.failure or task.enough(effort))]


class OtherWork:
    """Cores that other processes keep busy, from one look to the next. None where the system does not tell.

    PyTorch's threads wait for each other within every operation, so that a second busy process can slow a loop of
    small operations down a hundredfold. Times taken then say nothing.
    """

    def __init__(self) -> None:
        """Take the first look."""
        self.seen = self._look()

    def cores(self) -> float | None:
        """Return the mean number of cores since the last look."""
        before, self.seen = self.seen, self._look()
        if before is None or self.seen is None:
            return None
        elapsed, busy, own = (new - old for new, old in zip(self.seen, before, strict=True))
        return max(0.0, busy - own) / elapsed if elapsed else None

    @staticmethod
    def _look() -> tuple[float, float, float] | None:
        try:
            user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
            ticks = os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None
        own = os.times()
        return time.monotonic(), (user + nice + system + sum(rest)) / ticks, own.user + own.system


def copy_bandwidth(device: torch.device) -> float:
    """Return GB/s of reading and writing while a CPU copies a tensor far larger than any cache, the median of nine."""
    source = torch.ones(2**26, device=device)  # 256 MiB
    target = torch.empty_like(source)
    task = Task(lambda _: target.copy_(source), device)
    task.run()
    task.seconds += [task.run()[1] for _ in range(9)]
    return 2 * source.nbytes / float(np.median(task.seconds)) / 1e9


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
