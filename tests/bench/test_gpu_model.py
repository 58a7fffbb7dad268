"""The model of a GPU: each of its terms alone, and what they make together."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_model import OPERATORS, Pass, kernel_terms, predict
from machine_code.costs import LOAD_CYCLES, Figures
from machine_code.devices import LAUNCH_SECONDS, Device
from peers.operator import GPU_SHAPES

from fastwkv.kernels.config import Launch

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_model.py"
DEVICE = Device(multiprocessors=100, clock=1e9, copy_bandwidth=1e12, latency=LOAD_CYCLES / 1e9)
FORWARD = Pass(elements=3, finish="finish", summary="summary", summary_numbers=12, launches=(0, 3))
KERNEL = Figures(
    kernel="finish", dtype="float32", target="sm_90", num_warps=1, block_c=64, registers=64, spilled_bytes=0,
    shared_bytes=0, instructions=12.8, special=3, loads={8: 2}, stores={8: 1}, loaded=8, stored=4, warps=32,
    clocks=0.1, unit="issue", cycles=50, waiting=200,
)  # fmt: skip
SUMMARY = replace(KERNEL, kernel="summary", stored=0)
FREE = replace(KERNEL, clocks=0, cycles=0, waiting=0)  # costs nothing but its bytes
WHOLE = Launch(64, 1, 1024)


def prediction(shape=(100, 1024, 640), kernel=KERNEL, launch=WHOLE, device=DEVICE, which=FORWARD):
    return predict(which, shape, 4, launch, {"finish": kernel, "summary": SUMMARY}, device)


def test_a_kernel_that_only_moves_the_compulsory_bytes_reaches_the_copy_bandwidth():
    found = prediction(kernel=FREE)
    assert found.fraction == pytest.approx(1)
    assert found.limit == "memory"
    assert found.moved == 100 * 1024 * 640 * 12


def test_saved_state_costs_its_share_and_half_the_bandwidth_twice_the_time():
    assert prediction(kernel=replace(FREE, stored=4.75)).fraction == pytest.approx(12 / 12.75)
    half = prediction(kernel=FREE, device=replace(DEVICE, copy_bandwidth=5e11))
    assert half.total == pytest.approx(2 * prediction(kernel=FREE).total)
    assert half.fraction == pytest.approx(1)


def test_terms_are_those_of_the_formulas():
    terms = kernel_terms(KERNEL, programs=1000, tokens=512, moved=1e9, device=DEVICE)
    assert terms.memory == pytest.approx(1e-3)
    assert terms.units == pytest.approx(10 * 512 * 64 * 0.1 / 1e9)
    assert terms.chain == pytest.approx(512 * 50 / 1e9)
    assert terms.latency == pytest.approx(512 * 200 / 1e9)
    assert terms.total == terms.memory


def test_complex_states_take_twice_as_much_between_chunks():
    launch, kernels = Launch(64, 1, 512), {"finish": FREE, "summary": SUMMARY}
    real, pair = (predict(FORWARD, (100, 1024, 640), 4, launch, kernels, DEVICE, size) for size in (4, 8))
    assert pair.moved - real.moved == 12 * 4 * 100 * 2 * 640


def test_one_more_program_than_fits_takes_another_round():
    fits, more = (kernel_terms(KERNEL, programs, 512, 0, DEVICE) for programs in (100 * 32, 100 * 32 + 1))
    assert more.latency == 2 * fits.latency
    assert more.units == pytest.approx(fits.units * 33 / 32)


def test_loads_that_answer_at_once_leave_the_chain():
    terms = kernel_terms(KERNEL, 1000, 512, 0, replace(DEVICE, latency=0))
    assert terms.latency == terms.chain


def test_a_slow_unit_limits_whatever_the_memory():
    slow = prediction(kernel=replace(KERNEL, clocks=10))
    assert slow.limit == "units"
    fast = replace(DEVICE, copy_bandwidth=2e12)
    assert prediction(kernel=replace(KERNEL, clocks=10), device=fast).total == slow.total


def test_few_warps_are_limited_by_what_one_of_them_takes():
    few = prediction(shape=(1, 65536, 64), launch=Launch(64, 1, 65536))
    assert few.warps == 1 / 100
    assert few.limit == "latency"
    assert few.total == pytest.approx(65536 * 200 / 1e9)
    assert prediction((1, 65536, 64), replace(KERNEL, waiting=60), Launch(64, 1, 65536)).limit == "chain"


def test_time_in_chunks_costs_another_pass_and_launches():
    chunked = prediction(launch=Launch(64, 1, 512), kernel=FREE)
    assert chunked.chunks == 2
    assert len(chunked.kernels) == 2
    assert chunked.launches == 3 * LAUNCH_SECONDS
    assert prediction(launch=Launch(64, 1, 512), device=replace(DEVICE, launch=1e-6)).launches == pytest.approx(3e-6)
    assert chunked.carry > 0
    assert chunked.total == sum(kernel.total for kernel in chunked.kernels) + chunked.carry + chunked.launches
    summaries = 12 * 4 * 100 * 2 * 640
    assert chunked.moved == 100 * 1024 * 640 * (12 + 8 / 2) + summaries  # one chunk of two is summarised


def test_command_line_predicts_every_pass_and_says_that_it_predicts(tmp_path):
    pytest.importorskip("triton", reason="Triton exists on Linux only")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    command = [sys.executable, SCRIPT, "--ops", "linear_scan_fixed", "--dtypes", "float32"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    first, source, _, *lines = done.stdout.partition("\n\nwrote")[0].strip().splitlines()
    assert "Predictions" in first
    assert source.startswith("h200: assumed multiprocessors 132, clock 1.755e+09")
    record = json.loads((tmp_path / "gpu_model.json").read_text())
    assert record["device"] == {"type": "none", "name": "computed, nothing measured"}
    assert (record["settings"]["target"], list(record["settings"]["assumed"])) == ("sm_90", ["h200"])
    rows = record["rows"]
    assert [(row["B"], row["T"], row["C"], row["pass"]) for row in rows] == [
        (*shape, which) for shape in GPU_SHAPES for which in OPERATORS["linear_scan_fixed"].passes
    ]
    assert [line.split()[-2] for line in lines] == [f"{row['fraction']:.2f}" for row in rows]
    assert all(0 < row["fraction"] <= 1 for row in rows)
