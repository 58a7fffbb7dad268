"""Kernels that write over what they have read, as they are compiled: lanes wait for each other in between.

No interpreter shows it, which runs a program as one; what is compiled depends on sizes, dtypes and alignments.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from bench_scripts import ROOT, environment

SCRIPT = ROOT / "tests" / "support" / "in_place_ptx.py"
BARRIER = re.compile(r"\b(bar|barrier)(\.cta)?(\.warp)?\.sync\b")
ACCESS = re.compile(r"\b(ld|st)\.global\S*.*\[\s*(%\w+)")
POINTER = re.compile(r"ld\.param\.\w+\s+(%\w+),\s*\[\w+_param_(\d+)\]")
RESULT = re.compile(r"(?:@!?%\w+\s+)?[\w.]+\s+(%rd\d+),(.*)")


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="Triton exists on Linux only")
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def events(ptx: str) -> Iterator[tuple[str, int | None]]:
    """Return barriers, loads and stores in the order of the text, and the argument that each is a place of."""
    argument: dict[str, int] = {}
    for line in ptx.splitlines():
        if BARRIER.search(line):
            yield "barrier", None
        elif access := ACCESS.search(line):
            yield access[1], argument[access[2]]
        elif pointer := POINTER.search(line):
            argument[pointer[1]] = int(pointer[2])
        elif result := RESULT.match(line.strip()):
            sources = {argument[name] for name in re.findall(r"%rd\d+", result[2]) if name in argument}
            if sources:
                (argument[result[1]],) = sources  # no address is made of two


def test_nothing_is_written_before_every_lane_has_read(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        found = list(events(kernel["ptx"]))
        for stored, loaded in kernel["written"].values():
            last = max(at for at, event in enumerate(found) if event == ("ld", loaded))
            first = min(at for at, event in enumerate(found) if event == ("st", stored))
            assert ("barrier", None) in found[last:first], kernel["name"]


def test_all_are_compiled_for_every_alignment(kernels: list[dict[str, Any]]) -> None:
    names = [kernel["name"] for kernel in kernels]
    assert len(names) == len(set(names)) == 9 * 3 * 2
    widths = [re.findall(r"ld\.global\S*(v\d)", kernel["ptx"]) for kernel in kernels if "C=768" in kernel["name"]]
    assert any(widths)
    assert not all(widths)  # of those that are not aligned none reads more than a number
