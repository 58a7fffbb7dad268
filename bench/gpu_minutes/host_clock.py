"""The CPU in the place of ops_cuda.Cuda, for rehearsals: without a queue, so that the host is never ahead."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


class Passed:
    """An event on the host's clock."""

    def __init__(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        """Say that it has passed."""
        return True

    def elapsed_time(self, other: "Passed") -> float:
        """Return milliseconds from this to another."""
        return 1e3 * (other.time - self.time)


class Immediate:
    """A device that has done everything at once."""

    device, cache = torch.device("cpu"), 1000
    now, mark = staticmethod(time.perf_counter), staticmethod(Passed)

    def synchronize(self) -> None:
        """Wait for nothing."""

    def sleep(self, seconds: float) -> None:
        """Keep nobody waiting."""

    def evict(self) -> None:
        """Leave the caches as they are."""

    def record(self, call: Callable[[], Any]) -> Any:
        """Return what replays nothing for a millisecond, and the result."""
        result = call()
        return SimpleNamespace(replay=lambda: time.sleep(1e-3)), result

    def begin_peak(self) -> int:
        """Return bytes."""
        return 100

    def peak(self) -> int:
        """Return bytes."""
        return 142
