"""The LRU layer as a whole: all forms compute the same, what is wrong is not timed, what the program writes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import BAD_DEVICE, BAD_OPTION, bad_results, interrupt
from operations import Operations
from simulated_gpu import Immediate

pytest.importorskip("tqdm")

import lru_layer
from layer import forms
from layer import run as lru_run
from timing import by_turns as timing

LRU = lru_run.LRU
CASE = lru_run.Case((2, 40, 6, 10), "float32")
QUICK = ["--quick", "--device", "cpu"]
RESULTS = ["y", "gu", "gnu_log", "gtheta_log", "ggamma_log", "gB_re", "gB_im", "gC_re", "gC_im", "gD"]


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "QUICK", timing.Effort(repeats=1, seconds=0.0, turn=0.0))


def run(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    status = lru_layer.main([*QUICK, *arguments, "--out", str(folder)])
    return status, json.loads((folder / "lru_layer.json").read_text())["rows"]


@pytest.mark.parametrize("form", forms.FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 5e-6), ("bfloat16", 8e-3), ("float16", 1e-3)])
def test_every_form_computes_the_layer(form: str, dtype: str, bound: float) -> None:
    case = lru_run.Case((3, 70, 12, 20), dtype)
    inputs = lru_run.draw(case, seed=1)
    wanted = lru_run.expected(inputs)
    results = lru_run.forward_backward(inputs.layer(forms.FORMS[form]), inputs.tokens(), inputs.gradient)
    found = lru_run.named(results)
    assert list(found) == RESULTS
    for name, result in found.items():
        assert result.dtype == lru_run.DTYPES[dtype]
        assert lru_run.relative_error(result.double(), wanted[name]) < bound, name


def test_reference_is_the_sum_that_defines_the_layer() -> None:
    inputs = lru_run.draw(CASE, seed=2).to(torch.float64)
    y = lru_run.forward(inputs.layer(LRU), inputs.u, inputs.gradient)[0]
    p = inputs.parameters
    powers = inputs.layer(forms.FFTLRU)._powers(40).to(torch.complex128)  # [N, T], rounded to complex64
    lag = torch.arange(40)[:, None] - torch.arange(40)
    into = torch.einsum("nh,bth->btn", torch.complex(p["B_re"], p["B_im"]), inputs.u.cdouble()) * p["gamma_log"].exp()
    h = torch.einsum("nts,bsn->btn", torch.where(lag >= 0, powers[:, lag.clamp(min=0)], 0), into)
    wanted = torch.einsum("hn,btn->bth", torch.complex(p["C_re"], p["C_im"]), h).real + p["D"] * inputs.u
    assert lru_run.relative_error(y, wanted) < 1e-6


@pytest.mark.parametrize(("form", "dtypes"), [("complex64", {torch.complex64}), ("fastwkv", {torch.bfloat16})])
def test_forms_differ_in_what_is_scanned(form: str, dtypes: set[torch.dtype]) -> None:
    inputs = lru_run.draw(lru_run.Case(CASE.shape, "bfloat16"), seed=0)
    with Operations() as operations:
        inputs.layer(forms.FORMS[form])(inputs.u)
    assert {call.arguments[1].dtype for call in operations.calls if call.name == "fastwkv::linear_scan_fwd"} == dtypes


def test_memory_is_what_the_forms_are_known_to_take() -> None:
    B, T, H, N = shape = 4, 512, 32, 64  # the matrices are small beside B T H
    inputs = lru_run.draw(lru_run.Case(shape, "bfloat16"), seed=0)
    rows = {name: lru_run._memory(forms.FORMS[name], "forward+backward", inputs, None) for name in forms.FORMS}
    matrices = 8 * N * H * 4  # at most: B and C, as parameters lie, in float32 and rounded again
    h = B * T * N * 2 * 2
    assert h <= rows["fastwkv"]["saved_bytes"] <= h + matrices
    # Of h: as complex64, and rounded for the product with C.
    assert 3 * h <= rows["complex64"]["saved_bytes"] <= 3 * h + matrices
    assert rows["fft"]["saved_bytes"] > rows["complex64"]["saved_bytes"]
    for row in rows.values():
        assert row["peak_bytes"] > row["saved_bytes"]
    assert rows["fft"]["peak_bytes"] > rows["complex64"]["peak_bytes"] > 1.5 * rows["fastwkv"]["peak_bytes"]
    assert "saved_bytes" not in lru_run._memory(LRU, "forward", inputs, None)


def test_program_writes_a_row_for_every_pass_and_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run(tmp_path / "new", "--shapes", "2x40x6x10")
    assert status == 0
    assert os.listdir(tmp_path / "new") == ["lru_layer.json"]
    record = json.loads((tmp_path / "new" / "lru_layer.json").read_text())
    assert record["benchmark"] == "lru_layer"
    assert {"python", "fastwkv", "torch"} <= record["versions"].keys()
    assert record["settings"]["providers"].keys() == forms.FORMS.keys()
    keys = "pass dtype B T H N provider ms ms_min quantiles ms_first repeats ms_host peak_bytes head_start saved_bytes"
    keys += " error errors other_cores status reason"
    for row in rows:
        assert list(row) == keys.split()
        assert row["status"] == "ok"
        assert 0 < row["ms_min"] <= row["ms"]
        assert row["peak_bytes"] > 0
        assert row["quantiles"].keys() == {"0.1", "0.25", "0.75", "0.9"}
        backward = row["pass"] == "forward+backward"
        assert list(row["errors"]) == (RESULTS if backward else ["y"])
        assert row["error"] == max(row["errors"].values()) > 0
        assert (row["saved_bytes"] is not None) == backward
    order = [(row["dtype"], row["pass"], row["provider"]) for row in rows]
    dtypes, passes = ("bfloat16", "float32"), ("forward", "forward+backward")
    assert order == [(dtype, which, form) for dtype in dtypes for which in passes for form in forms.FORMS]
    printed = capsys.readouterr().out
    assert all(f"| {form}" in printed for form in forms.FORMS)


def test_rows_of_a_gpu_tell_device_time_host_time_and_the_memory_of_the_allocator() -> None:
    effort = timing.Effort(repeats=2, seconds=0.0, turn=1e-4)
    measurement = lru_run.Measurement(CASE, ["fastwkv", "fft"], effort, Immediate(), lambda: None)
    rows = measurement.rows(lru_run.draw(CASE, seed=0))
    assert [row["status"] for row in rows] == ["ok"] * 4
    for row in rows:
        assert row["ms"] > 0
        assert row["ms_host"] > 0
        assert row["peak_bytes"] == 42
        assert (row["saved_bytes"] is None) == (row["pass"] == "forward")


@pytest.mark.parametrize(("form", "status"), [("fft", 0), ("fastwkv", 1)])
def test_wrong_form_is_reported_and_not_timed(
    form: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class Wrong(forms.FORMS[form]):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return super().forward(u) + 1e-3 * (self.nu_log.sum() - self.nu_log.sum().detach())  # gν alone is wrong

    monkeypatch.setitem(forms.FORMS, form, Wrong)
    ended, rows = run(tmp_path, "--dtypes", "float32", "--shapes", "2x40x6x10", "--providers", "fastwkv,fft")
    assert ended == status
    found = {(row["pass"], row["provider"]): row for row in rows}
    assert {key for key, row in found.items() if row["status"] != "ok"} == {("forward+backward", form)}
    wrong = found["forward+backward", form]
    assert wrong["status"] == "wrong"
    assert wrong["reason"].startswith("error of gnu_log ")
    assert wrong["ms"] is None
    assert wrong["error"] > 1e-4
    printed = capsys.readouterr()
    assert f"{form}, forward+backward, 2, 40, 6, 10, float32: wrong, error of gnu_log" in printed.out
    assert ("lru_layer.py: fastwkv, forward+backward" in printed.err) == (status == 1)


def test_form_that_fails_is_reported_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room\nat all")

    monkeypatch.setattr(forms.FFTLRU, "forward", full)
    status, rows = run(tmp_path, "--dtypes", "float32", "--shapes", "2x40x6x10", "--providers", "fft,fastwkv")
    assert status == 0
    assert [(row["provider"], row["status"], row["reason"]) for row in rows] == 2 * [
        ("fft", "failed", "OutOfMemoryError: no room"),
        ("fastwkv", "ok", None),
    ]


def test_interrupt_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = lru_layer.draw

    def stop(case: Any, seed: int) -> Any:
        return interrupt() if case.dtype == "float32" else draw(case, seed)

    monkeypatch.setattr(lru_layer, "draw", stop)
    status, rows = run(tmp_path, "--shapes", "2x40x6x10", "--providers", "fastwkv")
    assert (status, {row["dtype"] for row in rows}) == (130, {"bfloat16"})


def test_target_is_for_the_gpu_in_time_and_memory() -> None:
    which, dtype, shape = lru_layer.TARGET_ROW
    row = lru_run._row(lru_run.Case(shape, dtype), which, "fastwkv")
    row |= {"ms": 2.0, "ms_min": 1.0, "quantiles": {"0.1": 1.0, "0.9": 3.0}, "repeats": 3, "peak_bytes": 10, "error": 0}

    def last(device: str, **peer: Any) -> str:
        lines = lru_layer.table([row, {**row, "provider": "fft", **peer}], device).splitlines()
        return lines[-1].split("|")[-2].strip()

    assert last("cuda", ms=4.0, peak_bytes=20) == "2, reached"
    assert last("cuda", ms=3.9, peak_bytes=20) == "2, MISSED"
    assert last("cuda", ms=4.0, peak_bytes=19) == "2, MISSED"
    assert last("cuda", ms=4.0, peak_bytes=20, T=5) == last("cpu", ms=4.0, peak_bytes=20) == ""


def test_inputs_are_the_same_at_every_call_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = (lru_run.draw(CASE, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.u, two.u)
    assert all(torch.equal(one.parameters[name], two.parameters[name]) for name in one.parameters)
    assert not torch.equal(one.u, other.u)


BAD = {
    "expected shapes like 8x4096x1024x1024 (B, T, H, N), got '8x4096x1024'": ["--shapes", "8x4096x1024"],
    "expected shapes like 8x4096x1024x1024 (B, T, H, N), got '8x0x1x1'": ["--shapes", "8x0x1x1"],
    "argument --dtypes: unknown dtype 'float64' (choose from float32, bfloat16, float16)": ["--dtypes", "float64"],
    "argument --providers: unknown provider 'loop' (choose from fastwkv, complex64, fft)": ["--providers", "loop"],
    **BAD_OPTION,
    **BAD_DEVICE,
    **bad_results("lru_layer"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_give_one_line_and_status_2(message: str, refused: Callable[..., None]) -> None:
    refused(lru_layer, BAD[message], message)
