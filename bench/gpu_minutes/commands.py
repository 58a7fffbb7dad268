"""The command lines of gpu.py first, second and table. Nothing here imports PyTorch: seconds count."""

import argparse
import contextlib
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from common.light import Parser
from correctness.groups import GROUPS
from gpu_minutes import journal, plan, runner, table
from gpu_minutes.processes import ROOT

BUDGETS = {"first": 300.0, "second": 380.0}  # seconds
COMMANDS = (*BUDGETS, "table")
COMMIT = "FASTWKV_COMMIT"  # of the environment; what about.py tells of a checkout without history


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(prog="gpu.py", description="What a few minutes on a GPU are for, within a budget of seconds.")
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=Parser)
    for name, seconds in BUDGETS.items():
        steps = {step.name: step for step in plan.PLANS[name]()}
        about = "\n".join(f"  {step.name:<12} {step.about}" for step in steps.values())
        one = kinds.add_parser(name, formatter_class=argparse.RawTextHelpFormatter, epilog=f"steps:\n{about}")
        option = one.add_argument
        option("--budget", type=_seconds, default=seconds, metavar="S", help=f"of time (default: {seconds:.0f} s)")
        option("--steps", type=_names(steps), default=[], metavar="LIST", help="only these, comma-separated")
        option("--groups", type=_names(GROUPS), default=[], metavar="LIST", help="of correctness, only these")
        option("--commit", metavar="HASH", help="of this copy, where git cannot be asked")
        option("--rehearse", action="store_true", help="on a CPU: kernels interpreted, shapes tiny")
        option("--wrong", metavar="GROUP", help="with --rehearse, a group of correctness that is given a wrong result")
        option("--hang", metavar="STEP", help="with --rehearse, a step that never returns")
    kinds.add_parser("table", help="print the table of a folder of results once more")
    for one in kinds.choices.values():
        one.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    args = parser.parse_args(arguments)
    if args.kind == "table":
        if not (args.out / "rows.jsonl").is_file():
            parser.error(f"there is no rows.jsonl in {str(args.out)!r}")
        return args
    if not args.rehearse and (args.wrong or args.hang):
        parser.error("--wrong and --hang are for a rehearsal")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot write into {str(args.out)!r}: {error.strerror}")
    return args


def _seconds(text: str) -> float:
    seconds = 0.0
    with contextlib.suppress(ValueError):
        seconds = float(text)
    if not 10 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected at least 10 seconds, got {text!r}")
    return seconds


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    def split(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r} (choose from {', '.join(known)})")
        return text.split(",")

    return split


def commit(given: str | None = None) -> str | None:
    """Return the commit of this copy: as given, of the environment, by git, or as the preparation has written it."""
    if given or os.environ.get(COMMIT):
        return given or os.environ[COMMIT]
    try:
        command = ("git", "-C", str(ROOT), "rev-parse", "HEAD")
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        written = runner.READY / "commit"
        return written.read_text().strip() if written.is_file() else None


def digest() -> str:
    """Return a digest of all code of the checkout, which need not be that of a commit."""
    found = hashlib.sha256()
    folders = ("fastwkv", "kernels", "reference", "bench", "tests")
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def main(arguments: list[str], began: float) -> int:
    """Run a command whose clock started at ``began``; return its exit status."""
    args = parse(arguments)
    if args.kind == "table":
        print(table.of_rows(journal.read(args.out)))
        return 0
    written = journal.Journal(args.out.resolve(), began)
    surroundings = {COMMIT: hash_} if (hash_ := commit(args.commit)) else {}
    if args.rehearse:
        surroundings |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "FASTWKV_WRONG": args.wrong or ""}
    about = {"what": "begun", "command": args.kind, "budget": args.budget, "commit": hash_, "code": digest()}
    written.add("run", {**about, "rehearsal": args.rehearse})
    steps = runner.only(plan.PLANS[args.kind](), args.steps, args.groups)
    with tempfile.TemporaryDirectory(prefix="kernels-", ignore_cleanup_errors=True) as cache:
        surroundings["TRITON_CACHE_DIR"] = cache  # the first step fills it with what was compiled beforehand
        rehearsed = {"rehearse": args.rehearse, "hang": args.hang}
        run = runner.Run(args.kind, steps, args.budget, written, surroundings=surroundings, **rehearsed)
        status = run.run()
    print(f"\n{run.table()}", flush=True)
    return status
