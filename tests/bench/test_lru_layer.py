"""The LRU layer as a whole: all forms compute the same, a wrong one is not timed, and the rows of the program."""

import json

import pytest
import torch
from bench_scripts import interrupt
from operations import Operations
from simulated_gpu import Immediate

pytest.importorskip("tqdm")

import lru_layer
from layer import forms
from layer import run as lru_run
from timing import by_turns

LRU = lru_run.LRU
CASE = lru_run.Case((2, 40, 6, 10), "float32")
BRIEF = by_turns.Effort(repeats=1, seconds=0.0, turn=0.0)
RESULTS = ["y", "gu", "gnu_log", "gtheta_log", "ggamma_log", "gB_re", "gB_im", "gC_re", "gC_im", "gD"]


def rows_of(*providers, case=CASE, cuda=None):
    measurement = lru_run.Measurement(case, list(providers), BRIEF, cuda, lambda: None)
    return {(row["pass"], row["provider"]): row for row in measurement.rows(lru_run.draw(case, seed=0))}


@pytest.mark.parametrize("form", forms.FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 5e-6), ("bfloat16", 8e-3), ("float16", 1e-3)])
def test_every_form_computes_the_layer(form, dtype, bound):
    inputs = lru_run.draw(lru_run.Case((3, 70, 12, 20), dtype), seed=1)
    wanted = lru_run.expected(inputs)
    results = lru_run.forward_backward(inputs.layer(forms.FORMS[form]), inputs.tokens(), inputs.gradient)
    found = lru_run.named(results)
    assert list(found) == RESULTS
    for name, result in found.items():
        assert result.dtype == lru_run.DTYPES[dtype]
        assert lru_run.relative_error(result.double(), wanted[name]) < bound, name


def test_reference_is_the_sum_that_defines_the_layer():
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
def test_forms_differ_in_the_dtype_that_is_scanned(form, dtypes):
    inputs = lru_run.draw(lru_run.Case(CASE.shape, "bfloat16"), seed=0)
    with Operations() as operations:
        inputs.layer(forms.FORMS[form])(inputs.u)
    assert {call.arguments[1].dtype for call in operations.calls if call.name == "fastwkv::linear_scan_fwd"} == dtypes


def test_memory_is_what_the_forms_are_known_to_take():
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


def test_program_writes_a_row_for_every_pass_and_form(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(by_turns, "QUICK", BRIEF)
    arguments = ["--quick", "--device", "cpu", "--shapes", "2x40x6x10", "--out", str(tmp_path)]
    assert lru_layer.main(arguments) == 0
    record = json.loads((tmp_path / "lru_layer.json").read_text())
    assert record["settings"]["providers"].keys() == forms.FORMS.keys()
    rows = record["rows"]
    assert len({tuple(row) for row in rows}) == 1  # the same keys
    order = [(row["dtype"], row["pass"], row["provider"]) for row in rows]
    dtypes, passes = ("bfloat16", "float32"), ("forward", "forward+backward")
    assert order == [(dtype, which, form) for dtype in dtypes for which in passes for form in forms.FORMS]
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < row["ms_min"] <= row["ms"]
        assert row["peak_bytes"] > 0
        backward = row["pass"] == "forward+backward"
        assert list(row["errors"]) == (RESULTS if backward else ["y"])
        assert row["error"] == max(row["errors"].values()) > 0
        assert (row["saved_bytes"] is not None) == backward
    printed = capsys.readouterr().out
    assert all(f"| {form}" in printed for form in forms.FORMS)


def test_rows_of_a_gpu_tell_device_time_host_time_and_the_memory_of_the_allocator():
    for (which, _), row in rows_of("fastwkv", "fft", cuda=Immediate()).items():
        assert row["status"] == "ok"
        assert row["ms"] > 0
        assert row["ms_host"] > 0
        assert row["peak_bytes"] == 42
        assert (row["saved_bytes"] is None) == (which == "forward")


@pytest.mark.parametrize("form", ["fft", "fastwkv"])
def test_wrong_form_is_reported_and_not_timed(form, monkeypatch):
    class Wrong(forms.FORMS[form]):
        def forward(self, u):
            return super().forward(u) + 1e-3 * (self.nu_log.sum() - self.nu_log.sum().detach())  # gν alone is wrong

    monkeypatch.setitem(forms.FORMS, form, Wrong)
    rows = rows_of("fastwkv", "fft")
    wrong = rows.pop(("forward+backward", form))
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert (wrong["status"], wrong["ms"]) == ("wrong", None)
    assert wrong["reason"].startswith("error of gnu_log ")
    complaint = lru_layer.LRULayer.complaint(wrong)
    assert (complaint is not None) == (form == "fastwkv")
    wanted = f"{form}, forward+backward, 2, 40, 6, 10, float32: wrong, error of gnu_log"
    assert wanted in lru_layer.LRULayer.table({"device": {"type": "cpu"}, "rows": [*rows.values(), wrong]})


def test_form_that_fails_is_reported_and_the_others_go_on(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room\nat all")

    monkeypatch.setattr(forms.FFTLRU, "forward", full)
    outcome = {key: (row["status"], row["reason"]) for key, row in rows_of("fft", "fastwkv").items()}
    for which in lru_run.PASSES:
        assert outcome[which, "fft"] == ("failed", "OutOfMemoryError: no room")
        assert outcome[which, "fastwkv"] == ("ok", None)


def test_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    draw = lru_layer.draw
    monkeypatch.setattr(
        lru_layer, "draw", lambda case, seed: interrupt() if case.dtype == "float32" else draw(case, seed)
    )
    assert lru_layer.main(["--quick", "--device", "cpu", "--providers", "fastwkv", "--out", str(tmp_path)]) == 130
    rows = json.loads((tmp_path / "lru_layer.json").read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_target_is_for_the_gpu_in_time_and_memory():
    which, dtype, shape = lru_layer.TARGET_ROW
    row = lru_run._row(lru_run.Case(shape, dtype), which, "fastwkv")
    row |= {"ms": 2.0, "ms_min": 1.0, "quantiles": {"0.1": 1.0, "0.9": 3.0}, "repeats": 3, "peak_bytes": 10, "error": 0}

    def last(device, **peer):
        record = {"device": {"type": device}, "rows": [row, {**row, "provider": "fft", **peer}]}
        return lru_layer.LRULayer.table(record).splitlines()[-1].split("|")[-2].strip()

    assert last("cuda", ms=4.0, peak_bytes=20) == "2, reached"
    assert last("cuda", ms=3.9, peak_bytes=20) == last("cuda", ms=4.0, peak_bytes=19) == "2, MISSED"
    assert last("cuda", ms=4.0, peak_bytes=20, T=5) == last("cpu", ms=4.0, peak_bytes=20) == ""


def test_inputs_are_the_same_at_every_call_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    one, two, other = (lru_run.draw(CASE, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.u, two.u)
    assert all(torch.equal(one.parameters[name], two.parameters[name]) for name in one.parameters)
    assert not torch.equal(one.u, other.u)
