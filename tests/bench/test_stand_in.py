"""Under the driver that stands in for a GPU Triton compiles as for one, launches nothing, and is itself again after."""

import json
import os
import subprocess
import sys

import pytest
from bench_scripts import environment
from machine_code import stand_in

pytest.importorskip("triton", reason="Triton exists on Linux only")

# Kernels are interpreted in the process of the tests, and of an interpreted one nothing is compiled.
SCRIPT = """
import json, sys, torch, triton
from machine_code.stand_in import NotCompiled, StandIn, stand_in
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from fastwkv.kernels import launch, linear_scan, linear_scan_bwd, linear_scan_step, rwkv4_step, wkv, wkv_bwd, wkv_step
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

only = sys.argv[1]
with stand_in(compiles=lambda source, options: source.fn.__name__ == only) as device:
    value = torch.full((4, 64), -1.0)
    rwkv4_step.relu_squared_(value)
    rwkv4_step.add_gated_(value, value, value, 1.0)
unchanged = bool((value == -1).all())
compiled, other = device.kernels
source = ASTSource(compiled.source.fn, compiled.source.signature, compiled.source.constants, compiled.source.attrs)
alone = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=compiled.options)

try:
    with stand_in():
        raise KeyError
except KeyError:
    pass

tuned = triton.autotune([triton.Config({}, num_warps=n) for n in (1, 2)], key=[])(rwkv4_step._relu_squared_kernel)
with stand_in(compiles=False) as tuner:
    tuned[(1,)](value, 256, BLOCK=256, ACC=triton.language.float32)
print(json.dumps({
    "found": found, "same": same, "after an error": state() == before, "unchanged": unchanged,
    "target": compiled.compiled.metadata.target.arch, "hash": compiled.compiled.hash, "alone": alone.hash,
    "cubin": len(compiled.compiled.asm["cubin"]), "other": isinstance(other.compiled, NotCompiled),
    "tuned": sorted(kernel.options["num_warps"] for kernel in tuner.kernels),
}))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a process of its own has seen."""
    surroundings = environment() | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    command = [sys.executable, "-c", SCRIPT, "_relu_squared_kernel"]
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_kind_of_launch_asks_for_its_kernels_once(seen):
    assert seen["found"]["wkv_fwd"] == ["_wkv_fwd_kernel", "_wkv_carry_kernel", "_wkv_fwd_kernel"]
    assert seen["found"]["relu"] == ["_relu_squared_kernel"]
    for name, kernels in seen["found"].items():
        sums = name == "wkv_bwd"  # of the gradients of w and u, over the chunks
        assert len(kernels) == (1 if name in ("relu", "wkv_step", "scan_step") else 3 + sums), (name, kernels)


def test_kernel_is_compiled_for_the_gpu_under_the_key_that_triton_gives_it(seen):
    assert seen["target"] == 90
    assert seen["cubin"] > 1000
    assert seen["hash"] == seen["alone"]


def test_nothing_runs(seen):
    assert seen["unchanged"]


def test_chosen_kernels_alone_are_compiled(seen):
    assert seen["other"]


def test_all_configurations_of_an_autotuner_are_compiled(seen):
    assert seen["tuned"] == [1, 2]


def test_all_is_as_before_afterwards(seen):
    assert seen["same"]
    assert seen["after an error"]


def test_interpreted_kernels_are_refused():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled where there is a GPU")
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"), stand_in.stand_in():
        pass
