"""gen_time.py for a short time on a GPU: a row for each series as it ends. Writes gen_time.json too."""

import argparse
import time

import gen_time
from common.light import emit
from common.program import run_and_save
from precompiled import triton_keys

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


def run(args: argparse.Namespace) -> int:
    """Run the step."""
    if not args.rehearse:
        triton_keys.settle()  # kernels compiled beforehand are found
    chosen = OPTIONS_REHEARSED if args.rehearse else OPTIONS
    rows = Rows(gen_time.GenTime.parse([*chosen, "--out", str(args.out)]), args.seconds)
    return run_and_save(rows.run, rows.save)
