"""Every kernel compiles for every target and dtype, and keeps its values in registers."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "compiled.py"
ALL = ("float32", "bfloat16", "float16", "float64", "complex64", "complex128")
# The whole table takes six minutes on two cores: `make compiled`. Here one target has every dtype.
PARTS = {("sm_90",): ALL, ("sm_80", "sm_100", "gfx942"): ("bfloat16", "float32", "complex64")}
CASES = [(dtype, target) for targets, dtypes in PARTS.items() for target in targets for dtype in dtypes]

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("compiled")]  # that share what was compiled


@pytest.fixture(scope="module")
def rows():
    pytest.importorskip("triton", reason="Triton exists on Linux only")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    found = {}
    for targets, dtypes in PARTS.items():
        command = [sys.executable, SCRIPT, "--targets", ",".join(targets), "--dtypes", ",".join(dtypes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=880)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        pattern = r"(\S.*?) +((?:float|bfloat|complex)\d+) +(\S+) +(\d+) +(\d+) +(\d+) +([\d.]+) +([\d.]+)$"
        found |= {row[:3]: tuple(map(float, row[3:])) for row in re.findall(pattern, done.stdout, re.MULTILINE)}
    return found


def test_no_kernel_spills_registers(rows):
    assert {key: row for key, row in rows.items() if row[1]} == {}


def test_every_kernel_is_there_for_every_target_and_dtype(rows):
    kernels = {kernel for kernel, _, _ in rows}
    for operator in ("wkv", "scan"):
        passes = ("forward", "forward, packed", "forward, summary", "backward", "backward, packed", "step")
        assert {f"{operator} {name}" for name in passes} <= kernels
    for kernel in kernels:
        if kernel.endswith("carry"):  # which know the accumulation dtypes only
            continue
        for dtype, target in CASES:
            exists = not dtype.startswith("complex") or (kernel.startswith("scan") and "log" not in kernel)
            assert ((kernel, dtype, target) in rows) == exists, (kernel, dtype, target)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_costs_two_exponentials_and_one_reciprocal_forward(rows, dtype, target):
    # A sixteenth more each for what is stored with a checkpoint.
    assert rows["wkv forward", dtype, target][4] <= 3 + 2 / 16
    assert rows["wkv backward", dtype, target][4] <= 4 + 1 + 4 / 16  # and half a step to reach the second half


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_token_of_the_scan_costs_what_is_written(rows, target):
    # Three of a, x and h in 16 bits, their conversion and one fused multiply-add; exact sums in float32 about 12 more.
    assert rows["scan forward", "bfloat16", target][3] <= 8
    assert rows["scan forward", "float32", target][3] <= 16
    assert rows["scan backward", "float32", target][3] <= 20
    for dtype, kernel in itertools.product(("bfloat16", "float32", "complex64"), ("forward", "backward")):
        assert rows[f"scan {kernel}", dtype, target][4] == 0
    assert rows["scan forward, log a", "bfloat16", target][4] == 1
