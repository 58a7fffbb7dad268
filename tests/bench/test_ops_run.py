"""A run on a GPU, put on the CPU: limits of time, failures, lost devices."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simulated_gpu import Immediate

pytest.importorskip("tqdm")

import ops
from peers import operators, wkv_providers
from throughput import run as run_module
from timing import by_turns as timing

WKV = operators.OPERATORS["wkv"]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
Rows = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(ops, "draw_all", lambda record, folder: [])
    monkeypatch.setattr(run_module, "compile_ours", lambda cases, device: None)
    monkeypatch.setattr(run_module, "PATIENCE", math.inf)  # however slow the machine
    monkeypatch.setattr(run_module, "gc", SimpleNamespace(freeze=lambda: None, collect=lambda: 0))  # takes long
    start = run_module.Run.__init__

    def on_a_gpu(self: Any, args: Any) -> None:
        start(self, args)
        self.cuda, self.effort = Immediate(), timing.GPU_QUICK

    monkeypatch.setattr(run_module.Run, "__init__", on_a_gpu)


def run(folder: Path, *arguments: str) -> tuple[int, Rows]:
    tiny = ["--ops", "wkv", "--device", "cpu", "--shapes", "2x8x5", "--out", str(folder), *arguments]
    status = ops.main(tiny)
    rows = json.loads((folder / "ops.json").read_text())["rows"]
    return status, {(row["pass"], row["provider"]): row for row in rows}


def test_rows_tell_device_time_host_time_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run(tmp_path, "--passes", "forward,backward,forward+backward,step")
    assert status == 0
    assert " s  wkv [2, 8, 5] float32\n" in capsys.readouterr().err  # where no bar is shown
    measured = [row for row in rows.values() if row["status"] == "ok"]
    assert {row["provider"] for row in measured} == {"fastwkv", "hf", "loop", "reference"}
    for row in measured:
        assert row["ms"] > 0
        assert row["ms_host"] >= 0
        assert row["peak_bytes"] == 42
        assert row["head_start"] is False
        ours_alone = (row["pass"], row["provider"]) == ("step", "fastwkv")
        assert (row["ms_graph"] or 0) == (pytest.approx(0.01, rel=0.01) if ours_alone else 0)  # a hundredth of 1 ms
    settings = json.loads((tmp_path / "ops.json").read_text())["settings"]
    assert list(settings["reference"]) == ["T <= 8192", "T > 8192"]


def test_what_is_not_measured_in_time_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([False] * 2 + [True] * 99)  # at the case and at the first provider
    monkeypatch.setattr(run_module.Run, "_late", lambda self: next(looks))
    status, rows = run(tmp_path, "--passes", "forward,step", "--providers", "loop,fastwkv", "--minutes", "1")
    assert status == 0
    late = ("unavailable", "out of time")
    assert {key: (row["status"], row["reason"]) for key, row in rows.items()} == {
        ("forward", "fastwkv"): ("ok", None),
        ("forward", "loop"): late,
        ("step", "fastwkv"): late,
        ("step", "loop"): late,
    }


def test_cases_after_the_deadline_have_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0, 61)
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    _, rows = run(tmp_path, "--minutes", "1")
    assert {row["reason"] for row in rows.values()} == {"out of time"}
    assert len(rows) == 3 * 6


def test_peer_whose_first_calls_take_long_is_not_asked_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "PATIENCE", 0.0)
    _, rows = run(tmp_path, "--passes", "forward,step")
    assert {rows["forward", name]["status"] for name in ("fastwkv", "loop")} == {"ok"}
    assert rows["step", "fastwkv"]["status"] == "ok"
    assert rows["step", "loop"]["reason"].startswith("its first calls took")
    _, rows = run(tmp_path, "--passes", "forward,step", "--providers", "fastwkv,loop")
    assert {row["status"] for row in rows.values()} == {"ok"}


def test_first_calls_that_fail_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "PATIENCE", 0.0)
    monkeypatch.setitem(WKV.providers, "loop", Breaking())
    _, rows = run(tmp_path, "--passes", "forward,backward")
    assert rows["forward", "loop"]["status"] == "failed"
    assert rows["backward", "loop"]["reason"].startswith("its first calls took")


class Breaking(wkv_providers.Loop):
    def wkv(self, *arguments: Any) -> Any:
        raise torch.OutOfMemoryError("of 80 GiB\nnone is left")


def test_peer_without_enough_memory_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WKV.providers, "loop", Breaking())
    status, rows = run(tmp_path, "--passes", "forward,step", "--providers", "fastwkv,loop,reference")
    assert status == 0
    outcome = rows["forward", "loop"]
    assert (outcome["status"], outcome["reason"]) == ("failed", "OutOfMemoryError: of 80 GiB")
    assert {row["status"] for key, row in rows.items() if key != ("forward", "loop")} == {"ok"}


def test_failure_while_it_is_timed_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, effort: Any) -> None:
        raise RuntimeError("too late")

    monkeypatch.setattr(run_module.ops_cuda.CudaTask, "take_turn", fail)
    status, rows = run(tmp_path, "--passes", "forward", "--providers", "fastwkv,loop")
    assert status == 1
    assert [(row["status"], row["reason"], row["ms"]) for row in rows.values()] == [
        ("failed", "RuntimeError: too late", None)
    ] * 2


def test_lost_device_ends_the_run_with_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Losing(wkv_providers.Reference):
        name = "loop"

        def step(self, *arguments: Any) -> Any:
            def lost(self: Any) -> None:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

            monkeypatch.setattr(Immediate, "synchronize", lost)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(WKV.providers, "loop", Losing())
    status, rows = run(tmp_path, "--passes", "forward,step", "--providers", "fastwkv,loop,reference")
    assert status == 1
    assert {key for key, row in rows.items() if row["status"] == "ok"} == {
        ("forward", name) for name in ("fastwkv", "loop", "reference")
    }
    assert rows["step", "loop"]["status"] == "failed"
    assert ("step", "reference") not in rows
    error = capsys.readouterr().err
    assert "ops.py: the device is lost: loop, wkv, step: RuntimeError: CUDA error: an illegal memory access" in error


def test_inputs_that_do_not_fit_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, seed: int, device: torch.device) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(run_module.Case, "draw", fail)
    status, rows = run(tmp_path, "--passes", "forward,step", "--providers", "fastwkv,loop")
    assert status == 1
    assert [row["reason"] for row in rows.values()] == ["OutOfMemoryError: too large"] * 4


def test_reference_that_fails_is_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *arguments: Any, **options: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(type(WKV), "expected", fail)
    status, rows = run(tmp_path, "--passes", "forward", "--providers", "fastwkv,loop")
    assert status == 1
    assert {row["reason"] for row in rows.values()} == {"RuntimeError: no compiler"}


def test_beyond_the_longest_loop_the_reference_is_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    expected = type(WKV).expected

    def noted(self: Any, inputs: Any, *, state: bool, own: bool = False) -> Any:
        asked.append(own)
        return expected(self, inputs, state=state, own=own)

    monkeypatch.setattr(type(WKV), "expected", noted)
    for longest, own in ((8, False), (7, True)):
        monkeypatch.setattr(run_module, "LONGEST_LOOP", longest)
        _, rows = run(tmp_path, "--passes", "forward", "--providers", "loop")
        assert rows["forward", "loop"]["status"] == "ok"
        assert asked.pop() is own


@pytest.mark.parametrize("name", ["hf", "loop", "reference"])
def test_loops_get_no_long_sequences_on_a_gpu(name: str) -> None:
    one = WKV.providers[name]
    assert one.too_long(GPU, "forward", 4096) is None
    assert one.too_long(GPU, "forward", 16384) == "a loop in Python, asked for 4096 tokens at most"
    assert one.too_long(CPU, "forward", 16384) is None
    assert one.too_long(GPU, "step", 16384) is None
    assert (one.too_long(GPU, "forward+backward", 4096) is None) == (name != "hf")
    scan = operators.OPERATORS["linear_scan"].providers["associative_scan"]
    assert scan.too_long(GPU, "forward", 8192) == "compiled anew for every shape, asked for 4096 tokens at most"
    assert WKV.providers["fla"].too_long(GPU, "forward", 10**6) is None
