"""pytest, with a row for each test as it ends: what time allows, in a random order of nobody's choice."""

import argparse
import importlib.util
import json
import os
import sys
from typing import Any

from gpu_minutes.processes import NOT_AVAILABLE, ROOT


class Rows:
    """A plugin of pytest that prints a row for every test, failures with their reason."""

    def __init__(self, stream: Any) -> None:
        """Print to this stream."""
        self.stream = stream

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take the report of one phase of a test."""
        if report.when != "call" and report.outcome == "passed":
            return
        row = {"what": "test", "name": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            row["error"] = (crash.message if crash else str(report.longrepr)).strip().partition("\n")[0][:300]
        print(json.dumps(row), file=self.stream, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status, 77 where pytest is missing."""
    parser = argparse.ArgumentParser(prog="tests.py", description=__doc__)
    parser.add_argument("-n", type=int, default=0, metavar="N", help="processes")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="of pytest")
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--rehearse", action="store_true", help="one small file of tests")
    args = parser.parse_args(arguments)
    rows = os.fdopen(os.dup(1), "w")
    for package in ("pytest", "hypothesis"):
        if importlib.util.find_spec(package) is None:
            print(json.dumps({"what": "test", "reason": f"{package} is not installed"}), file=rows, flush=True)
            return NOT_AVAILABLE
    import pytest

    os.dup2(2, 1)  # rows alone go to stdout
    os.chdir(ROOT)
    options = ["-k", args.k] if args.k else []
    if args.n and not args.rehearse and importlib.util.find_spec("xdist"):
        options += ["-n", str(args.n), "--dist", "worksteal"]
    paths = ["tests/test_layers.py"] if args.rehearse else args.paths
    status = int(pytest.main([*([] if args.rehearse else options), *paths], plugins=[Rows(rows)]))
    return 0 if status == 5 else status  # no test was collected


if __name__ == "__main__":
    sys.exit(main())
