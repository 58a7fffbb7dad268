"""A group of kernels under compute-sanitizer: their launches alone, each tensor in an allocation of its own."""

import argparse
import os
import re
import shutil
import subprocess
import sys

from gpu_minutes.journal import emit
from gpu_minutes.plan import GROUPS
from gpu_minutes.processes import NOT_AVAILABLE

REFUSED = "Device not supported"  # what the tool says on machines that do not let it in
ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error")
FOUND = re.compile(r"=+ +((?:Invalid|Misaligned|Program hit|Out-of-range|Race|Error).*)")


def tool() -> str | None:
    """Return where compute-sanitizer is."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def launch(group: str, rehearse: bool) -> int:
    """Launch every case of a group that is looked at; return the exit status."""
    import torch
    from gpu_minutes import checking, correctness

    device = checking.the_device(rehearse)
    for case in correctness.cases(group):
        if case.short:
            print(f"case {case.name}", file=sys.stderr, flush=True)
            case.prepare(device).launch()
            if device.type == "cuda":
                torch.cuda.synchronize()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status, 77 where the tool is missing or refuses the device."""
    parser = argparse.ArgumentParser(prog="memcheck.py", description=__doc__)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--launch", action="store_true", help="what runs under the tool")
    parser.add_argument("--rehearse", action="store_true", help="say which command would run")
    args = parser.parse_args(arguments)
    if args.launch:
        return launch(args.group, args.rehearse)
    found = tool()
    options = ["--tool", "memcheck", "--error-exitcode", "1", "--report-api-errors", "no", "--print-limit", "10"]
    command = [
        found or "compute-sanitizer",
        *options,
        sys.executable,
        "-m",
        "gpu_minutes.memcheck",
        args.group,
        "--launch",
    ]
    if args.rehearse or not found:
        emit(what="memcheck", group=args.group, reason="a rehearsal" if args.rehearse else "there is no such tool")
        return 0 if args.rehearse else NOT_AVAILABLE
    # While a graph is recorded, as generation does, the driver gives no memory.
    alone = {} if args.group == "generation" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    surroundings = os.environ | alone
    process = subprocess.Popen(command, env=surroundings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return report(args.group, process)


def report(group: str, process: subprocess.Popen[str]) -> int:
    """Print a row for the first bad accesses of each case, as they come, and one for the end."""
    case, bad, summary, refused = "", 0, None, False
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", file=sys.stderr)
        if line.startswith("case "):
            case = line.removeprefix("case ").strip()
        refused |= REFUSED in line
        if (hit := FOUND.match(line)) and bad < 10:
            bad += 1
            emit(what="memcheck", group=group, case=case, error=hit[1].strip()[:200])
        if end := ERRORS.search(line):
            summary = int(end[1])
    status = process.wait()
    if refused:
        emit(what="memcheck", group=group, reason="it does not support this device")
        return NOT_AVAILABLE
    row = {"what": "memcheck", "group": group, "errors": summary, "last": case}
    emit(**row, **({"error": f"exit status {status}"} if status else {}))
    return status


if __name__ == "__main__":
    sys.exit(main())
