"""Launches of compiled kernels, held under a key of our own: as right as Triton's, and past all of its work.

Here kernels are interpreted: what is compiled is asked in a process of its own, under a driver that runs nothing.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_scripts import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

SCRIPT = Path(__file__).parents[1] / "support" / "compiled_launches.py"


def ask(what):
    command = [sys.executable, "-W", "ignore", str(SCRIPT), what]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_launches_of_one_key_are_launches_of_one_of_tritons_keys():
    # Dtypes, alignment, None, integers around all that Triton looks at, constants, options, devices.
    found = ask("keys")
    assert found["wrong"] == []
    assert found["kernels of a key"] == 1
    assert found["past Triton"] == found["calls"] > 500
    assert found["kernels"] > 200  # a key of everything would be right, and no launch a second one
    assert found["keys"] < 2 * found["kernels"]


def test_new_length_asks_for_no_new_kernel():
    assert ask("lengths") == {}


def test_unusual_modes_are_left_to_triton():
    found = ask("left_to_triton")
    assert found.pop("held") == found.pop("held again") == 0
    assert set(found.values()) == {1}
    assert len(found) == 7


def test_launch_is_in_the_stream_of_the_device_of_its_tensors():
    *seen, kernels = ask("devices")
    assert seen == [[101, 0], [101, 0], [100, 0], [100, 0], [101, 0]]  # stream; then the current device is as before
    assert kernels == 2


def test_second_call_enters_nothing_of_tritons():
    found = ask("calls")
    assert set(found.pop("first calls")) >= {"_wkv_fwd_kernel", "_wkv_bwd_kernel", "_linear_scan_bwd_kernel"}
    assert list(found.values()) == [[]] * 6
