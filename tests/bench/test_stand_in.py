"""Under the driver that stands in for a GPU Triton compiles as for one, launches nothing, and is itself again after.

That kernels compiled so are those that Triton finds on a device is in test_precompile.py.
"""

import json
import os
import subprocess
import sys

import pytest
from bench_scripts import environment
from machine_code import stand_in

pytest.importorskip("triton", reason="Triton exists on Linux only")

# Kernels are interpreted in the process of the tests, and an interpreted one asks for nothing to be compiled.
SCRIPT = """
import json, torch, triton
from machine_code.stand_in import stand_in
from triton.runtime import driver
from fastwkv.kernels import launch, linear_scan, linear_scan_bwd, rwkv4_step, wkv, wkv_bwd, wkv_step
from fastwkv.kernels.config import Launch

B, T, C = 2, 64, 64
(w, u), k = torch.rand(2, C), torch.randn(B, T, C).bfloat16()
checkpoints = torch.empty(launch.checkpoint_shape(B, T, C, torch.float32))
x, h = torch.empty(B, C), torch.empty(B, T, C)
short = Launch(32, 1, 32)
calls = {
    "wkv_fwd": lambda: wkv.wkv_fwd(w, u, k, k, None, None, True, launch=short),
    "wkv_bwd": lambda: wkv_bwd.wkv_bwd(w, u, k, k, None, None, checkpoints, k, None, launch=short),
    "wkv_step": lambda: wkv_step.wkv_step(w, u, x, x, x, x, x),
    "scan_fwd": lambda: linear_scan.linear_scan_fwd(h, h, None, None, False, False, launch=short),
    "scan_bwd": lambda: linear_scan_bwd.linear_scan_bwd(h, h, None, None, False, False, h, None, h.dtype, launch=short),
    "scan_step": lambda: linear_scan.linear_scan_step(x, x, x, False),
    "relu": lambda: rwkv4_step.relu_squared_(x),
}

def state():
    return getattr(driver, "_active", None), triton.compiler.compile, launch._multiprocessors

before, found = state(), {}
for name, call in calls.items():
    with stand_in(compiles=False) as device:
        call(), call()
        assert launch._multiprocessors(x) == 132
    found[name] = [kernel.name for kernel in device.kernels]
same = state() == before

value = torch.full((4, 64), -1.0)
try:
    with stand_in(compiles=False):
        rwkv4_step.relu_squared_(value)
        raise KeyError
except KeyError:
    pass
print(json.dumps({
    "found": found, "same": same, "after an error": state() == before, "unchanged": bool((value == -1).all()),
}))
"""


@pytest.fixture(scope="module")
def seen():
    """Return the findings of a process of its own."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_kind_of_launch_asks_for_its_kernels_once(seen):
    assert seen["found"]["wkv_fwd"] == ["_wkv_fwd_kernel", "_wkv_carry_kernel", "_wkv_fwd_kernel"]
    assert seen["found"]["relu"] == ["_relu_squared_kernel"]
    for name, kernels in seen["found"].items():
        sums = name == "wkv_bwd"  # of the gradients of w and u, over the chunks
        assert len(kernels) == (1 if name in ("relu", "wkv_step", "scan_step") else 3 + sums), (name, kernels)


def test_nothing_runs_and_all_is_as_before_afterwards(seen):
    assert seen["unchanged"]
    assert seen["same"]
    assert seen["after an error"]


def test_interpreted_kernels_are_refused():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled where there is a GPU")
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"), stand_in.stand_in():
        pass
