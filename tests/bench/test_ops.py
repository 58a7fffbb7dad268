"""The operator benchmark: its rows, which results it believes, and how it fails."""

import itertools
import json
import math
from operator import itemgetter

import pytest
import torch
from bench_scripts import interrupt
from simulated_gpu import Immediate

for package in ("matplotlib", "tqdm", "transformers"):
    pytest.importorskip(package)

import ops
from peers import linear_scan_providers, wkv_providers
from peers.operators import OPERATORS
from throughput import passes
from throughput import run as run_module
from timing import by_turns

WKV, SCAN = OPERATORS["wkv"], OPERATORS["linear_scan"]
HERE = {"fastwkv", "hf", "loop", "reference"}
ALL = ",".join(passes.PASSES)
# Bytes a token and channel: with e the size of a number, 3e, 5e, 8e, and for a step those of its state too.
BYTES = {
    ("wkv", "float32"): (12, 20, 32, 36),
    ("wkv", "bfloat16"): (6, 10, 16, 30),
    ("linear_scan", "complex64"): (24, 40, 64, 32),
    ("linear_scan", "bfloat16"): (6, 10, 16, 12),
    ("linear_scan_fixed", "complex64"): (16, 24, 40, 24),
}


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    monkeypatch.setattr(by_turns, "QUICK", by_turns.Effort(repeats=2, seconds=0.0, turn=0.0))
    monkeypatch.setattr(by_turns, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(ops.figure, "draw", lambda record, folder: [])  # takes long


def made(folder, *arguments):
    return ops.Ops(ops.Ops.parse(["--device", "cpu", "--quick", "--shapes", "2x8x5", "--out", str(folder), *arguments]))


def on_a_gpu(folder, *arguments):
    run = made(folder, "--ops", "wkv", *arguments)
    run.cuda, run.effort = Immediate(), by_turns.GPU_QUICK
    return run


def measured(run):
    status = run.run()
    return status, {(row["pass"], row["provider"]): row for row in run.rows}


def outcome(rows):
    return {key: (row["status"], row["reason"]) for key, row in rows.items()}


def test_program_writes_rows_and_tables(tmp_path, capsys):
    arguments = ["--device", "cpu", "--quick", "--shapes", "2x9x5", "--passes", ALL, "--out", str(tmp_path)]
    assert ops.main([*arguments, "--dtypes", "float32,complex64,bfloat16"]) == 0
    printed = capsys.readouterr().out
    for text in ("\nwkv\n", "\nlinear_scan\n", "times ours", "target", "fla, rwkv-cuda: not available", "in short"):
        assert text in printed
    record = json.loads((tmp_path / "ops.json").read_text())
    rows = record["rows"]
    assert len({tuple(row) for row in rows}) == 1  # the same keys
    for (op, dtype), sizes in BYTES.items():
        here = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
        assert len(here) == 4 * len(OPERATORS[op].all_providers())
        by_pass = dict(zip(passes.PASSES, sizes, strict=True))
        for row in (row for row in here if row["status"] == "ok"):
            assert (row["B"], row["T"], row["C"]) == (2, 1 if row["pass"] == "step" else 9, 5)
            assert row["gbps"] == pytest.approx(by_pass[row["pass"]] * 2 * row["T"] * 5 / row["ms"] / 1e6, rel=1e-3)
    for row in rows:
        if row["status"] != "ok":
            assert row["status"] == "unavailable", row
            continue
        assert 0 < row["error"] == max(row["errors"].values()) < (1e-5 if row["dtype"] != "bfloat16" else 3e-2)
        assert row["fraction"] == pytest.approx(row["gbps"] / 10.0, rel=1e-3)
        assert row["ms_min"] <= row["quantiles"]["0.1"] <= row["ms"] <= row["quantiles"]["0.9"]
        assert row["repeats"] >= 2
        assert (row["saved_bytes"] is None) == ("backward" not in row["pass"])
        assert [row[key] for key in ("packed", "ms_host", "peak_bytes", "head_start")] == [None] * 4
    ok = {(row["op"], row["provider"], row["pass"]) for row in rows if row["status"] == "ok"}
    always = ("fastwkv", "loop", "reference")
    assert set(itertools.product(OPERATORS, always, passes.PASSES)) | {("wkv", "hf", "step")} <= ok
    reasons = {"runs on a GPU only", "has no step", "not installed"}
    reasons |= {"takes a multiplier of every token only", "takes real numbers only"}
    assert {row["reason"] for row in rows if row["status"] == "unavailable"} <= reasons


class Wrong(wkv_providers.Loop):
    """The loop, with one of its results changed."""

    name = "loop"

    def __init__(self, result, factor=1.01):
        self.result, self.factor = result, factor

    def wkv(self, decay, u, k, v, state):
        if self.result == "gw":
            decay = decay.detach() + self.factor * (decay - decay.detach())
        y = super().wkv(decay, u, k, v, state)
        return y * self.factor if self.result == "y" else y

    def step(self, *arguments):
        y, (num, den, top) = super().step(*arguments)
        return y, (num, den * self.factor if self.result == "state" else den, top)


class Unconjugated(linear_scan_providers.Loop):
    """The loop, whose gradient of a is that of its conjugate."""

    def scan(self, a, x, h0):
        return super().scan(torch.complex(a.real, 2 * a.imag.detach() - a.imag), x, h0)


@pytest.mark.parametrize(
    ("operator", "provider", "worst"),
    [
        (WKV, Wrong("y"), {"forward": "y"}),
        (WKV, Wrong("y", math.nan), {"forward": "y"}),
        (WKV, Wrong("gw"), {"forward": None, "backward": "gw", "forward+backward": "gw"}),
        (WKV, Wrong("state"), {"step": "mean"}),
        (SCAN, Unconjugated(), {"forward": None, "backward": "ga", "step": None}),
    ],
    ids=["y", "NaN", "gw", "state", "conjugate"],
)
def test_wrong_result_is_reported_and_not_timed(operator, provider, worst, tmp_path, monkeypatch):
    monkeypatch.setitem(operator.providers, "loop", provider)
    run = made(tmp_path, "--ops", operator.name, "--passes", ",".join(worst), "--providers", "fastwkv,loop")
    status, rows = measured(run)
    assert status == 0
    for which, name in worst.items():
        assert rows[which, "fastwkv"]["status"] == "ok"
        row = rows[which, "loop"]
        assert row["status"] == ("wrong" if name else "ok")
        if name:
            assert row["reason"].startswith(f"error of {name} ")
            assert (row["ms"], row["repeats"]) == (None, None)
    assert "WRONG" in ops.Ops.table(run.record())


def test_wrong_result_of_this_package_ends_with_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(WKV.providers, "fastwkv", Wrong("y", math.nan))
    arguments = ["--ops", "wkv", "--device", "cpu", "--quick", "--shapes", "2x8x5", "--out", str(tmp_path)]
    assert ops.main([*arguments, "--passes", "forward", "--providers", "fastwkv"]) == 1
    assert "ops.py: fastwkv, wkv, forward, float32: wrong" in capsys.readouterr().err


def test_peer_in_another_precision_is_wrong_in_float64(tmp_path):
    _, rows = measured(made(tmp_path, "--ops", "wkv", "--dtypes", "float64", "--passes", "forward"))
    assert {name: rows["forward", name]["status"] for name in HERE} == dict.fromkeys(HERE, "ok") | {"hf": "wrong"}


class Failing(wkv_providers.Loop):
    def wkv(self, *arguments):
        raise torch.OutOfMemoryError("of 80 GiB\nnone is left")


@pytest.mark.parametrize("start", [made, on_a_gpu])
def test_provider_that_fails_is_a_row_and_the_others_go_on(start, tmp_path, monkeypatch):
    monkeypatch.setitem(WKV.providers, "loop", Failing())
    run = start(tmp_path, "--ops", "wkv", "--passes", "forward,step", "--providers", "fastwkv,loop,reference")
    status, rows = measured(run)
    assert status == 0
    failed = rows.pop(("forward", "loop"))
    assert (failed["status"], failed["reason"]) == ("failed", "OutOfMemoryError: of 80 GiB")
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert "loop, forward, 2, 8, 5, float32: failed, OutOfMemoryError: of 80 GiB" in ops.Ops.table(run.record())


def test_interrupt_keeps_the_passes_that_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(wkv_providers.Reference, "step", interrupt)
    arguments = ["--ops", "wkv", "--device", "cpu", "--quick", "--shapes", "2x8x5", "--out", str(tmp_path)]
    assert ops.main([*arguments, "--passes", "forward,step", "--providers", "fastwkv,reference"]) == 130
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    assert [(row["pass"], row["provider"]) for row in rows] == [("forward", "fastwkv"), ("forward", "reference")]


def test_of_large_inputs_a_sample_of_channels_is_compared(tmp_path, monkeypatch):
    inputs = WKV.draw("ordinary", (2, 8, 5), torch.float32, 0)
    for elements in (32, 40):
        monkeypatch.setitem(passes.CHECKED, "cpu", elements)
        assert passes.checked_channels(inputs) == slice(None, None, 3)  # an even step would leave all odd ones out
    _, rows = measured(made(tmp_path, "--ops", "wkv", "--providers", "fastwkv,loop"))
    assert {row["status"] for row in rows.values()} == {"ok"}


def test_beyond_the_longest_loop_the_reference_is_our_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(type(WKV), "expected", lambda self, inputs, *, state, own: asked.append(own))
    run = made(tmp_path, "--ops", "wkv", "--shapes", "1x8193x1,1x8192x1", "--passes", "forward")
    for case in run.args.cases:
        run._expected(case, case.draw(0, torch.device("cpu")))
    assert asked == [True, False]


def test_rows_of_a_gpu_tell_device_time_host_time_and_memory(tmp_path, capsys):
    run = on_a_gpu(tmp_path, "--passes", ALL)
    status, rows = measured(run)
    assert status == 0
    assert " s  wkv [2, 8, 5] float32\n" in capsys.readouterr().err  # where no bar is shown
    ok = [row for row in rows.values() if row["status"] == "ok"]
    assert {row["provider"] for row in ok} == HERE
    for row in ok:
        assert row["ms"] > 0
        assert row["ms_host"] >= 0
        assert (row["peak_bytes"], row["head_start"]) == (42, False)
        ours_alone = (row["pass"], row["provider"]) == ("step", "fastwkv")
        assert (row["ms_graph"] or 0) == (pytest.approx(2.1e-4, rel=0.01) if ours_alone else 0)  # of 21 µs a hundredth


def test_cases_and_providers_after_the_deadline_are_left_out(tmp_path, monkeypatch):
    class Slow(wkv_providers.Loop):
        def wkv(self, *arguments):
            run.deadline = -math.inf
            return super().wkv(*arguments)

    monkeypatch.setitem(WKV.providers, "loop", Slow())
    options = ["--passes", "forward", "--providers", "fastwkv,loop,reference", "--shapes", "2x8x5,1x8x5"]
    run = made(tmp_path, "--ops", "wkv", "--minutes", "1", *options)
    assert math.isfinite(run.deadline)
    assert run.run() == 0
    late = ("unavailable", "out of time")
    assert [(row["status"], row["reason"]) for row in run.rows] == [("ok", None)] * 2 + [late] * 4


def test_peer_whose_first_calls_take_long_is_not_asked_for_more(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "PATIENCE", 0.0)
    monkeypatch.setitem(WKV.providers, "hf", type("Failing", (Failing,), {"name": "hf"})())  # failures take time too
    _, rows = measured(on_a_gpu(tmp_path, "--passes", "forward,backward"))
    found = outcome(rows)
    assert found["forward", "loop"] == found["forward", "fastwkv"] == found["backward", "fastwkv"] == ("ok", None)
    assert found["forward", "hf"][0] == "failed"
    for name in ("hf", "loop"):
        assert found["backward", name][1].startswith("its first calls took")
    named = measured(on_a_gpu(tmp_path, "--passes", "forward,backward", "--providers", "fastwkv,loop"))[1]
    assert {row["status"] for row in named.values()} == {"ok"}


def test_failure_while_it_is_timed_is_a_row(tmp_path, monkeypatch):
    class Later(wkv_providers.Loop):
        calls = itertools.count()

        def wkv(self, *arguments):
            return super().wkv(*arguments) if next(self.calls) < 2 else interrupted_device()

    def interrupted_device():
        raise RuntimeError("too late")

    monkeypatch.setitem(WKV.providers, "loop", Later())
    _, rows = measured(on_a_gpu(tmp_path, "--passes", "forward", "--providers", "fastwkv,loop"))
    assert outcome(rows) == {
        ("forward", "fastwkv"): ("ok", None),
        ("forward", "loop"): ("failed", "RuntimeError: too late"),
    }


def test_lost_device_ends_the_run_with_what_was_measured(tmp_path, monkeypatch, capsys):
    class Losing(wkv_providers.Loop):
        def step(self, *arguments):
            if len(run.rows) == 3:  # those of the forward pass
                run.cuda.synchronize = lost
                lost()
            return super().step(*arguments)

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(WKV.providers, "loop", Losing())
    run = on_a_gpu(tmp_path, "--passes", "forward,step", "--providers", "fastwkv,loop,reference")
    status, rows = measured(run)
    assert status == 1
    ok = {("forward", name) for name in ("fastwkv", "loop", "reference")}
    assert {key for key, row in rows.items() if row["status"] == "ok"} == ok
    assert rows["step", "loop"]["status"] == "failed"
    assert ("step", "reference") not in rows
    assert "ops.py: the device is lost: loop, wkv, step: RuntimeError: CUDA error: an ill" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["draw", "expected"])
def test_inputs_or_reference_that_fail_are_rows(name, tmp_path, monkeypatch):
    def fail(self, *arguments, **options):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(type(WKV), name, fail)
    _, rows = measured(on_a_gpu(tmp_path, "--passes", "forward,backward", "--providers", "fastwkv,loop"))
    assert list(map(itemgetter("reason"), rows.values())) == ["OutOfMemoryError: too large"] * 4
