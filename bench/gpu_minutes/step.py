"""Runs a step of gpu.py first or second in a process of its own: ``python -m gpu_minutes.step headline --seconds 60``.

A step is a module of this room with a function ``run(args)``, which prints a row for each figure as soon as it exists
and returns the exit status, 77 if the machine lacks what it needs.
"""

import argparse
import importlib
import sys
from pathlib import Path

STEPS = ("machine", "headline", "generation", "profile", "tests", "peers", "gen_time")


def main(arguments: list[str] | None = None) -> int:
    """Run a step; return its exit status."""
    parser = argparse.ArgumentParser(prog="step.py", description=__doc__.partition("\n\n")[0])
    option = parser.add_argument
    option("name", choices=STEPS)
    option("subjects", nargs="*", help="of tests, files and folders; of peers, build: only compile them")
    option("--seconds", type=float, default=60.0, metavar="S", help="nothing begins later (default: 60)")
    option("--out", type=Path, default=Path(), metavar="DIR", help="folder of the files that it writes")
    option("--rehearse", action="store_true", help="on a CPU: kernels interpreted, shapes tiny")
    option("--jobs", type=int, default=0, metavar="N", help="of tests, processes")
    option("--match", default="", metavar="EXPRESSION", help="of tests, -k of pytest")
    args = parser.parse_args(arguments)
    return importlib.import_module(f"gpu_minutes.{args.name}").run(args)


if __name__ == "__main__":
    sys.exit(main())
