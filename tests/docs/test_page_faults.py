"""The program that measures page faults, in its shortest form."""

import json
import os
import platform
import subprocess
import sys

import pages
import pytest

PROGRAM = str(pages.ROOT / "docs/tools/page_faults.py")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_every_setting_is_measured_and_fresh_memory_costs_page_faults(tmp_path):
    options = ["--rounds", "1", "--repeats", "3", "--calls", "scan, 34 MB", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(pages.ROOT)}
    done = subprocess.run([sys.executable, PROGRAM, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "page_faults.json").read_text())
    faults = {row["setting"]: row["faults"] for row in record["rows"]}
    assert list(faults) == ["default", "top pad", "thresholds", "no mmap"]
    # By default glibc maps results beyond 32 MB anew at every call. How many pages a fault brings, and what other
    # settings save, depends on the kernel and on what else the machine does: the program tells, a test cannot.
    assert faults["default"] > 0
    assert all(row["ms"] > 0 and row["faults"] >= 0 for row in record["rows"])
