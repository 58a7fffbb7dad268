"""Stand-ins for on_gpu.Cuda on a CPU: one with a queue and clocks of its own, one that does all at once."""

from types import SimpleNamespace
from typing import Any

import torch
from recorded_graph import RecordedGraph

CPU = torch.device("cpu")


class Event:
    def __init__(self, simulated: "Simulated") -> None:
        self.simulated, self.time = simulated, max(simulated.clock, simulated.free)

    def query(self) -> bool:
        return self.simulated.clock >= self.time

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.time - self.time)


class Simulated:
    """Takes the place of on_gpu.Cuda. Time passes where it is said to."""

    def __init__(self, cache: int = 100) -> None:
        self.device, self.cache = CPU, cache
        self.clock = self.free = self.kernels = 0.0
        self.slept: list[float] = []
        self.recorded: Any = None
        self.allocated = self.most = self.queued = 0

    def launch(self, kernel: float, host: float) -> None:
        """Keep the host busy, then queue a kernel."""
        self.clock += host
        self.free = max(self.free, self.clock) + kernel
        self.kernels += kernel

    def now(self) -> float:
        return self.clock

    def synchronize(self) -> None:
        self.clock, self.queued = max(self.clock, self.free), 0

    def mark(self) -> Event:
        self.clock += 1e-7
        return Event(self)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.launch(seconds, 1e-6)

    def evict(self) -> None:
        self.launch(1e-4, 1e-6)

    def record(self, call: Any) -> Any:
        """Return a graph that launches once what was queued, and runs the same operations in the same memory."""
        graph, results, before = RecordedGraph(CPU, torch.Generator()), [], self.kernels
        clocks = self.clock, self.free
        graph.capture(lambda: results.append(call()))
        kernels, (self.clock, self.free) = (self.kernels - before) / len(results), clocks

        def replay() -> None:
            self.launch(kernels, 20e-6)
            graph.replay()

        self.recorded = results[-1]
        return SimpleNamespace(replay=replay), self.recorded

    def begin_peak(self) -> int:
        self.most = self.allocated
        return self.allocated

    def peak(self) -> int:
        return self.most

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.most = max(self.most, self.allocated)


class SimulatedGpu(Simulated):
    """Takes the place of launch_shapes.device.Gpu. Clocks and nanoseconds that kernels count are told beforehand."""

    multiprocessors = 132

    def __init__(self, cache: int = 100, counted: tuple[int, int] = (0, 1)) -> None:
        super().__init__(cache)
        self.counted, self.released = counted, 0
        self.loads: list[int] = []

    def beside(self, load: Any, times: int, call: Any) -> bool:
        """Run the load, then the call; the load lasts if it has run more than once."""
        for _ in range(times):
            load()
        call()
        self.loads.append(times)
        return times > 1

    def counters(self, found: torch.Tensor) -> tuple[int, int]:
        return self.counted

    def release(self) -> None:
        self.released += 1


class Immediate(Simulated):
    """The CPU in the place of on_gpu.Cuda: without a queue, so that the host is never ahead.

    Its clock goes on by a microsecond at every look, so that nothing depends on how fast the machine is.
    """

    def now(self) -> float:
        self.clock += 1e-6
        return self.clock

    def mark(self) -> Event:
        self.now()
        return Event(self)

    def sleep(self, seconds: float) -> None: ...

    def evict(self) -> None: ...

    def begin_peak(self) -> int:
        return 100

    def peak(self) -> int:
        return 142
