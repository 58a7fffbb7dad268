"""Launch shapes of the kernels on a GPU: which is the fastest, and what a device does that a model has to assume.

Parts, each with its share of the time; what there is no time for is said
- assumptions: copy bandwidth, the latency of a load, the clock, both under load too, the cost of a launch
- candidates: passes of both operators in float32 and bfloat16 with other channels and warps a program, tiles in flight
  and chunks, by turns; then once more where the fastest is not sure
- skeleton: the same reads and writes without arithmetic, the ceiling of each launch shape
- l2: whether a pass over a slice finds in the cache what the pass before has read
Writes tune.json and, where another plan wins by more than the spread, tune.diff: what kernels/config.py should hold.
Nothing is changed. gpu_model.py takes what it assumes from tune.json. Exit status 1 if anything failed.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from common import result_file
    from common.about import about_run
    from common.command_line import Parser, add_out, device, names, parser_of, positive
    from common.light import emit as print_row
    from common.program import run_and_save
except ImportError as error:
    sys.exit(f"tune.py: {error}; pip install -e '.[bench]' installs what it needs")

SHARES = {"assumptions": 0.15, "candidates": 0.65, "skeleton": 0.5, "l2": 1.0}  # each of what the parts before leave
SECONDS = 60

Emit = Callable[[Mapping[str, Any]], None]


def run(parts: Sequence[str], cuda: Any, seconds: float, emit: Emit, rehearsal: bool) -> dict[str, Any]:
    """Run the parts, a share of the time each and the last all that is left; return the text of a diff."""
    from launch_shapes import assumptions, candidates, report, skeleton, turns

    budget = turns.Budget(seconds)
    trials = [turns.Trial(case) for case in candidates.cases(cuda.multiprocessors, rehearsal)]
    measures: dict[str, Any] = {
        "assumptions": assumptions.measure,
        "candidates": lambda cuda, budget, emit, _: turns.measure(trials, cuda, budget, emit),
        "skeleton": skeleton.measure,
        "l2": skeleton.measure_cache,
    }
    chosen = [name for name in SHARES if name in parts]
    for name in chosen:
        measures[name](cuda, budget.share(1.0 if name == chosen[-1] else SHARES[name]), emit, rehearsal)
    return report.conclude(emit, trials if "candidates" in parts else [])


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """Read the command line."""
    parser = parser_of("tune.py", __doc__)
    option = parser.add_argument
    option("--parts", type=names("part", SHARES), default=list(SHARES), metavar="LIST", help=", ".join(SHARES))
    option("--seconds", type=positive, default=SECONDS, metavar="N", help="to spend, at most (default: %(default)s)")
    option("--rows", action="store_true", help="print rows as JSON lines as they come, the table to standard error")
    option("--rehearse", action="store_true", help="on a CPU: kernels interpreted, tensors tiny, times without meaning")
    add_out(parser)
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    parser, args = parse(argv)
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    try:
        from launch_shapes import report, table
        from launch_shapes.device import Gpu, Rehearsal
        from precompiled import triton_keys
    except ImportError as error:
        sys.exit(f"tune.py: {error}; it needs Triton, which exists on Linux only")
    place = device("cpu" if args.rehearse else None, parser)
    if place.type != "cuda" and not args.rehearse:
        parser.error("there is no GPU here; --rehearse goes through all of it on a CPU")
    settings = {"parts": args.parts, "seconds": args.seconds, "rehearsal": args.rehearse}
    record: dict[str, Any] = {**about_run("tune", place, settings), "diff": "", "rows": []}
    path = args.out / "tune.json"
    result_file.check(path, record["device"], parser)
    if not args.rehearse:
        triton_keys.settle()  # kernels compiled beforehand are found
    cuda = Rehearsal() if args.rehearse else Gpu(place)
    rows: list[dict[str, Any]] = []

    def emit(row: Mapping[str, Any]) -> None:
        rows.append(dict(row))
        if args.rows:
            print_row(**row)

    def measure() -> int:
        record.update(run(args.parts, cuda, args.seconds, emit, args.rehearse))
        return int(any("error" in row for row in rows))

    def save() -> None:
        record["rows"] = table.latest(rows)
        result_file.write(path, record)
        diff = Path(args.out) / "tune.diff"
        diff.unlink(missing_ok=True)
        if record["diff"]:
            diff.write_text(record["diff"])
        print(report.text(record), file=sys.stderr if args.rows else sys.stdout)

    return run_and_save(measure, save)


if __name__ == "__main__":
    sys.exit(main())
