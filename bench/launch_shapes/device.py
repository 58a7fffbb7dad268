"""A GPU as tune.py asks of it, beyond what the other benchmarks ask, and a CPU that answers in a rehearsal."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from timing.on_gpu import Cuda
from torch import Tensor

AHEAD = 2  # calls of a load before what runs beside it begins


class Gpu(Cuda):
    """The answers of CUDA."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._beside = torch.cuda.Stream(device, priority=-1)

    def beside(self, load: Callable[[], Any], times: int, call: Callable[[], Any]) -> bool:
        """Run a call in a stream of its own while the load runs so many times; return whether it ended within it."""
        self.synchronize()
        kept = [load() for _ in range(AHEAD)]
        started = self.mark()
        kept += [load() for _ in range(times)]
        with torch.cuda.stream(self._beside):
            self._beside.wait_event(started)
            call()
            ended = self.mark()
        kept.append(last := self.mark())
        self.synchronize()
        return ended.elapsed_time(last) > 0

    def counters(self, found: Tensor) -> tuple[int, int]:
        """Return clocks and nanoseconds that a kernel has counted."""
        clocks, nanoseconds = found.tolist()
        return clocks, nanoseconds

    def release(self) -> None:
        """Give memory back that no tensor has."""
        torch.cuda.empty_cache()


class _Passed:
    def __init__(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return False

    def elapsed_time(self, other: "_Passed") -> float:
        return 1e3 * max(1e-7, other.time - self.time)


class Rehearsal:
    """The CPU in the place of a GPU: nothing is queued or cached, times are the interpreter's, counters are made up."""

    device, cache, multiprocessors = torch.device("cpu"), 0, 132
    now, mark = staticmethod(time.perf_counter), staticmethod(_Passed)

    def _nothing(self, *_: Any) -> int:
        return 0

    synchronize = sleep = evict = begin_peak = peak = release = _nothing

    def record(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        """Call now and at every replay."""
        return SimpleNamespace(replay=call), call()

    def beside(self, load: Callable[[], Any], times: int, call: Callable[[], Any]) -> bool:
        """Call one after the other."""
        load()
        call()
        return times > 0

    def counters(self, found: Tensor) -> tuple[int, int]:
        """Return the counters of a clock of 1.5 GHz, whatever the kernel says."""
        return 3 * found.numel(), 2 * found.numel()
