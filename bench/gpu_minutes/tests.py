"""pytest, with a row for each test as it ends: as many as time allows."""

import argparse
import importlib.util
import os
from contextlib import redirect_stdout
from typing import Any

from common.light import NOT_AVAILABLE, emit
from gpu_minutes.processes import ROOT


class Rows:
    """A plugin of pytest that prints a row for every test, failures with their reason."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take the report of one phase of a test."""
        if report.when != "call" and report.outcome == "passed":
            return
        row = {"what": "test", "name": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            row["error"] = (crash.message if crash else str(report.longrepr)).strip().partition("\n")[0][:300]
        with redirect_stdout(self.stream):
            emit(**row)


def run(args: argparse.Namespace) -> int:
    """Run the step, in a rehearsal one small file; 77 where pytest is missing."""
    for package in ("pytest", "hypothesis"):
        if importlib.util.find_spec(package) is None:
            emit(what="test", reason=f"{package} is not installed")
            return NOT_AVAILABLE
    import pytest

    options = ["tests/test_layers.py"]
    if not args.rehearse:
        options = [*args.subjects, "-k", args.match]
        if args.jobs and importlib.util.find_spec("xdist"):
            options += ["-n", str(args.jobs), "--dist", "worksteal"]
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # rows alone go to stdout
    os.chdir(ROOT)
    status = int(pytest.main(options, plugins=[Rows(rows)]))
    return 0 if status == 5 else status  # no test was collected
