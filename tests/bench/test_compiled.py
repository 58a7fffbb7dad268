"""Every kernel compiles for every target and dtype, keeps its values in registers, and wastes no instructions.

The committed tables hold every kernel and dtype for the machines with GPUs, by two versions of Triton. Here one of each
kernel is compiled anew, and those that do the work in more dtypes and for more targets; the table of this version has
to say the same of them.
"""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")
from bench_scripts import ROOT, environment
from filelock import FileLock
from machine_code.costs import LANES

SCRIPT = ROOT / "bench" / "compiled.py"
COMPUTED = ROOT / "bench" / "results" / "computed"
VERSION = ".".join(metadata.version("triton").split(".")[:2])  # what is compiled depends on it
EVERY = ["float32", "bfloat16", "float64", "complex64", "complex128", "bfloat16x2"]
BOTH = ["bfloat16", "float32"]
NVIDIA = ["sm_80", "sm_90", "sm_100"]
WORK = "(wkv|scan) (forward|backward)"
PARTS = [
    ("sm_90", ["bfloat16"], ".*"),
    ("sm_90", ["float64"], f"{WORK}, packed"),  # the most registers
    ("sm_90", ["float32", "complex64"], WORK),
    ("sm_80,sm_100", ["bfloat16"], f"{WORK}|scan forward, fixed a"),
    ("gfx942", ["bfloat16"], "wkv (forward|backward)"),
]

pytestmark = pytest.mark.timeout(6 * 3600)  # against hangs alone


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what was printed and the record that was written, for each of PARTS."""
    folder = tmp_path_factory.getbasetemp()
    found = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled_parts.json"
    with FileLock(f"{found}.lock"):  # whichever process is first compiles for all
        if not found.exists():
            found.write_text(json.dumps([compiled_part(*part, found.parent) for part in PARTS]))
    return json.loads(found.read_text())


def compiled_part(target, dtypes, kernels, folder):
    """Return the table and the record of some dtypes and kernels."""
    chosen = ["--targets", target, "--dtypes", ",".join(dtypes), "--kernels", kernels, "--jobs", "2"]
    command = [sys.executable, SCRIPT, *chosen, "--out", folder]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout, json.loads((folder / f"compiled-triton-{VERSION}.json").read_text())


def by_kernel(record):
    """Return the figures of a record by kernel, dtype and target."""
    return {(row["kernel"], row["dtype"], row["target"]): row for row in record["rows"]}


def committed(version):
    """Return the committed figures of a version of Triton."""
    record = json.loads((COMPUTED / f"compiled-triton-{version}.json").read_text())
    assert record["versions"]["triton"].startswith(f"{version}.")
    return by_kernel(record)


@pytest.fixture(scope="module")
def fresh(results):
    """Return what was compiled anew."""
    return {key: row for _, record in results for key, row in by_kernel(record).items()}


@pytest.fixture(scope="module", params=["3.6", "3.9", "fresh"])  # of the machines with GPUs, of this environment
def rows(request, fresh):
    """Return the figures of a committed table, or the fresh ones."""
    return fresh if request.param == "fresh" else committed(request.param)


def of(rows, kernel, dtype, targets=NVIDIA):
    """Return the rows of a kernel, of all targets that there are."""
    return [row for (name, kind, target), row in rows.items() if (name, kind) == (kernel, dtype) and target in targets]


def test_committed_table_of_this_version_is_of_these_kernels(fresh):
    if not (COMPUTED / f"compiled-triton-{VERSION}.json").exists():
        pytest.skip(f"no table of Triton {VERSION} is committed")
    table = committed(VERSION)
    for key in (key for key in fresh if key[2] == "sm_90"):
        for figure in ("registers", "instructions", "special", "waiting"):
            assert table[key][figure] == fresh[key][figure], (key, figure)


def test_results_are_of_targets_and_of_no_device(results):
    for (target, dtypes, kernels), (table, record) in zip(PARTS, results, strict=True):
        assert record["benchmark"] == "compiled"
        assert record["device"] == {"type": "none", "name": "computed, nothing measured"}
        assert (record["settings"]["targets"], record["settings"]["dtypes"]) == (target.split(","), dtypes)
        assert record["settings"]["kernels"] == kernels
        _, _, *lines, _, _ = table.strip().splitlines()  # a head of two; nothing, and what was written
        assert len(lines) == len(record["rows"]) > 0
        for line, row in zip(lines, record["rows"], strict=True):
            assert line.removeprefix(row["kernel"]).split()[:2] == [row["dtype"], row["target"]]
            assert row["spilled_bytes"] == 0, line


@pytest.mark.parametrize("version", ["3.6", "3.9"])
def test_every_kernel_is_there_for_every_dtype_and_none_spills(version, results):
    rows = committed(version)
    assert not any(row["spilled_bytes"] for row in rows.values())
    kernels = {kernel for kernel, _, _ in by_kernel(results[0][1])}
    for operator in ("wkv", "scan"):
        passes = ("forward", "forward, packed", "forward, summary", "backward", "backward, packed", "step")
        assert {f"{operator} {name}" for name in passes} <= kernels
    for kernel in kernels:
        if kernel.endswith("carry") or kernel in ("packed edges", "idle rows", "sums of rows"):
            assert (kernel, "float32", "sm_90") in rows  # they know no dtype of the model
            continue
        for dtype in EVERY:
            complex_too = kernel.startswith("scan") and "log" not in kernel
            exists = complex_too or not dtype.startswith(("complex", "bfloat16x2"))
            assert ((kernel, dtype, "sm_90") in rows) == exists, (kernel, dtype)


@pytest.mark.parametrize("dtype", BOTH)
def test_a_token_of_wkv_costs_two_exponentials_and_one_reciprocal_forward(rows, dtype):
    for way, most in (("forward", 3), ("backward", 4)):
        for row in of(rows, f"wkv {way}", dtype, [*NVIDIA, "gfx942"]):
            assert row["special"] <= most + 2 / 16  # a sixteenth more each for a checkpoint, stored or loaded


def test_instructions_of_wkv_leave_time_for_the_memory_in_16_bits(rows):
    # 4.3 TB/s are 717e9 tokens of 6 bytes a second forward, 430e9 of 10 backward; 132 multiprocessors at 1.75 GHz
    # have 41 and 69 instructions a lane for each.
    for way, most in (("forward", 41), ("backward", 69)):
        assert all(row["instructions"] <= most for row in of(rows, f"wkv {way}", "bfloat16"))


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("kernel", ["wkv forward", "wkv backward"])
def test_a_warp_of_wkv_hardly_waits_for_memory(rows, kernel, dtype):
    # Tiles are on their way while two others are worked on: a load of 1400 clocks adds less than half to a row.
    assert all(row["waiting"] <= 1.5 * row["cycles"] for row in of(rows, kernel, dtype))


@pytest.mark.parametrize(("kernel", "numbers"), [("forward", 3), ("backward", 5)])
def test_the_scan_keeps_up_with_the_memory_where_one_chunk_fills_the_device(rows, kernel, numbers):
    # With B C = 16384 a multiprocessor has 124 channels, in four warps of one scheduler each. While it moves a row of
    # them at 18.6 bytes a clock, a warp must be done with its own, waiting included. 0.85 of the copy bandwidth is
    # asked.
    for dtype, size in {"bfloat16": 2, "float32": 4, "complex64": 8, "bfloat16x2": 4}.items():
        for name, moved in ((kernel, numbers), (f"{kernel}, fixed a", 1 + numbers // 2)):
            for row in of(rows, f"scan {name}", dtype):
                assert row["special"] == 0
                assert row["waiting"] <= moved * size * 124 / 18.6 / 0.85, (name, dtype, row["target"])


def test_instructions_of_the_scan_are_what_is_written(fresh):
    # 16 bits: a fused multiply-add and what brings three numbers to a lane and back. Exact sums are about 12 more, a
    # gate of its own digits 30.
    table = fresh | committed("3.9")
    most = {("forward", "bfloat16"): 12, ("forward, fixed a", "bfloat16"): 9, ("backward", "bfloat16"): 18}
    most |= {("forward", "float32"): 22, ("backward", "float32"): 29, ("forward, log a", "float32"): 52}
    for (kernel, dtype), count in most.items():
        assert all(row["instructions"] <= count for row in of(table, f"scan {kernel}", dtype)), kernel
    assert {row["special"] for row in of(table, "scan forward, log a", "bfloat16")} == {1}


@pytest.mark.parametrize("kernel", ["wkv forward", "wkv backward", "scan forward", "scan backward"])
@pytest.mark.parametrize("dtype", BOTH)
def test_programs_load_and_store_widely_and_fill_a_multiprocessor(rows, kernel, dtype):
    def usual(accesses):
        return int(max(accesses, key=lambda width: accesses[width]))

    for row in of(rows, kernel, dtype):
        assert usual(row["loads"]) == 16
        # In 16 bits two stores of y are fewer than the three of a saved state, a number a lane.
        assert usual(row["stores"]) >= (4 if (kernel, dtype) == ("wkv forward", "bfloat16") else 16)
        assert row["warps"] >= 8


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_the_main_loop_moves_what_it_has_to(rows, dtype, size):
    for row in of(rows, "wkv forward", dtype):
        assert 3 * size < row["loaded"] + row["stored"] <= 3 * size + 1.2  # and the saved state
    for kernel, numbers in (("forward", 3), ("forward, fixed a", 2), ("backward", 5), ("backward, fixed a", 3)):
        assert all(row["loaded"] + row["stored"] == numbers * size for row in of(rows, f"scan {kernel}", dtype))


def test_times_are_there_for_one_maker_and_agree_with_the_instructions(rows):
    for (_, _, target), row in rows.items():
        if target == "gfx942":
            assert {row[name] for name in ("warps", "clocks", "unit", "cycles", "waiting")} == {None}
            continue
        assert row["unit"] in LANES[target]
        assert row["clocks"] >= row["instructions"] / LANES[target]["issue"] - 1e-3
        assert row["cycles"] <= row["waiting"]


REFUSED = """
import sys, compiled
for arguments in (["--kernels", "("], ["--kernels", "wkv step", "--dtypes", "complex64"]):
    sys.argv = ["compiled.py", *arguments]
    try:
        compiled.main()
    except SystemExit as stopped:
        print(stopped.code)
"""


def test_bad_command_lines_are_refused(tmp_path):
    command = [sys.executable, "-c", REFUSED]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "2\n2\n"
    first, second = done.stderr.splitlines()
    assert first.startswith("compiled.py: argument --kernels: expected a regular expression, got '('")
    assert second.startswith("compiled.py: nothing to compile")
    assert not list(tmp_path.iterdir())
