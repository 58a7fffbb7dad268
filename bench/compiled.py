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
from pathlib import Path
from typing import Any

try:
    from common.command_line import Parser, names, positive
    from common.program import Program, bar_options
    from machine_code.costs import LOAD_CYCLES
    from machine_code.variants import DTYPES, TARGETS, TRITON, VARIANTS, compile_variant
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"compiled.py: {error}; pip install -e '.[bench]' installs what it needs (Triton on Linux only)")

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
        counts = {int(width): count for width, count in value.items()}
        usual, widest = max(counts, key=lambda width: counts[width], default=None), max(counts, default=None)
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


class Compiled(Program):
    """The program."""

    name = "compiled"
    computes = True

    @classmethod
    def options(cls, parser: Parser) -> None:
        option = parser.add_argument
        for kind, known in (("target", TARGETS), ("dtype", DTYPES)):
            text = ", ".join(known)
            option(f"--{kind}s", type=names(kind, known), default=list(known), metavar="LIST", help=text)
        option(
            "--kernels", type=_pattern, default=".*", metavar="REGEX", help="that match the whole name (default: all)"
        )
        option("--jobs", type=positive, default=os.cpu_count(), metavar="N", help="compilers at a time (%(default)s)")

    @classmethod
    def complete(cls, args: argparse.Namespace, parser: Parser) -> None:
        args.wanted = jobs(args)
        if not args.wanted:
            parser.error("nothing to compile: no kernel of --kernels has one of --dtypes")

    @classmethod
    def path(cls, args: argparse.Namespace) -> Path:
        return args.out / f"compiled-triton-{TRITON}.json"

    def settings(self) -> dict[str, Any]:
        args = self.args
        chosen = {"targets": args.targets, "dtypes": args.dtypes, "kernels": args.kernels.pattern}
        return {**chosen, "load_cycles": LOAD_CYCLES}

    def run(self) -> None:
        wanted = self.args.wanted
        with multiprocessing.get_context("spawn").Pool(self.args.jobs) as pool:
            found = pool.imap(compile_variant, wanted)
            for figures in tqdm(found, total=len(wanted), unit=" kernels", disable=None, **bar_options()):
                self.add(asdict(figures))

    @classmethod
    def table(cls, record: dict[str, Any]) -> str:
        lines = [line(column[head] for column in COLUMNS) for head in (0, 1)]
        for row in record["rows"]:
            figures = {**row, "moved": row["loaded"] + row["stored"]}
            lines.append(line(cell(figures[name], digits) for *_, name, digits in COLUMNS))
        return "\n".join(lines)

    @classmethod
    def complaint(cls, row: dict[str, Any]) -> str | None:
        spilled = row["spilled_bytes"]
        return f"{row['kernel']}, {row['dtype']}, {row['target']} spills {spilled} bytes" if spilled else None


main = Compiled.main

if __name__ == "__main__":
    sys.exit(main())
