"""The steps of the first and of the second command for a few minutes on a GPU, their order and their seconds.

A step is one command or several at once. Each prints rows on stdout, one JSON object a line, as its figures exist. The
times are estimates: nothing of this has run on a GPU. Order is that of importance, but for what costs next to nothing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from correctness.groups import GROUPS

# Seconds of a process that hangs: until PyTorch has its device, where fourteen start at once, may be 20.
PER_GROUP = 48.0
MEMCHECK = 30.0  # seconds of a group that has failed, under compute-sanitizer
STARTING = 6.0  # seconds until a process has imported PyTorch and has its device
CLOSING = 4.0  # seconds of a budget that are for ending the last step and writing the table


@dataclass(frozen=True)
class Command:
    """One process of a step. ``{seconds}`` in its arguments stands for what it may take, ``{out}`` for the folder."""

    name: str
    arguments: tuple[str, ...]
    most: float = float("inf")
    """Seconds after which it is ended, if its step has more."""

    def filled(self, seconds: float, out: str) -> list[str]:
        """Return the command line."""
        values = {"{seconds}": f"{seconds:.0f}", "{out}": out}
        return [sys.executable, *(values.get(argument, argument) for argument in self.arguments)]


@dataclass(frozen=True)
class Step:
    """One or several commands that run at once."""

    name: str
    about: str
    seconds: float
    """Seconds that are planned for it."""
    least: float
    """Below which it is not worth starting."""
    importance: int
    """Of steps that do not all fit, those with the smallest are left out first."""
    commands: tuple[Command, ...]
    followed: bool = False
    """Whether commands that fail run again under compute-sanitizer."""
    background: bool = False
    """Whether it runs beside the next steps, with low priority, and ends with them."""
    patience: float = 0.0
    """Seconds that it gets in any case: usually it takes those planned, and without it the others would say little."""


def one(name: str, about: str, seconds: float, least: float, importance: int, *more: str, **options: Any) -> Step:
    """Return a step of one command, the module of that name with these arguments, or the program that comes first."""
    program = () if more[:1] and more[0].startswith("bench/") else ("-m", "gpu_minutes.step", name)
    return Step(name, about, seconds, least, importance, (Command(name, (*program, *more)),), **options)


def machine() -> Step:
    """Return the step that unpacks the kernels: it may be slow, and without it minutes go in compiling."""
    return one("machine", "versions, device, does the cache of kernels fit", 3, 1, 110, patience=25)


def correctness(seconds: float) -> Step:
    """Return the step that all else rests on."""
    commands = tuple(Command(group, ("-m", "correctness.groups", group), PER_GROUP) for group in GROUPS)
    about = "every kernel, dtype and form against float64"
    return Step("correctness", about, seconds, 20, 100, commands, followed=True)


def memcheck(groups: Sequence[str], seconds: float, importance: int = 30) -> Step:
    """Return the step that looks at groups under compute-sanitizer."""
    commands = tuple(Command(group, ("bench/sanitize.py", "--tool", "memcheck", group)) for group in groups)
    return Step("memcheck", "compute-sanitizer looks for bad accesses", seconds, 12, importance, commands)


def first() -> list[Step]:
    """Return the steps of the first command: is it right, how fast is it, which shape of program is best, and why."""
    timed = ("--seconds", "{seconds}")
    tests = ("tests/kernels/test_cuda.py", "tests/kernels/test_cuda_generation.py", "--jobs", "8")
    tune = ("bench/tune.py", "--rows", *timed, "--out", "{out}")
    return [
        machine(),
        correctness(65),
        one("headline", "bandwidth, forward and backward", 58, 15, 90, *timed),
        one("tuning", "which launch shape is best, what the model assumes", 88, 15, 80, *tune),
        one("generation", "a token of the 3b model", 35, 20, 70, *timed),
        one("profile", "one launch each under ncu", 24, 12, 40),
        one("tests", "the tests on CUDA tensors", 20, 12, 20, *tests),
    ]


def second() -> list[Step]:
    """Return the steps of the second command: is what was mended right, and how fast is it beside its peers."""
    timed = ("--seconds", "{seconds}", "--out", "{out}")
    tests = ("tests/ops", "--jobs", "14", "--match", "triton")
    build = Command("peers-build", ("-m", "gpu_minutes.step", "peers", "build"))
    return [
        machine(),
        Step("peers-build", "the CUDA peers are compiled", 0, 0, 95, (build,), background=True),
        correctness(45),
        one("peers", "ours beside its peers", 130, 30, 90, *timed),
        one("gen_time", "time to generate, beside a transformer", 100, 30, 80, *timed),
        one("tests", "the tests of the operators on the GPU", 60, 20, 40, *tests),
        memcheck(("wkv-bfloat16", "scan-complex64"), 30),
    ]


PLANS = {"first": first, "second": second}


def chosen(steps: Sequence[Step], budget: float) -> tuple[list[Step], list[Step]]:
    """Return the steps that fit into so many seconds, and those that are left out, the least important first."""
    kept, left_out = list(steps), []
    while kept and sum(step.least for step in kept) > budget - CLOSING:
        least = min(kept, key=lambda step: step.importance)
        kept.remove(least)
        left_out.append(least)
    return kept, left_out


def share(steps: Sequence[Step], left: float) -> float:
    """Return the seconds of the first of these steps, of ``left`` for all of them.

    If more is left than planned, each gets so much more of it; if less, each the same part of what it has above its
    least. So what a step leaves over passes on to all that follow.
    """
    planned, least = sum(step.seconds for step in steps), sum(step.least for step in steps)
    step = steps[0]
    if left >= planned:
        return step.seconds * left / planned
    part = (left - least) / (planned - least) if planned > least else 0.0
    return step.least + max(0.0, part) * (step.seconds - step.least)
