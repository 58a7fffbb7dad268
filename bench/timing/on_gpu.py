"""Timing on a GPU: the time of the device and that of the host, each by itself.

Device time lies between two events in the queue. If the device waits for the host to queue the next kernel, that wait
lies between them too, so the host gets a head start: the device first sleeps until all calls of a group are queued, and
a group that it began earlier is thrown away. Host time is that of a call until it returns, the device being idle.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from timing.by_turns import Effort, Task
from torch.utils._pytree import tree_leaves

FASTEST_CLOCK = 2.5e9  # Hz, above that of any GPU: `_sleep` counts its clock, so that it sleeps for longer, not less
QUEUED = 64  # calls of a group, at most; a queue holds about a thousand kernels, then the host waits
LONG_QUEUING = 5e-3  # seconds in which the host fills that queue: of longer calls not one gets a head start
TRIES = 4  # to be ahead, with a head start that is twice as long each time
SHORT = 50e-6  # seconds: calls that are shorter are timed several at a time, since an event takes time too
HOST_CALLS = 3  # a turn
COPIED = (2**28, 2**30, 2**32)  # bytes
STEPS = 100  # tokens of a CUDA graph
REPLAYS = 5  # a turn
LAUNCH = 2e-3  # seconds in which the host has launched such a graph


class Cuda:
    """The questions to CUDA. All else here runs without a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Take memory that fills the cache twice over."""
        self.device = device
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._sweep = torch.zeros(2 * self.cache // 4, device=device)

    def now(self) -> float:
        """Return the seconds of the host's clock."""
        return time.perf_counter()

    def synchronize(self) -> None:
        """Wait until the device has done all that is queued."""
        torch.cuda.synchronize(self.device)

    def mark(self) -> torch.cuda.Event:
        """Queue an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def sleep(self, seconds: float) -> None:
        """Queue a kernel that does nothing for at least so long."""
        torch.cuda._sleep(int(seconds * FASTEST_CLOCK))

    def evict(self) -> None:
        """Queue a read of more than the cache holds: what was in it is not there afterwards."""
        self._sweep.sum()

    def record(self, call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Return a CUDA graph of what is called, and the result, which is there when the graph has been replayed."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return graph, result

    def begin_peak(self) -> int:
        """Return the bytes that are allocated, and look for their largest number from now on."""
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Return the largest number of allocated bytes since."""
        return torch.cuda.max_memory_allocated(self.device)


@dataclass
class CudaTask(Task):
    """A call on a GPU. ``make`` makes its arguments, ``prepare`` what comes before the call and is not timed.

    ``copies`` of the arguments are taken in turn and as many results are kept, so that the cache holds neither what is
    read nor what is written over. They exist for the length of a turn only: the tasks of a case need memory one by one.
    """

    cuda: Any = None
    make: Callable[[], Any] = lambda: None
    prepare: Callable[[Any], Any] = lambda made: made
    copies: int = 1
    holds: bool = False
    """Whether ``prepare`` takes memory, so that no more than ``copies`` may be prepared at a time."""
    host: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    """Seconds between events without a head start."""
    head_start: bool = True
    busy: float = 0.0
    peak: int | None = None

    def run(self) -> tuple[Any, float]:
        """Call once, with the device idle before and after; note host time, device time and memory."""
        return self._alone(self.prepare(self.make()))

    def take_turn(self, effort: Effort) -> None:
        """Measure a few calls by themselves, then as many as fit into a turn in groups."""
        ring = [self.make() for _ in range(self.copies)]
        held: deque[Any] = deque(maxlen=self.copies)
        if not self.seconds:  # calls before this one had to ask the system for memory
            held.append(self._alone(self.prepare(ring[-1]))[0])
            self.host, self.alone = [], []
        for n in range(HOST_CALLS if self.first < LONG_QUEUING else 1):
            held.append(self._alone(self.prepare(ring[n % self.copies]))[0])
        self.head_start = self.head_start and min(self.host) < LONG_QUEUING
        if not self.head_start:
            self.seconds = list(self.alone)
            return
        estimate = max(1e-7, min(self.seconds or self.alone))
        limit = min(self.copies if self.holds else QUEUED, max(1, int(LONG_QUEUING / np.median(self.host))))
        together = min(limit, max(1, round(SHORT / estimate)))
        samples = max(1, min(limit // together, round(effort.turn / estimate / together)))
        if not any(self._group(ring, held, samples, together, 2**n) for n in range(1, TRIES + 1)):
            self.head_start, self.seconds = False, list(self.alone)

    def _alone(self, prepared: Any) -> tuple[Any, float]:
        cuda = self.cuda
        cuda.synchronize()
        before = cuda.begin_peak()
        start = cuda.now()
        begin = cuda.mark()
        called = cuda.now()
        result = self.call(prepared)
        self.host.append(cuda.now() - called)
        end = cuda.mark()
        cuda.synchronize()
        elapsed = cuda.now() - start
        self.alone.append(begin.elapsed_time(end) / 1e3)
        self.peak = cuda.peak() - before
        return result, elapsed

    def _group(self, ring: list[Any], held: deque[Any], samples: int, together: int, patience: int) -> bool:
        """Queue the calls behind a sleeping device; return whether all were queued before it woke up."""
        cuda = self.cuda
        calls = samples * together
        prepared = deque(self.prepare(ring[n % self.copies]) for n in range(calls))
        cuda.evict()
        cuda.sleep(patience * (calls * float(np.median(self.host)) + 1e-4))
        awake = cuda.mark()
        marks = [cuda.mark()]
        for n in range(calls):
            held.append(self.call(prepared.popleft()))
            if (n + 1) % together == 0:
                marks.append(cuda.mark())
        ahead = not awake.query()
        cuda.synchronize()
        if ahead:
            times = [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(marks)]
            self.seconds += [seconds / together for seconds in times]
            self.busy += sum(times)
        return ahead

    def spent(self) -> float:
        """Return the device's seconds, of every call where several are timed together."""
        return self.busy if self.head_start else super().spent()

    def figures(self) -> dict[str, Any]:
        """Return also the host's time, the memory of a call and whether the host was ahead of the device."""
        host, ahead = 1e3 * float(np.median(self.host)), self.head_start and self.busy > 0
        return super().figures() | {"ms_host": host, "peak_bytes": self.peak, "head_start": ahead}


@dataclass
class StepTask(CudaTask):
    """One token on a GPU, and what it takes inside a CUDA graph of many, where no launch is waited for.

    ``following`` makes the arguments of the next token of those of this one and its result: in the graph every token
    starts from the state after the last one. Graph and arguments are kept; they are small.
    """

    following: Callable[[Any, Any], Any] = lambda made, result: made
    graph: Any = None
    first_token: Any = None
    in_graph: list[float] = field(default_factory=list)
    """Seconds of a token."""

    def take_turn(self, effort: Effort) -> None:
        """Measure calls as they are, then replays of the graph, each launched while the device sleeps."""
        super().take_turn(effort)
        cuda = self.cuda
        if self.graph is None:
            self._record()
        for _ in range(REPLAYS):
            cuda.sleep(LAUNCH)
            begin = cuda.mark()
            self.graph.replay()
            end = cuda.mark()
            cuda.synchronize()
            self.in_graph.append(begin.elapsed_time(end) / 1e3 / STEPS)

    def _record(self) -> None:
        """Record the graph, and see that it computes what the same calls do outside of it."""
        self.first_token = self.make()  # the graph reads it where it lies
        wanted = self._tokens()
        self.graph, found = self.cuda.record(self._tokens)
        self.graph.replay()
        self.cuda.synchronize()
        if not all(map(torch.equal, tree_leaves(found), tree_leaves(wanted))):
            raise RuntimeError("another result in a CUDA graph than outside")

    def _tokens(self) -> Any:
        made = self.first_token
        for _ in range(STEPS):
            result = self.call(made)
            made = self.following(made, result)
        return result

    def figures(self) -> dict[str, Any]:
        """Return also the time of a token inside the graph, in milliseconds."""
        return super().figures() | {"ms_graph": 1e3 * float(np.median(self.in_graph))}


def copy_bandwidth(cuda: Cuda) -> float:
    """Return GB/s of reading and writing while a tensor is copied: of several sizes the largest median."""
    return max(2 * size / float(np.median(copy_seconds(cuda, size))) / 1e9 for size in COPIED)


def copy_seconds(cuda: Cuda, size: int) -> list[float]:
    """Return the seconds, several times, in which a tensor of so many bytes is copied."""
    effort = Effort(repeats=9, seconds=0.0)
    source = torch.ones(size // 4, device=cuda.device)
    target = torch.empty_like(source)
    task = CudaTask(lambda pair: pair[1].copy_(pair[0]), cuda.device, cuda=cuda, make=lambda: (source, target))
    task.first = task.run()[1]
    while not task.enough(effort):
        task.take_turn(effort)
    return task.seconds
