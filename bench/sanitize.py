"""Every kernel on tiny shapes, in all its forms, for compute-sanitizer to look at.

The launches are those of the cases of ``correctness``. Nothing is compared here. With --tool every group runs in a
process of its own under the tool, all at once, since most of the time goes into compiling. Tensors then have
allocations of their own, so that the tool sees where each one ends. The exit status is 77 where the tool is missing or
refuses the device.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    from common.light import NOT_AVAILABLE, Parser, emit, tool
    from correctness import groups
except ImportError as error:
    sys.exit(f"sanitize.py: {error}; pip install -e . installs what it needs")

TOOLS = ("memcheck", "racecheck")
REFUSED = "Device not supported"  # as the tool says on machines that do not let it in
ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
FOUND = re.compile(r"=+ +((?:Invalid|Misaligned|Program hit|Out-of-range|Race|Error).*)")


def launch(group: str, rehearse: bool) -> None:
    """Launch every short case of a group; in a rehearsal interpreted, a few."""
    import torch
    from correctness import checks

    device = checks.the_device(rehearse)
    for case in groups.cases(group, rehearse):
        if case.short:
            print(f"case {case.name}", file=sys.stderr, flush=True)
            case.prepare(device).launch()
            if device.type == "cuda":
                torch.cuda.synchronize()


def under(command: Sequence[str], group: str) -> int:
    """Run a group under a tool, whose command line begins so; return the exit status."""
    # While a graph is recorded, as generation does, the driver gives no memory.
    alone = {} if group == "generation" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    line = [*command, sys.executable, str(Path(__file__)), group]
    process = subprocess.Popen(
        line, env=os.environ | alone, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return report(group, process)


def report(group: str, process: subprocess.Popen[str]) -> int:
    """Print a row for the first bad accesses of each case, as they come, and one for the end; return the status."""
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
            summary = int(end[1] or end[2])
    status = process.wait()
    if refused:
        emit(what="memcheck", group=group, reason="it does not support this device")
        return NOT_AVAILABLE
    row = {"what": "memcheck", "group": group, "errors": summary, "last": case}
    emit(**row, **({"error": f"exit status {status}"} if status else {}))
    return status


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = Parser(prog="sanitize.py", description="Launch every kernel once, for compute-sanitizer to look at.")
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"of {', '.join(groups.GROUPS)} (default: all but the last)"
    )
    parser.add_argument("--tool", choices=TOOLS, help="run under this tool of compute-sanitizer")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, kernels interpreted, a few tiny cases")
    args = parser.parse_args(arguments)
    # A model's tokens are kernels of the other groups, and PyTorch's own.
    wanted = args.groups or [group for group in groups.GROUPS if group != "generation"]
    for group in wanted:
        if group not in groups.GROUPS:
            parser.error(f"unknown group {group!r} (choose from {', '.join(groups.GROUPS)})")
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    if not args.tool:
        for group in wanted:
            launch(group, args.rehearse)
        return 0
    if args.rehearse or not (found := tool("compute-sanitizer")):
        for group in wanted:
            emit(what="memcheck", group=group, reason="a rehearsal" if args.rehearse else "there is no such tool")
        return 0 if args.rehearse else NOT_AVAILABLE
    # A request of PyTorch's that the driver refuses is no error of ours.
    options = ["--report-api-errors", "no"] if args.tool == "memcheck" else []
    command = [found, "--tool", args.tool, "--error-exitcode", "1", "--print-limit", "10", *options]
    with ThreadPoolExecutor(len(wanted)) as pool:
        statuses = set(pool.map(lambda group: under(command, group), wanted))
    return NOT_AVAILABLE if statuses == {NOT_AVAILABLE} else int(bool(statuses - {0, NOT_AVAILABLE}))


if __name__ == "__main__":
    sys.exit(main())
