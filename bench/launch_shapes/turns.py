"""Timing by turns within a budget of seconds."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from common.light import reason
from common.program import no_garbage_collection
from launch_shapes.candidates import Case, call, draw
from launch_shapes.choice import Times, ratio, undecided
from timing.by_turns import Effort
from timing.on_gpu import CudaTask
from torch import Tensor

from fastwkv.kernels.config import Launch

TURN = Effort(repeats=1, seconds=0.0, turn=5e-3)
ROUNDS = 3  # turns of every candidate before any is looked at more closely
MOST_TURNS = 15
REPLAYS = 7
HEAD_START = 2e-3  # seconds in which the host has launched a graph
COPIES = 16  # of the inputs, at most
AGREE = {"bfloat16": 1e-2, "float32": 1e-4}  # of ‖result‖₂: beyond it a launch shape is wrong, not rounded otherwise
COMPARED = {  # of the results, those that no launch shape may change
    ("wkv", "forward"): 1,
    ("wkv", "backward"): 4,
    ("linear_scan", "forward"): 2,
    ("linear_scan", "backward"): 2,
}

Emit = Callable[[Mapping[str, Any]], None]


class Budget:
    """Seconds that may be spent."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + seconds

    def left(self) -> float:
        """Return the seconds that are left, below 0 if more were spent."""
        return self._end - self._now()

    def share(self, part: float) -> "Budget":
        """Return this part of what is left."""
        return Budget(max(0.0, part * self.left()), self._now)


def turn_of(task: CudaTask) -> float:
    """Take a turn of a task and return the median of its seconds."""
    before = len(task.seconds)
    task.take_turn(TURN)
    return float(np.median(task.seconds[before:] or task.seconds))


def timed(cuda: Any, call: Callable[[Any], Any], rounds: int = ROUNDS) -> CudaTask:
    """Return the task of a call that needs no arguments, after some turns."""
    task = CudaTask(call, cuda.device, cuda=cuda)
    task.first = task.run()[1]
    for _ in range(rounds):
        task.take_turn(TURN)
    return task


def replays(cuda: Any, graphs: Mapping[str, Any], times: int, *, evict: bool = False) -> dict[str, float]:
    """Return the median seconds of a replay of each graph, by turns, the device asleep until it is launched."""
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(times):
        for name, graph in graphs.items():
            cuda.synchronize()
            if evict:
                cuda.evict()
            cuda.sleep(HEAD_START)
            begin = cuda.mark()
            graph.replay()
            end = cuda.mark()
            cuda.synchronize()
            seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: float(np.median(one)) for name, one in seconds.items()}


@dataclass
class Trial:
    """A case while it is measured."""

    case: Case
    times: Times = field(default_factory=dict)
    failures: dict[Launch, str] = field(default_factory=dict)
    turns: int = 0

    @property
    def base(self) -> Launch:
        """The launch shape in use."""
        return self.case.launches()[0]

    def wanted(self) -> list[Launch]:
        """Return what is to be measured next: all at first, then what may be the fastest, beside that in use."""
        if not self.turns:
            return self.case.launches()
        if self.case.rehearsal or self.turns >= MOST_TURNS or self.base in self.failures:
            return []
        open_ = undecided(self.times, self.base)
        return list(dict.fromkeys((self.base, *open_))) if open_ else []

    def run(self, cuda: Any, launches: Sequence[Launch], budget: Budget) -> None:
        """Measure these launch shapes by turns, ROUNDS of them, fewer if the time is over."""
        copies = max(1, min(COPIES, -(-4 * cuda.cache // self.case.compulsory_bytes)))
        ring = [draw(self.case, cuda.device, seed) for seed in range(copies)]
        tasks, wanted = {}, None
        for launch in launches:
            make = itertools.cycle(ring).__next__
            task = CudaTask(lambda made, at=launch: call(self.case.cell, made, at), cuda.device, cuda=cuda, make=make)
            task.copies = copies
            try:
                results, task.first = task.run()
                wanted = self._check(results, wanted) if not self.turns else None
            except Exception as error:  # the others go on
                self._failed(launch, error)
                continue
            tasks[launch] = task
        with no_garbage_collection():
            for _ in range(1 if self.case.rehearsal else ROUNDS):
                for launch, task in list(tasks.items()):
                    try:
                        self.times.setdefault(launch, {})[self.turns] = turn_of(task)
                    except Exception as error:
                        self._failed(launch, error)
                        del tasks[launch]
                self.turns += 1
                if budget.left() <= 0:
                    return

    def _check(self, results: Sequence[Tensor], wanted: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """Raise ValueError where results are not those of the first launch shape."""
        cell = self.case.cell
        results = results[: COMPARED[cell.op, cell.which]]
        for result, one in zip(results, wanted or results, strict=True):
            error = difference(result, one)
            if not error <= AGREE[cell.dtype]:
                raise ValueError(f"another result than that of the launch shape in use: {error:.1e} of it")
        return wanted or results

    def _failed(self, launch: Launch, error: Exception) -> None:
        self.failures[launch] = reason(error)
        self.times.pop(launch, None)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each launch shape."""
        cell, base, found = self.case.cell, self.base, []
        B, T, C = cell.shape
        for launch in self.case.launches():
            row: dict[str, Any] = {"what": "candidate", "op": cell.op, "pass": cell.which, "dtype": cell.dtype}
            row |= {"B": B, "T": T, "C": C, **asdict(launch), "chunks": -(-self.case.run_shape[1] // launch.chunk)}
            row |= {"in_use": launch == base}
            if launch in self.failures:
                found.append(row | {"error": self.failures[launch]})
            elif seconds := list(self.times.get(launch, {}).values()):
                median = float(np.median(seconds))
                row |= {"ms": 1e3 * median, "ms_min": 1e3 * min(seconds), "turns": len(seconds)}
                row["compulsory_gb_per_s"] = self.case.compulsory_bytes / median / 1e9
                if one := ratio(self.times, launch, base):
                    row |= {"ratio": one.median, "spread": one.spread}
                found.append(row)
        return found


def difference(result: Tensor, wanted: Tensor) -> float:
    """Return ‖result - wanted‖₂ / ‖wanted‖₂, on the device."""
    size = torch.linalg.vector_norm(wanted, dtype=torch.float32)
    return float(torch.linalg.vector_norm(result.float() - wanted.float()) / size)


def measure(trials: Sequence[Trial], cuda: Any, budget: Budget, emit: Emit) -> None:
    """Measure all cases in their order, then those again, the least known first, where the fastest is not sure yet.

    What there was no time for is said, a row each.
    """
    for trial in trials:
        if budget.left() <= 0:
            emit({"what": "candidate", "case": str(trial.case.cell), "skipped": "no time left"})
        else:
            _visit(trial, cuda, budget, emit)
    while budget.left() > 0:
        open_ = [trial for trial in trials if trial.wanted()]
        if not open_:
            return
        _visit(min(open_, key=lambda one: one.turns), cuda, budget, emit)


def _visit(trial: Trial, cuda: Any, budget: Budget, emit: Emit) -> None:
    try:
        trial.run(cuda, trial.wanted(), budget)
    except Exception as error:  # of the inputs: no candidate can be measured
        trial.turns = MOST_TURNS
        emit({"what": "candidate", "case": str(trial.case.cell), "error": reason(error)})
    for row in trial.rows():
        emit(row)
    cuda.release()
