"""The operator benchmark: what it writes, whom it believes, how it fails. Shown on WKV; the operators share it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import BAD_DEVICE, BAD_OPTION, bad_results, interrupt, run_script

PEERS = ("fastwkv", "hf", "loop", "reference")

for package in ("tqdm", "transformers"):
    pytest.importorskip(package)

import ops
from peers import provider as providers
from peers import wkv_inputs, wkv_providers
from throughput import passes, table
from timing import by_turns as timing

WKV = ops.OPERATORS["wkv"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "QUICK", timing.Effort(repeats=2, seconds=0.0, turn=0.0))
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(ops, "draw_all", lambda record, folder: [])


def run(folder: Path, *arguments: str) -> tuple[int, dict[tuple[str, str], dict[str, Any]]]:
    """Measure a tiny shape in this process; return the exit status and the rows by pass and provider."""
    tiny = ["--ops", "wkv", "--device", "cpu", "--quick", "--shapes", "2x8x5", "--out", str(folder)]
    status = ops.main([*tiny, *arguments])
    rows = json.loads((folder / "ops.json").read_text())["rows"]
    return status, {(row["pass"], row["provider"]): row for row in rows}


def test_command_line_writes_rows_and_prints_ratios(tmp_path: Path) -> None:
    arguments = ["--ops", "wkv,linear_scan", "--device", "cpu", "--quick", "--shapes", "2x9x5"]
    arguments += ["--passes", "forward,backward,forward+backward,step", "--out", str(tmp_path / "new")]
    done = run_script("ops.py", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = ["ops_linear_scan.png", "ops_wkv.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ops.json", *figures]
    for text in ("\nwkv\n", "\nlinear_scan\n", "times ours", "target", "fla, rwkv-cuda: not available", "GB/s"):
        assert text in done.stdout

    text = (tmp_path / "new" / "ops.json").read_text()
    assert str(tmp_path) not in text
    record = json.loads(text)
    assert record["device"].keys() >= {"type", "name", "threads"}
    assert {"python", "fastwkv", "torch", "transformers", "numba"} <= record["versions"].keys()
    assert {"commit", "started", "settings"} <= record.keys()
    assert record["copy_gbps"] > 0
    rows = {op: [row for row in record["rows"] if row["op"] == op] for op in ("wkv", "linear_scan")}
    assert {row["dtype"] for row in rows["linear_scan"]} == {"complex64"}
    assert len({tuple(row) for row in record["rows"]}) == 1  # the same keys
    assert len(rows["wkv"]) == 4 * 6
    for row in rows["wkv"]:
        assert row["dtype"] == "float32"
        B, T, C = 2, 1 if row["pass"] == "step" else 9, 5
        assert (row["B"], row["T"], row["C"]) == (B, T, C)
        assert [row[key] for key in ("packed", "ms_host", "peak_bytes", "head_start")] == [None] * 4
        if row["provider"] in ("fla", "rwkv-cuda"):
            assert (row["status"], row["reason"], row["ms"]) == ("unavailable", "runs on a GPU only", None)
            continue
        assert row["provider"] in PEERS
        assert row["status"] == "ok"
        assert 0 < row["error"] < 1e-5
        assert row["error"] == max(row["errors"].values())
        assert row["repeats"] >= 2
        assert row["ms_first"] > 0
        assert (row["saved_bytes"] is None) == ("backward" not in row["pass"])
        assert row["ms_min"] <= row["quantiles"]["0.1"] <= row["quantiles"]["0.25"] <= row["ms"]
        assert row["ms"] <= row["quantiles"]["0.75"] <= row["quantiles"]["0.9"]
        floats = {"forward": 3, "backward": 5, "forward+backward": 8, "step": 9}[row["pass"]]
        assert row["gbps"] == pytest.approx(4 * floats * B * T * C / row["ms"] / 1e6, rel=1e-3)
        assert row["fraction"] == pytest.approx(row["gbps"] / record["copy_gbps"], rel=1e-3)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes(dtype: str, tmp_path: Path) -> None:
    status, rows = run(tmp_path, "--dtypes", dtype)
    assert status == 0
    for (which, provider), row in rows.items():
        if provider in ("fastwkv", "loop", "reference"):
            assert row["status"] == "ok", (which, provider)
        elif provider == "hf" and dtype == "float64":
            assert row["status"] == "wrong"  # it computes in float32


class Wrong(wkv_providers.Loop):
    """The loop, with one of its results changed."""

    def __init__(self, name: str, result: str, factor: float = 1.01) -> None:
        self.name, self.result, self.factor = name, result, factor

    def wkv(self, decay, u, k, v, state):
        if self.result == "gw":
            decay = decay.detach() + self.factor * (decay - decay.detach())
        if self.result == "gk":
            k = k.detach() + self.factor * (k - k.detach())
        y = super().wkv(decay, u, k, v, state)
        return y * self.factor if self.result == "y" else y

    def step(self, *arguments):
        y, (num, den, top) = super().step(*arguments)
        return y, (num, den * self.factor if self.result == "state" else den, top)


@pytest.mark.parametrize(
    ("result", "which", "worst"),
    [("y", "forward", "y"), ("gw", "forward+backward", "gw"), ("gk", "backward", "gk"), ("state", "step", "mean")],
)
def test_wrong_result_is_reported_and_not_timed(
    result: str, which: str, worst: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(WKV.providers, "loop", Wrong("loop", result))
    status, rows = run(tmp_path, "--passes", which)
    assert status == 0
    row = rows[which, "loop"]
    assert (row["status"], row["ms"], row["repeats"]) == ("wrong", None, None)
    assert row["reason"].startswith(f"error of {worst}")
    assert row["error"] == pytest.approx(0.01, rel=0.5)
    assert all(rows[which, name]["status"] == "ok" for name in PEERS if name != "loop")
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert row["reason"] in printed


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_wrong_result_of_this_package_ends_with_status_1(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(WKV.providers, "fastwkv", Wrong("fastwkv", "y", factor))
    status, rows = run(tmp_path, "--passes", "forward")
    assert status == 1
    assert rows["forward", "fastwkv"]["status"] == "wrong"
    assert rows["forward", "loop"]["status"] == "ok"
    assert "ops.py: fastwkv, wkv, forward, float32: wrong" in capsys.readouterr().err


def test_failing_and_missing_providers_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    class Failing(wkv_providers.Loop):
        def wkv(self, *arguments):
            raise RuntimeError("no luck\nat all")

    monkeypatch.setitem(WKV.providers, "loop", Failing())
    monkeypatch.setattr(providers, "not_installed", lambda package: "not installed")
    status, rows = run(tmp_path, "--passes", "forward")
    assert status == 0
    outcome = {name: (row["status"], row["reason"]) for (_, name), row in rows.items()}
    assert outcome == {
        "fastwkv": ("ok", None),
        "hf": ("unavailable", "not installed"),
        "loop": ("failed", "RuntimeError: no luck"),
        "reference": ("ok", None),
        "fla": ("unavailable", "runs on a GPU only"),
        "rwkv-cuda": ("unavailable", "runs on a GPU only"),
    }
    printed = capsys.readouterr().out
    assert "hf: not available, not installed" in printed
    assert "loop, forward, 2, 8, 5, float32: failed, RuntimeError: no luck" in printed


def test_interrupt_keeps_the_passes_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wkv_providers.Reference, "step", interrupt)
    status, rows = run(tmp_path, "--passes", "forward,step", "--providers", "fastwkv,reference")
    assert status == 130
    assert list(rows) == [("forward", "fastwkv"), ("forward", "reference")]


def test_of_large_inputs_a_sample_of_channels_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = wkv_inputs.ordinary(2, 8, 5, torch.float32)
    monkeypatch.setitem(passes.CHECKED, "cpu", 32)
    assert passes.checked_channels(inputs) == slice(None, None, 3)
    monkeypatch.setitem(passes.CHECKED, "cpu", 40)
    assert passes.checked_channels(inputs) == slice(None, None, 3)  # an even step would leave all odd ones out
    status, rows = run(tmp_path, "--providers", "fastwkv,loop")
    assert status == 0
    assert {row["status"] for row in rows.values()} == {"ok"}


BAD = {
    "unknown operator 'attention' (choose from wkv, linear_scan, linear_scan_fixed)": ["--ops", "wkv,attention"],
    "unknown provider 'tensorflow' (choose from fastwkv, hf, loop, reference, fla,": ["--providers", "hf,tensorflow"],
    "unknown dtype 'int8' (choose from float32, bfloat16, float16, float64, complex64,": ["--dtypes", "int8"],
    "nothing to measure: no operator of --ops has": ["--ops", "wkv", "--dtypes", "complex64"],
    "one of --dtypes and one of --providers": ["--ops", "linear_scan", "--providers", "hf"],
    "unknown pass 'sideways'": ["--passes", "sideways"],
    "expected shapes like 4x1024x768, got '4x0x768'": ["--shapes", "1x1x1,4x0x768"],
    "expected shapes like 4x1024x768, got 'large'": ["--shapes", "large"],
    "packed documents are a batch of one, got '2x8x5p'": ["--shapes", "2x8x5p"],
    "argument --minutes: expected a whole number of at least 1": ["--minutes", "0"],
    "there is no wkv_op.cpp in 'other'": ["--rwkv-cuda", "other"],
    **BAD_OPTION,
    **BAD_DEVICE,
    **bad_results("ops"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_give_one_line_and_status_2(message: str, refused: Callable[..., None]) -> None:
    refused(ops, BAD[message], message)


def test_complains_when_other_processes_are_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(timing.OtherWork, "cores", lambda self: 1.5)
    _, rows = run(tmp_path, "--passes", "forward", "--providers", "fastwkv")
    assert rows["forward", "fastwkv"]["other_cores"] == 1.5
    assert "other processes kept up to 1.5 cores busy" in capsys.readouterr().err


@pytest.mark.parametrize(("ms", "verdict"), [(70.0, "60, reached"), (59.0, "60, MISSED")])
def test_table_says_whether_the_target_was_reached(ms: float, verdict: str) -> None:
    row = {"op": "wkv", "pass": "forward", "dtype": "float32", "B": 1, "T": 1024, "C": 768, "status": "ok"}
    row |= {"ms_min": 1.0, "quantiles": {"0.1": 1.0, "0.9": 1.0}, "gbps": 1.0, "error": 1e-7, "repeats": 3}
    row |= {"ms_host": None, "fraction": 0.5}
    rows = [{**row, "provider": "fastwkv", "ms": 1.0}, {**row, "provider": "hf", "ms": ms}]
    title, _, head, _, ours, peer = table.tables(rows, "cpu").splitlines()
    assert title == "wkv"
    assert len({len(head), len(ours), len(peer)}) == 1
    assert verdict in peer
    assert "reached" not in ours
    assert "60, " not in table.tables(rows, "cuda")
