"""Runs the steps of a plan within a budget of seconds and keeps what they find, whatever becomes of them."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gpu_minutes import plan, processes, table
from gpu_minutes.journal import Journal
from gpu_minutes.plan import Command, Step
from gpu_minutes.processes import ROOT, Running, signals

READY = ROOT / "build" / "gpu-ready"  # what a machine without a GPU has prepared
CACHE = READY / "cache.tar.xz"
HANGS = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1e6)"
HANGING = 3.0  # seconds that a rehearsal gives a step that never returns


class Run:
    """One call of the first or of the second command."""

    def __init__(
        self,
        name: str,
        steps: Sequence[Step],
        budget: float,
        journal: Journal,
        *,
        rehearse: bool = False,
        hang: str | None = None,
        surroundings: dict[str, str] | None = None,
    ) -> None:
        """Take ``budget`` seconds from the beginning of the journal's clock; ``hang`` is a step that never returns."""
        self.name, self.budget, self.journal = name, budget, journal
        self.deadline = journal.began + budget
        self.steps, self.left_out = plan.chosen(steps, budget)
        self.rehearse, self.hang = rehearse, hang
        self.surroundings = processes.environment(**(surroundings or {}))
        self.beside: dict[str, list[Running]] = {}
        self.now: list[Running] = []
        self.step = "run"

    def run(self) -> int:
        """Run all steps; return 0 if nothing failed, 1 if something did, 130 after an interrupt."""
        status = 0
        try:
            with signals(signal.default_int_handler, signal.SIGTERM):  # as Ctrl-C
                for step in self.left_out:
                    self._skipped(step, f"a budget of {self.budget:.0f} s has no room for it")
                for index, step in enumerate(self.steps):
                    self._step(step, [s for s in self.steps[index:] if not s.background])
                    self.journal.table(self.table())
        except KeyboardInterrupt:
            self.journal.add("run", {"what": "interrupted"})
            status = 130
        finally:
            with signals(signal.SIG_IGN, signal.SIGTERM, signal.SIGINT):  # while the last lines are written
                self._end(self.now, "interrupted", self.step)
                for name, running in self.beside.items():
                    self._end(running, "ended with the others", name)
                self.journal.table(self.table())
        return status or int(any("error" in row for row in self.journal.rows))

    def table(self) -> str:
        """Return what a person reads."""
        spent = time.monotonic() - self.journal.began
        return table.text(self.journal.rows, self.name, self.budget, spent)

    def _step(self, step: Step, rest: Sequence[Step]) -> None:
        if step.background:
            self.beside[step.name] = [self._start(step, command, self._left(), nice=10) for command in step.commands]
            return
        seconds = min(max(plan.share(rest, self._left()), step.patience), self._left())
        if seconds < step.least:
            self._skipped(step, f"{max(0.0, seconds):.0f} s were left, it needs {step.least:.0f}")
            return
        self.step = step.name
        began = time.monotonic()
        print(f"{began - self.journal.began:5.0f} s  {step.name}: {step.about}", flush=True)
        if step.name == self.hang:
            seconds = min(seconds, HANGING)
        failed = self._commands(step, step.commands, began + seconds)
        if failed and step.followed:
            self._follow(failed, began + seconds)
        seconds = time.monotonic() - began
        self.journal.add(step.name, {"what": "step", "seconds": seconds, "commands": len(step.commands)})

    def _left(self) -> float:
        return self.deadline - plan.CLOSING - time.monotonic()

    def _commands(self, step: Step, commands: Sequence[Command], until: float) -> list[str]:
        """Run commands at once, in a rehearsal as many as there are cores; return the names of those that failed.

        A command that was out of time has not failed: under compute-sanitizer it would come even less far.
        """
        began, failed = time.monotonic(), []
        until -= min(processes.GRACE, (until - began) / 4)  # the grace is part of its time
        size = (os.cpu_count() or 1) if self.rehearse else len(commands)
        for first in range(0, len(commands), size):
            some = commands[first : first + size]
            # Where a rehearsal runs, a process may take many times as long.
            deadlines = {one.name: until if self.rehearse else min(until, began + one.most) for one in some}
            self.now = [self._start(step, one, deadlines[one.name] - began) for one in some]
            processes.wait(self.now, deadlines)
            bad = [one for one in self.now if not self._ended(step.name, one)]
            failed += [one.name for one in bad if one.asked is None]
            self.now = []
        return failed

    def _follow(self, failed: Sequence[str], until: float) -> None:
        """Look at groups that failed under compute-sanitizer, those groups alone."""
        seconds = min(plan.MEMCHECK, until - time.monotonic())
        step = plan.memcheck(failed, seconds)
        if seconds < step.least:
            self._skipped(step, f"{seconds:.0f} s were left of correctness, it needs {step.least:.0f}")
        else:
            self._commands(step, step.commands, time.monotonic() + seconds)

    def _start(self, step: Step, command: Command, seconds: float, nice: int = 0) -> Running:
        if self.rehearse:
            command = replace(command, arguments=(*command.arguments, "--rehearse"))
        if step.name == self.hang:
            command = replace(command, arguments=("-c", HANGS))
        line = command.filled(max(1.0, seconds - plan.STARTING), str(self.journal.folder))
        on_line = partial(self.journal.line, step.name)
        return processes.start(command.name, line, on_line, self.journal.noise, self.surroundings, nice)

    def _ended(self, step: str, one: Running, status: str | None = None) -> bool:
        """Record how a command ended; return whether that is all right."""
        status = status or one.status()
        row: dict[str, Any] = {"what": "command", "name": one.name, "status": status, "seconds": one.seconds()}
        good = status in ("passed", "not available", "ended with the others")
        if not good:
            row["error"] = f"{status} after {one.seconds():.0f} s"
        if not good or status == "not available":
            row["said"] = self.journal.tail(one.name)
        self.journal.add(step, row)
        return good

    def _end(self, running: Sequence[Running], status: str, step: str) -> None:
        """Ask what is left to end, which writes what it has, and record how each ended."""
        left = [one for one in running if one.ended is None]
        over = [one for one in left if one.process.poll() is not None]
        processes.wait(left, dict.fromkeys((one.name for one in left), 0.0))
        for one in left:
            self._ended(step, one, None if one in over else status)

    def _skipped(self, step: Step, why: str) -> None:
        self.journal.add(step.name, {"what": "skipped", "reason": why})
        print(f"skipped {step.name}: {why}", flush=True)


def only(steps: Sequence[Step], names: Sequence[str], groups: Sequence[str]) -> list[Step]:
    """Return the steps of these names, and of correctness these groups; without names all."""

    def of(step: Step) -> Step:
        commands = tuple(one for one in step.commands if one.name in groups)
        return replace(step, commands=commands) if groups and step.name == "correctness" else step

    return [of(step) for step in steps if not names or step.name in names]
