"""Every kernel compiles for every target and dtype, and keeps its values in registers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "compiled.py"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def rows():
    pytest.importorskip("triton", reason="Triton exists on Linux only")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, cwd=SCRIPT.parents[1], timeout=880
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    pattern = re.compile(r"(\S.*?) +(float\d+|bfloat16) +(\S+) +(\d+) +(\d+) +(\d+) +([\d.]+) +([\d.]+)$", re.MULTILINE)
    return {row[:3]: tuple(map(float, row[3:])) for row in pattern.findall(done.stdout)}


@pytest.mark.timeout(900)
def test_no_kernel_spills_registers(rows):
    assert {key: row for key, row in rows.items() if row[1]} == {}


@pytest.mark.timeout(900)
def test_every_kernel_is_there_for_every_target_and_dtype(rows):
    kernels = {kernel for kernel, _, _ in rows}
    assert {"forward", "forward, packed", "backward", "backward, packed", "step"} <= kernels
    for kernel in kernels - {"forward, carry", "backward, carry"}:  # which know the accumulation dtypes only
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            assert all((kernel, dtype, target) in rows for target in TARGETS), (kernel, dtype)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_token_costs_two_exponentials_and_one_reciprocal_forward(rows, dtype, target):
    # A sixteenth more each for what is stored with a checkpoint.
    assert rows["forward", dtype, target][4] <= 3 + 2 / 16
    assert rows["backward", dtype, target][4] <= 4 + 1 + 4 / 16  # and half a forward step to reach the second half
