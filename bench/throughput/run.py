"""The measurement of ops.py: every pass of every case, first checked, then timed by turns."""

import argparse
import gc
import math
import sys
import time
from contextlib import suppress
from typing import Any

import torch
from common import result_file
from common.about import about_run
from peers.operator import CPU, Inputs
from peers.provider import Provider
from throughput.passes import checked_channels, cuda_task, errors, saved_bytes, task
from throughput.plan import Case
from throughput.precompile import compile_ours
from throughput.table import OURS
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
# ‖error‖/‖reference‖ beyond which a result is wrong: far above rounding, far below any mistake.
WRONG = {
    "float64": 1e-9,
    "complex128": 1e-9,
    "float32": 1e-4,
    "complex64": 1e-4,
    "float16": 5e-3,
    "bfloat16": 3e-2,
}
EMPTY = ("ms", "ms_min", "quantiles", "ms_first", *by_turns.ONLY_GPU, "ms_graph", "saved_bytes", "gbps", "fraction")


class DeviceLostError(Exception):
    """A CUDA error after which the device answers nothing more in this process."""


class Run:
    """One call of the program and the file that it writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the settings, take the copy bandwidth; nothing else is measured yet."""
        self.args = args
        self.cuda = on_gpu.Cuda(args.device) if args.device.type == "cuda" else None
        self.effort = by_turns.effort(args.device, quick=args.quick)
        self.began = time.monotonic()
        self.deadline = math.inf if args.minutes is None else self.began + 60 * args.minutes
        self.first_seconds: dict[str, float] = {}  # seconds of a provider's, without its very first
        self.rows: list[dict[str, Any]] = []
        peers = {case.operator.name: [case.operator.all_providers()[n] for n in case.providers] for case in args.cases}
        packages = {peer.distribution for group in peers.values() for peer in group} - {None}
        settings = {
            "seed": args.seed,
            "quick": args.quick,
            "minutes": args.minutes,
            "reference": REFERENCE,
            "providers": {name: {peer.name: peer.about for peer in group} for name, group in peers.items()},
        }
        self.about = {
            **about_run("ops", args.device, settings, sorted(packages)),
            "copy": "median of nine; on a GPU the largest of 256 MiB, 1 GiB and 4 GiB, by events; on a CPU 256 MiB",
            "copy_gbps": on_gpu.copy_bandwidth(self.cuda) if self.cuda else by_turns.copy_bandwidth(args.device),
        }

    def save(self) -> None:
        """Write ops.json."""
        result_file.write(self.args.out / "ops.json", {**self.about, "rows": self.rows})

    def run(self) -> None:
        """Measure every pass of every case."""
        total = 2 * sum(len(case.passes) * len(case.providers) for case in self.args.cases)
        with tqdm(total=total, disable=None, bar_format="{l_bar}{bar}| {elapsed}") as bar:
            if self.cuda:
                gc.freeze()  # what is imported by now is not looked through each time that memory is freed
                bar.set_description("compiling")
                self._free()
                compile_ours(self.args.cases, self.args.device)
            for case in self.args.cases:
                if self._late():
                    bar.update(self._leave_out(case, status="unavailable", reason="out of time"))
                else:
                    self._run_case(case, bar)
                self.save()

    def _leave_out(self, case: Case, **why: str) -> int:
        """Write rows that say why a case was not measured; return the steps of the bar that it was to take."""
        rows = [_row(case, which, name, None) | why for which in case.passes for name in case.providers]
        self.rows += rows
        return 2 * len(rows)

    def _run_case(self, case: Case, bar: tqdm) -> None:
        title = f"{case.operator.name} {list(case.shape)}{' packed' * case.layout.packed} {case.dtype}"
        bar.set_description(f"{title}: reference")
        if bar.disable:  # where no bar shows, in a log, a line does
            print(f"{time.monotonic() - self.began:4.0f} s  {title}", file=sys.stderr, flush=True)
        try:
            self._free()
            inputs = case.draw(self.args.seed, self.args.device)
            wanted = self._expected(case, inputs)
        except Exception as error:
            bar.update(self._leave_out(case, status="failed", reason=_reason(error)))
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
                    _fail(row, error)
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
            self.rows += [row for row in rows if row["status"] != "ok" or row["ms"] is not None]
            raise
        self.rows += rows

    def _check(
        self, case: Case, row: dict[str, Any], inputs: Inputs, wanted: dict[str, Tensor], tasks: dict[str, Task]
    ) -> None:
        """Run a provider for the first time; what gives the right result becomes a task."""
        operator, which, place = case.operator, row["pass"], self.args.device
        provider = operator.all_providers()[row["provider"]]
        if reason := self._unavailable(provider, which, inputs):
            row |= {"status": "unavailable", "reason": reason}
            return
        one, results = self._first_calls(case, provider, which, inputs)
        found = errors(operator, provider, which, inputs, results, wanted)
        worst = max(found, key=lambda name: (math.isnan(found[name]), found[name]))
        row |= {"error": found[worst], "errors": found}
        allowed = WRONG[row["dtype"]]
        if not found[worst] <= allowed:  # NaN is not
            row |= {"status": "wrong", "reason": f"error of {worst} {found[worst]:.1e} > {allowed:.0e}"}
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
            # What is compiled or tuned for a shape gets that shape; on a CPU nothing is.
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
        reason = provider.missing(place) or provider.refuses(which, inputs)
        reason = reason or provider.too_long(place, which, inputs.shape[1])
        tired = self.first_seconds.get(provider.name, 0.0) > PATIENCE and provider.name != OURS
        if not reason and self.cuda and tired and not self.args.providers:
            return f"its first calls took {PATIENCE:.0f} s in this run; asked for with --providers it has no limit"
        return reason

    def _finish(self, case: Case, row: dict[str, Any], inputs: Inputs, one: Task, cores: float | None) -> None:
        if one.failure:
            _fail(row, one.failure)
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


def _fail(row: dict[str, Any], error: Exception) -> None:
    row |= {"status": "failed", "reason": _reason(error)}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _row(case: Case, which: str, provider: str, cu_seqlens: Tensor | None) -> dict[str, Any]:
    B, T, C = case.shape
    T = 1 if which == "step" else T
    row: dict[str, Any] = {"op": case.operator.name, "pass": which, "dtype": case.dtype, "B": B, "T": T, "C": C}
    row |= {"packed": None if cu_seqlens is None else cu_seqlens.numel() - 1, "provider": provider}
    row |= dict.fromkeys((*EMPTY, "error", "errors", "repeats", "other_cores"))
    return row | {"status": "ok", "reason": None}
