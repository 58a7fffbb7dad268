"""The measurement of ops.py: every pass of every case, first checked, then timed by turns."""

import argparse
import gc
import math
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from common.light import reason
from common.program import Program
from peers.operator import CPU, Inputs, judged
from peers.provider import OURS, Provider
from throughput.passes import checked_channels, cuda_task, errors, saved_bytes, task
from throughput.plan import Case
from throughput.precompile import compile_ours
from timing import by_turns, on_gpu
from timing.by_turns import Task
from torch import Tensor
from tqdm import tqdm

WARM_UP = 32  # tokens of a first call, which compiles
LONGEST_LOOP = 8192  # tokens; beyond, the loop of the reference takes minutes
REFERENCE = {
    f"T <= {LONGEST_LOOP}": "fastwkv.reference, a loop, in float64 on the CPU",
    f"T > {LONGEST_LOOP}": "fastwkv's CPU path in float64, which tests hold to 1e-12 of fastwkv.reference",
}
PATIENCE = 30.0  # seconds on a GPU for the first calls of a peer that was not asked for by name
EMPTY = ("ms", "ms_min", "quantiles", "ms_first", *by_turns.ONLY_GPU, "ms_graph", "saved_bytes", "gbps", "fraction")


class DeviceLostError(Exception):
    """A CUDA error after which the device answers nothing more in this process."""


class Run(Program):
    """The measuring half of ops.py."""

    name = "ops"

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the settings, take the copy bandwidth; nothing else is measured yet."""
        super().__init__(args)
        self.cuda = on_gpu.Cuda(args.device) if args.device.type == "cuda" else None
        self.effort = by_turns.effort(args.device, quick=args.quick)
        self.began = time.monotonic()
        self.deadline = math.inf if args.minutes is None else self.began + 60 * args.minutes
        self.first_seconds: dict[str, float] = {}  # seconds of a provider's, without its very first
        self.about["copy_gbps"] = (
            on_gpu.copy_bandwidth(self.cuda) if self.cuda else by_turns.copy_bandwidth(args.device)
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings, the reference, and how each provider is called."""
        chosen = {name: getattr(self.args, name) for name in ("seed", "quick", "minutes")}
        providers = {case.operator.name: {one.name: one.about for one in case.callers()} for case in self.args.cases}
        return chosen | {"reference": REFERENCE, "providers": providers}

    def packages(self) -> Iterable[str]:
        """Return the packages of the peers."""
        return sorted({one.distribution for case in self.args.cases for one in case.callers() if one.distribution})

    def run(self) -> int:
        """Measure every pass of every case; return 1 if the device is lost."""
        total = 2 * sum(len(case.passes) * len(case.providers) for case in self.args.cases)
        with tqdm(total=total, disable=None, bar_format="{l_bar}{bar}| {elapsed}") as bar:
            if self.cuda:
                gc.freeze()  # what is imported by now is not looked through each time that memory is freed
                bar.set_description("compiling")
                self._free()
                compile_ours(self.args.cases, self.args.device)
            try:
                for case in self.args.cases:
                    self._run_case(case, bar)
            except DeviceLostError as error:
                print(f"\nops.py: the device is lost: {error}; writing what was measured", file=sys.stderr)
                return 1
        return 0

    def _leave_out(self, case: Case, bar: tqdm, **why: str) -> None:
        """Write rows that say why a case was not measured."""
        rows = [_row(case, which, name, None) | why for which in case.passes for name in case.providers]
        self.add(*rows)
        bar.update(2 * len(rows))

    def _run_case(self, case: Case, bar: tqdm) -> None:
        if self._late():
            self._leave_out(case, bar, status="unavailable", reason="out of time")
            return
        title = f"{case.operator.name} {list(case.shape)}{' packed' * case.layout.packed} {case.dtype}"
        bar.set_description(f"{title}: reference")
        if bar.disable:  # where no bar shows, in a log, a line does
            print(f"{time.monotonic() - self.began:4.0f} s  {title}", file=sys.stderr, flush=True)
        try:
            self._free()
            inputs = case.draw(self.args.seed, self.args.device)
            wanted = self._expected(case, inputs)
        except Exception as error:
            self._leave_out(case, bar, status="failed", reason=reason(error))
            self._recover(self.rows[-1])
            return
        for which in case.passes:
            self._run_pass(case, which, inputs, wanted[which == "step"], bar)

    def _expected(self, case: Case, inputs: Inputs) -> dict[bool, dict[str, Tensor]]:
        """Return what the reference gives for the passes of a case, by whether it is a step."""
        operator, sample = case.operator, inputs.part(case.shape[1], checked_channels(inputs)).on(CPU)
        wanted = {True: operator.expected_step(sample)} if "step" in case.passes else {}
        if set(case.passes) != {"step"}:
            wanted[False] = operator.expected(sample, state=False, own=case.shape[1] > LONGEST_LOOP)
        return wanted

    def _run_pass(self, case: Case, which: str, inputs: Inputs, wanted: dict[str, Tensor], bar: tqdm) -> None:
        title = f"{case.operator.name} {list(case.shape)} {case.dtype}, {which}"
        rows = [_row(case, which, name, inputs.cu_seqlens) for name in case.providers]
        others = by_turns.OtherWork()
        tasks: dict[str, Task] = {}
        try:
            for row in rows:
                bar.set_description(f"{title}: {row['provider']}")
                try:
                    self._check(case, row, inputs, wanted, tasks)
                except Exception as error:
                    row |= {"status": "failed", "reason": reason(error)}
                self._recover(row)
                bar.update(1 if row["status"] == "ok" else 2)
            bar.set_description(f"{title}: by turns")
            by_turns.measure(list(tasks.values()), self.effort, bar.update)
            cores = others.cores()
            for row in rows:
                if row["provider"] in tasks:
                    self._finish(case, row, inputs, tasks[row["provider"]], cores)
                    self._recover(row)
        except DeviceLostError:
            self.add(*(row for row in rows if row["status"] != "ok" or row["ms"] is not None))
            raise
        self.add(*rows)

    def _check(
        self, case: Case, row: dict[str, Any], inputs: Inputs, wanted: dict[str, Tensor], tasks: dict[str, Task]
    ) -> None:
        """Run a provider for the first time; what gives the right result becomes a task."""
        operator, which, place = case.operator, row["pass"], self.args.device
        provider = operator.all_providers()[row["provider"]]
        if why := self._unavailable(provider, which, inputs):
            row |= {"status": "unavailable", "reason": why}
            return
        one, results = self._first_calls(case, provider, which, inputs)
        row |= judged(errors(operator, provider, which, inputs, results, wanted), row["dtype"])
        if row["status"] != "ok":
            return
        tasks[provider.name] = one
        del results
        if one.first <= self.effort.once:
            with suppress(Exception):  # it is no part of the measurement
                row["saved_bytes"] = saved_bytes(provider, which, inputs, place)

    def _first_calls(self, case: Case, provider: Provider, which: str, inputs: Inputs) -> tuple[Task, Any]:
        """Warm a provider up, call it, and note how long that took; return the call and its result."""
        place, known, begin = self.args.device, provider.name in self.first_seconds, time.monotonic()
        self.first_seconds.setdefault(provider.name, 0.0)
        try:
            # A provider that compiles or tunes for a shape gets that shape; on a CPU none does.
            short = not self.cuda or provider.loops
            task(provider, which, inputs.part(WARM_UP) if short else inputs, place).run()
            if not known:  # the very first may compile an extension
                begin = time.monotonic()
            if self.cuda:
                one: Task = cuda_task(case.operator, provider, which, inputs, self.cuda)
            else:
                one = task(provider, which, inputs, place)
            results, one.first = one.run()
        finally:
            self.first_seconds[provider.name] += time.monotonic() - begin
        return one, results

    def _unavailable(self, provider: Provider, which: str, inputs: Inputs) -> str | None:
        """Return why a provider is not measured, None if it is."""
        place = self.args.device
        if self._late():
            return "out of time"
        why = provider.missing(place) or provider.refuses(which, inputs)
        why = why or provider.too_long(place, which, inputs.shape[1])
        tired = self.first_seconds.get(provider.name, 0.0) > PATIENCE and provider.name != OURS
        if not why and self.cuda and tired and not self.args.providers:
            return f"its first calls took {PATIENCE:.0f} s in this run; asked for with --providers it has no limit"
        return why

    def _finish(self, case: Case, row: dict[str, Any], inputs: Inputs, one: Task, cores: float | None) -> None:
        if one.failure:
            row |= {"status": "failed", "reason": reason(one.failure)}
            return
        row |= one.figures()
        row["gbps"] = case.operator.compulsory_bytes(row["pass"], inputs) / row["ms"] / 1e6
        row["fraction"] = row["gbps"] / self.about["copy_gbps"]
        row["other_cores"] = cores

    def _recover(self, row: dict[str, Any]) -> None:
        """Give back what a failure left behind; end the run if the device is lost."""
        if row["status"] != "failed":
            return
        try:
            self._free()
        except Exception as error:
            raise DeviceLostError(f"{row['provider']}, {row['op']}, {row['pass']}: {row['reason']}") from error

    def _free(self) -> None:
        if self.cuda:
            self.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()

    def _late(self) -> bool:
        return time.monotonic() > self.deadline


def _row(case: Case, which: str, provider: str, cu_seqlens: Tensor | None) -> dict[str, Any]:
    B, T, C = case.shape
    T = 1 if which == "step" else T
    row: dict[str, Any] = {"op": case.operator.name, "pass": which, "dtype": case.dtype, "B": B, "T": T, "C": C}
    row |= {"packed": None if cu_seqlens is None else cu_seqlens.numel() - 1, "provider": provider}
    row |= dict.fromkeys((*EMPTY, "error", "errors", "repeats", "other_cores"))
    return row | {"status": "ok", "reason": None}
