"""What the compiler makes of every kernel, without a GPU.

Each kernel is compiled to machine code for the named targets, in every dtype and with the optional arguments that give
it its variants. Of the main loop, for a lane, a token and a channel: instructions, special functions among them
(exponentials, reciprocals, roots; in float64 they are made of ordinary arithmetic too), bytes loaded and stored, clocks
that a multiprocessor needs by the throughput of its units and the unit that sets them. Of the main loop, for a token:
clocks of one warp alone, by what the instructions tell the scheduler, once as if loads answered at once and once as if
they took 1400 clocks. "loads" and "stores" are the bytes a lane, the usual ones and after a slash the widest. "warps"
are those that fit on a multiprocessor. All this is computed, not measured, and depends on the compiler: the file is
named after the version of Triton, compiled-triton-3.9.json. It has more: its rows are the Figures of compiled_gpu.py. A
spill is an error: exit 1.
"""

import argparse
import multiprocessing
import os
import re
import sys
from dataclasses import asdict

try:
    from common import computed_result
    from common.command_line import Parser, add_out, names, positive
    from machine_code.costs import LOAD_CYCLES, Figures
    from machine_code.variants import DTYPES, TARGETS, TRITON, VARIANTS, compile_variant
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"compiled.py: {error}; pip install -e '.[bench]' installs what it needs (Triton on Linux only)")

FILE = f"compiled-triton-{TRITON}"
COLUMNS = (
    "{kernel:<22} {dtype:<10} {target:<7} {registers:>9} {spilled:>8} {shared:>7} {instructions:>13} {special:>8} "
    "{loads:>6} {stores:>6} {bytes:>6} {warps:>6} {clocks:>7} {unit:>7} {cycles:>7} {waiting:>8}"
)
HEADER = {
    "kernel": ("kernel", ""),
    "dtype": ("dtype", ""),
    "target": ("target", ""),
    "registers": ("registers", ""),
    "spilled": ("spilled", "bytes"),
    "shared": ("shared", "bytes"),
    "instructions": ("instructions", "an element"),
    "special": ("special", "an el."),
    "loads": ("loads", "bytes"),
    "stores": ("stores", "bytes"),
    "bytes": ("bytes", "an el."),
    "warps": ("warps", ""),
    "clocks": ("clocks", "an el."),
    "unit": ("set by", ""),
    "cycles": ("alone", "a row"),
    "waiting": ("waiting", "a row"),
}


def cells(figures: Figures) -> dict[str, str]:
    """Return what the table says of a variant, by its columns; "-" is what a target has not."""

    def number(value: float | None, digits: int = 0) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return {
        "kernel": figures.kernel,
        "dtype": figures.dtype,
        "target": figures.target,
        "registers": number(figures.registers),
        "spilled": number(figures.spilled_bytes),
        "shared": number(figures.shared_bytes),
        "instructions": number(figures.instructions, 1),
        "special": number(figures.special, 2),
        "loads": _widths(figures.loads),
        "stores": _widths(figures.stores),
        "bytes": number(figures.loaded + figures.stored, 2),
        "warps": number(figures.warps),
        "clocks": number(figures.clocks, 3),
        "unit": figures.unit or "-",
        "cycles": number(figures.cycles),
        "waiting": number(figures.waiting),
    }


def jobs(args: argparse.Namespace) -> list[tuple[int, str, str]]:
    """Return what is asked for and exists: the index of a variant, a dtype and a target."""
    return [
        (index, dtype, target)
        for index, variant in enumerate(VARIANTS)
        for dtype in args.dtypes
        for target in args.targets
        if args.kernels.fullmatch(variant.name)
        and variant.takes(dtype)
        # What has no stream in the model's dtype is the same for all that sum in float32.
        and (variant.streams or dtype not in ("float16", "bfloat16"))
    ]


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from error


def _widths(accesses: dict[int, int]) -> str:
    if not accesses:
        return "-"
    usual, widest = max(accesses, key=lambda width: accesses[width]), max(accesses)
    return f"{usual}" if usual == widest else f"{usual}/{widest}"


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

    for line in (0, 1):
        print(COLUMNS.format(**{name: both[line] for name, both in HEADER.items()}).rstrip())
    for row in rows:
        print(COLUMNS.format(**cells(row)))
    record["rows"] = [asdict(row) for row in rows]
    computed_result.write(args.out, record, FILE)
    spilling = [row for row in rows if row.spilled_bytes]
    if spilling:
        sys.exit(f"compiled.py: {len(spilling)} of {len(rows)} kernels spill registers")


if __name__ == "__main__":
    main()
