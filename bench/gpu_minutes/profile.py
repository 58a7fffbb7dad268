"""One launch each of WKV forward and backward under ncu: how busy memory is, and what warps wait for."""

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from gpu_minutes.journal import emit
from gpu_minutes.processes import NOT_AVAILABLE

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


def tool() -> str | None:
    """Return where ncu is."""
    return shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Return nothing: what is launched is the first case of headline.py."""
    return iter(())


def launch(rehearse: bool) -> int:
    """Launch the first case of headline.py twice, of which the second is looked at."""
    import torch
    from gpu_minutes import headline
    from gpu_minutes.checking import the_device

    device, case = the_device(rehearse), headline.cases(rehearse)[0]
    inputs = case.draw(device)
    for _ in range(2):
        y, _, kept = headline.forward(inputs, None, True)
        headline.backward(inputs, None, kept, torch.ones_like(y))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 0


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


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status, 77 where ncu is missing or may not count."""
    parser = argparse.ArgumentParser(prog="profile.py", description=__doc__)
    parser.add_argument("--launch", action="store_true", help="what runs under ncu")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, without ncu")
    args = parser.parse_args(arguments)
    if args.launch or args.rehearse:
        return launch(args.rehearse)
    if not (found := tool()):
        emit(what="profile", reason="there is no ncu")
        return NOT_AVAILABLE
    # Of each kernel the second launch: the first two that match are not looked at.
    options = ["--clock-control", "none", "-k", KERNELS, "--launch-skip", "2", "--launch-count", "2"]
    options += ["--csv", "--metrics", ",".join(METRICS.values())]
    command = [found, *options, sys.executable, "-m", "gpu_minutes.profile", "--launch"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, file=sys.stderr)
    rows = list(figures(done.stdout))
    for row in rows:
        emit(**row)
    if not rows:
        refused = "ERR_NVGPUCTRPERM" in done.stdout
        why = "counters may not be read here" if refused else f"ncu ended with {done.returncode} and no figures"
        emit(what="profile", **({"reason": why} if refused else {"error": why}))
        return NOT_AVAILABLE if refused else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
