"""Calls that are timed by turns: what counts, what does not, and what else the machine does meanwhile."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timing import by_turns as timing


class Clock:
    """What the timing takes for the time, which passes where it is said to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.seconds))

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


def test_tasks_take_turns_and_first_runs_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    cpu, clock = torch.device("cpu"), Clock(monkeypatch)

    def call(name: str) -> None:
        events.append(name)
        clock.advance(timing.SLOW / 10)

    tasks = [
        timing.Task(lambda _, name=name: call(name), cpu, lambda name=name: events.append(f"before {name}"))
        for name in "ab"
    ]
    for task in tasks:
        task.first = 2 * timing.SLOW
    finished: list[None] = []
    timing.measure(tasks, timing.Effort(repeats=2, seconds=0.0, turn=0.0), lambda: finished.append(None))
    # From the second turn on the task is known to be quick, so that its turn begins with a run that does not count.
    assert events == ["before a", "a", "before b", "b"] + 2 * ["before a", "a"] + 2 * ["before b", "b"]
    assert [len(task.seconds) for task in tasks] == [2, 2]
    assert len(finished) == 2


def test_what_takes_very_long_is_measured_once() -> None:
    task = timing.Task(lambda _: pytest.fail("ran again"), torch.device("cpu"), first=timing.FULL.once + 1)
    timing.measure([task], timing.FULL, lambda: None)
    assert task.figures()["repeats"] == 1
    assert task.figures()["ms"] == pytest.approx(1e3 * (timing.FULL.once + 1))


def test_work_of_other_processes_shows() -> None:
    began, others = time.monotonic(), timing.OtherWork()
    if others.seen is None:
        pytest.skip("the system does not tell")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        while cpu_seconds(process.pid) < 0.5:  # which last the longer, the less of a core the process gets
            time.sleep(0.05)
        busy = others.cores()
        process.kill()
    # The system counts in ticks, of 1/100 s mostly, and whom a tick finds at work is charged all of it: half of what
    # the process has used is what 25 ticks of 50 show.
    assert busy * (time.monotonic() - began) > 0.25
    assert others.cores() is not None


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system, the 14th and 15th


def test_task_that_fails_leaves_the_others() -> None:
    def fail(_: None) -> None:
        raise RuntimeError("no luck")

    tasks = [timing.Task(call, torch.device("cpu"), first=1e-3) for call in (fail, lambda _: None)]
    finished: list[None] = []
    timing.measure(tasks, timing.Effort(repeats=2, seconds=0.0, turn=0.0), lambda: finished.append(None))
    assert [str(task.failure) for task in tasks] == ["no luck", "None"]
    assert len(tasks[1].seconds) == len(finished) == 2


def test_time_of_preparation_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    task = timing.Task(lambda _: clock.advance(0.5), torch.device("cpu"), lambda: clock.advance(8.0))
    assert task.run()[1] == 0.5
