"""The machine code that the compiler makes of every kernel, without a GPU.

Each kernel is compiled to machine code for the named targets, in every dtype and with the optional arguments that give
it its variants. Of the main loop, for a lane, a token and a channel: instructions, special functions among them
(exponentials, reciprocals, roots; in float64 they are made of ordinary arithmetic too), bytes loaded and stored, clocks
that a multiprocessor needs by the throughput of its units and the unit that sets them. Of the main loop, for a token:
clocks of one warp alone, by what the instructions tell the scheduler, once as if loads answered at once and once as if
they took 1400 clocks. "loads" and "stores" are the bytes a lane, the usual ones and after a slash the widest. "warps"
are those that fit on a multiprocessor. All this is computed, not measured, and depends on the compiler: the file is
named after the version of Triton, compiled-triton-3.9.json. Its rows are the Figures of machine_code/costs.py. A spill
is an error: exit 1.
"""

import argparse
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

try:
    from common import computed_result
    from common.command_line import Parser, add_out, names, positive
    from machine_code.costs import LOAD_CYCLES
    from machine_code.variants import DTYPES, TARGETS, TRITON, VARIANTS, compile_variant
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"compiled.py: {error}; pip install -e '.[bench]' installs what it needs (Triton on Linux only)")

FILE = f"compiled-triton-{TRITON}"
COLUMNS = (  # title, unit, width, attribute of Figures, digits
    ("kernel", "", "<22", "kernel", 0),
    ("dtype", "", "<10", "dtype", 0),
    ("target", "", "<7", "target", 0),
    ("registers", "", ">9", "registers", 0),
    ("spilled", "bytes", ">8", "spilled_bytes", 0),
    ("shared", "bytes", ">7", "shared_bytes", 0),
    ("instructions", "an element", ">13", "instructions", 1),
    ("special", "an el.", ">8", "special", 2),
    ("loads", "bytes", ">6", "loads", 0),
    ("stores", "bytes", ">6", "stores", 0),
    ("bytes", "an el.", ">6", "moved", 2),
    ("warps", "", ">6", "warps", 0),
    ("clocks", "an el.", ">7", "clocks", 3),
    ("set by", "", ">7", "unit", 0),
    ("alone", "a row", ">7", "cycles", 0),
    ("waiting", "a row", ">8", "waiting", 0),
)


def line(cells: Iterable[str]) -> str:
    """Return a line of the table."""
    return " ".join(f"{cell:{column[2]}}" for cell, column in zip(cells, COLUMNS, strict=True)).rstrip()


def cell(value: Any, digits: int) -> str:
    """Return what the table says of a figure; "-" is what a target or a kernel has not."""
    if isinstance(value, dict):  # accesses by their bytes a lane: the usual ones, and after a slash the widest
        usual, widest = max(value, key=value.get, default=None), max(value, default=None)
        return cell(usual, 0) if usual == widest else f"{usual}/{widest}"
    return "-" if value is None else value if isinstance(value, str) else f"{value:.{digits}f}"


def jobs(args: argparse.Namespace) -> list[tuple[int, str, str]]:
    """Return what is asked for and exists: the index of a variant, a dtype and a target."""
    return [
        (index, dtype, target)
        for index, variant in enumerate(VARIANTS)
        for dtype in args.dtypes
        for target in args.targets
        if args.kernels.fullmatch(variant.name)
        and variant.takes(dtype)
        # A kernel without a stream in the model's dtype is the same for all that sum in float32.
        and (variant.streams or dtype not in ("float16", "bfloat16"))
    ]


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from error


def main() -> None:
    parser = Parser(prog="compiled.py", description=__doc__.split("\n\n")[0])
    option = parser.add_argument
    option("--targets", type=names("target", TARGETS), default=list(TARGETS), metavar="LIST", help=", ".join(TARGETS))
    option("--dtypes", type=names("dtype", DTYPES), default=list(DTYPES), metavar="LIST", help=", ".join(DTYPES))
    option("--kernels", type=_pattern, default=".*", metavar="REGEX", help="that match the whole name (default: all)")
    option("--jobs", type=positive, default=os.cpu_count(), metavar="N", help="compilers at a time (%(default)s)")
    add_out(parser)
    args = parser.parse_args()
    wanted = jobs(args)
    if not wanted:
        parser.error("nothing to compile: no kernel of --kernels has one of --dtypes")
    computed_result.check(args.out, FILE, parser)
    chosen = {"targets": args.targets, "dtypes": args.dtypes, "kernels": args.kernels.pattern}
    settings = {**chosen, "load_cycles": LOAD_CYCLES}
    record = computed_result.record("compiled", settings)
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        rows = list(tqdm(pool.imap(compile_variant, wanted), total=len(wanted), unit=" kernels", disable=None))

    for head in (0, 1):
        print(line(column[head] for column in COLUMNS))
    for row in rows:
        print(line(cell(getattr(row, attribute), digits) for *_, attribute, digits in COLUMNS))
    record["rows"] = [asdict(row) for row in rows]
    computed_result.write(args.out, record, FILE)
    spilling = [row for row in rows if row.spilled_bytes]
    if spilling:
        sys.exit(f"compiled.py: {len(spilling)} of {len(rows)} kernels spill registers")


if __name__ == "__main__":
    main()
