"""The host's time of a call: every row is there, beside PyTorch's own. No time is asserted."""

import json

import pytest
from bench_scripts import run_script

pytest.importorskip("triton")

import host


def test_every_call_has_a_row(tmp_path):
    # In a process of its own: kernels are interpreted here.
    arguments = ["--device", "cpu", "--rounds", "1", "--times", "2", "--out", str(tmp_path)]
    done = run_script("host.py", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {(row["call"], row["pass"]): row for row in json.loads((tmp_path / "host.json").read_text())["rows"]}
    passes = "forward", "forward, to be differentiated", "forward and backward"
    operators = [f"{name}, {form}" for name in ("wkv", "linear_scan", "linear_scan, a fixed") for form in host.SHAPES]
    functions = [f"autograd.Function {how}" for how in ("with setup_context", "without")]
    assert rows.keys() == {
        *((name, how) for name in operators for how in passes),
        *((name, how) for name in functions for how in passes[1:]),
        *(("torch.ops", how) for how in ("forward", "backward")),
        ("torch.ops, allocating its results", "forward"),
        ("wkv_step", "forward"),
        ("linear_scan_step", "forward"),
        ("launch of a kernel, Triton's", ""),
        ("launch of a kernel, held", ""),
    }
    assert all(row["us"] > 0 for row in rows.values())
    assert all(f"| {what} " in done.stdout for what, _ in rows)


def test_time_of_empty_operators_is_taken_off():
    timed = [(*name, None) for name in (("torch.ops", "forward"), ("torch.ops", "backward"))]
    timed += [("wkv", "forward", None), ("wkv", "forward and backward", None), ("launch", "", None)]
    taken = [2.0, 3.0, 10.0, 30.0, 1.0]
    found = {(row["call"], row["pass"]): row["beyond_torch_ops_us"] for row in host.rows(timed, taken)}
    assert [found["wkv", "forward"], found["wkv", "forward and backward"], found["launch", ""]] == [8.0, 25.0, None]


def test_each_call_is_timed_in_every_round():
    calls = []
    timed = [(str(i), "", lambda i=i: calls.append(i)) for i in range(2)]
    taken = host.microseconds(timed, rounds=2, times=3)
    assert calls == [0, 0, 0, 0, 1, 1, 1, 1] * 2  # the first of each is not timed
    assert len(taken) == 2
    assert all(time >= 0 for time in taken)
