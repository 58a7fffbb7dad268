"""One launch each of WKV forward and backward under ncu: how busy memory is, and what warps wait for."""

import argparse
import csv
import io
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from common.light import NOT_AVAILABLE, emit, tool

STALLS = (
    "long_scoreboard", "short_scoreboard", "wait", "barrier", "lg_throttle", "mio_throttle", "math_pipe_throttle",
    "not_selected", "no_instruction", "branch_resolve", "dispatch_stall",
)  # fmt: skip
METRICS = {
    "us": "gpu__time_duration.sum",
    "dram %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram read": "dram__bytes_read.sum",
    "dram written": "dram__bytes_write.sum",
    "issue slots %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "L2 hit %": "lts__t_sector_hit_rate.pct",
    "sectors a request": "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
    "MHz": "smsp__cycles_elapsed.avg.per_second",
    "registers": "launch__registers_per_thread",
    **{f"stall {name}": f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio" for name in STALLS},
}
KERNELS = "regex:_wkv_(fwd|bwd)_kernel"
LAUNCH = "from gpu_minutes import profile; profile.launch()"


def launch(rehearse: bool = False) -> None:
    """Launch the first case of headline.py twice, of which the second is looked at."""
    import torch
    from correctness.checks import the_device
    from gpu_minutes import headline

    device, case = the_device(rehearse), headline.cases(rehearse)[0]
    inputs = case.draw(device)
    for _ in range(2):
        y, _, kept = headline.forward(inputs, None, True)
        headline.backward(inputs, None, kept, torch.ones_like(y))
    if device.type == "cuda":
        torch.cuda.synchronize()


def figures(text: str) -> Iterator[dict[str, Any]]:
    """Return a row for each kernel in what ncu prints as CSV, one line a metric."""
    lines = text[text.find('"ID"') :] if '"ID"' in text else ""
    kernels: dict[tuple[str, str], dict[str, Any]] = {}
    names = {metric: name for name, metric in METRICS.items()}
    for line in csv.DictReader(io.StringIO(lines)):
        if line.get("Metric Name") not in names:
            continue
        row = kernels.setdefault((line["ID"], line["Kernel Name"]), {})
        try:
            value: Any = float(line["Metric Value"].replace(",", ""))
        except ValueError:
            value = line["Metric Value"]
        row[names[line["Metric Name"]]] = [value, line["Metric Unit"]]
    for (_, kernel), row in kernels.items():
        yield {"what": "profile", "kernel": kernel, **row}


def run(args: argparse.Namespace) -> int:
    """Run the step; 77 where ncu is missing or may not count."""
    if args.rehearse:
        launch(rehearse=True)
        return 0
    if not (found := tool("ncu")):
        emit(what="profile", reason="there is no ncu")
        return NOT_AVAILABLE
    # Of each kernel the second launch: the first two that match are not looked at.
    options = ["--clock-control", "none", "-k", KERNELS, "--launch-skip", "2", "--launch-count", "2"]
    options += ["--csv", "--metrics", ",".join(METRICS.values())]
    done = subprocess.run([found, *options, sys.executable, "-c", LAUNCH], stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    rows = list(figures(done.stdout))
    for row in rows:
        emit(**row)
    if rows:
        return 0
    if "ERR_NVGPUCTRPERM" in done.stdout:
        emit(what="profile", reason="counters may not be read here")
        return NOT_AVAILABLE
    emit(what="profile", error=f"ncu ended with {done.returncode} and no figures")
    return 1
