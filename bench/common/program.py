"""What the programs of the benchmarks share while they run: what ends them early, and what disturbs them."""

import contextlib
import gc
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

BUSY = 0.1  # cores of other processes


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt meanwhile, as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_and_save(run: Callable[[], int | None], save: Callable[[], None]) -> int:
    """Run to the end or until an interrupt, and save however it ends; return the exit status: of ``run``, or 130."""
    try:
        with sigterm_as_interrupt():
            return run() or 0
    except KeyboardInterrupt:
        print("\ninterrupted: writing what was measured", file=sys.stderr)
        return 130
    finally:
        save()


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Let Python's garbage collector wait meanwhile, as timeit does."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def complain_of_other_work(program: str, rows: Iterable[dict[str, Any]], device: torch.device) -> None:
    """Say so if other processes kept the CPU that was measured busy."""
    busy = max((row["other_cores"] or 0 for row in rows), default=0)
    if busy > BUSY and device.type == "cpu":
        print(f"{program}: other processes kept up to {busy:.1f} cores busy: these times say little", file=sys.stderr)


def bar_options() -> dict[str, float]:
    """Return options of a tqdm bar that moves at every step: into a log file it writes few lines."""
    return {} if sys.stderr.isatty() else {"mininterval": 10, "maxinterval": 10}
