"""gen_time.py for a short time on a GPU: a row for each series as it ends. Writes gen_time.json too."""

import argparse
import sys
import time
from pathlib import Path

import gen_time
from common import program
from common.command_line import Parser
from piece.journal import emit
from ready import triton_keys

OPTIONS = ("--device", "cuda", "--size", "3b", "--dtype", "bfloat16", "--models", "rwkv4,gpt-neox", "--tokens", "512")
OPTIONS_REHEARSED = ("--device", "cpu", "--size", "tiny", "--models", "rwkv4", "--tokens", "8")


class Rows(gen_time.GenTime):
    """A run of gen_time.py that prints its series."""

    def __init__(self, args: argparse.Namespace, seconds: float) -> None:
        """Let nothing be measured after so many seconds."""
        super().__init__(args)
        self.deadline = time.monotonic() + seconds
        self.printed: set[tuple[str, str]] = set()

    def save(self) -> None:
        """Write gen_time.json, and print the series that have ended."""
        super().save()
        for series in self.series:
            key = series.name, series.protocol
            if series.status not in ("complete", "out of time", "out of memory") or key in self.printed:
                continue
            self.printed.add(key)
            record = series.record()
            plain = {name: value for name, value in record.items() if isinstance(value, (int, float, str, bool))}
            if len(total := series.cumulative) > 1:  # the first token has read the prompt too
                plain["ms"] = float(1e3 * (total[-1] - total[0]) / (len(total) - 1))
            emit(what="series", **plain)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = Parser(prog="gen_time_rows.py", description=__doc__)
    parser.add_argument("--seconds", type=float, default=100.0, metavar="S", help="to measure (default: 100)")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder of gen_time.json")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, a tiny model, a few tokens")
    args = parser.parse_args(arguments)
    if not args.rehearse:
        triton_keys.settle()  # kernels compiled beforehand are found
    chosen = OPTIONS_REHEARSED if args.rehearse else OPTIONS
    run = Rows(gen_time.GenTime.parse([*chosen, "--out", str(args.out)]), args.seconds)
    return program.run_and_save(run.run, run.save)


if __name__ == "__main__":
    sys.exit(main())
