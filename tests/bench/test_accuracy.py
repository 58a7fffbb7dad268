"""The error tables: their rows, the bounds that this package promises, how it fails. Shown on WKV."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import BAD_OPTION, bad_results, run_script

RESULTS = ("y", "gk", "gv", "gu", "gw", "gstate")
# Allowed in float32: of y, of gw, and of the other gradients.
BOUNDS = {"ordinary": (5e-7, 2e-6, 2e-6), "adversarial": (2e-6, 2e-5, 5e-6)}

for package in ("tqdm", "transformers"):
    pytest.importorskip(package)

import accuracy
from interpreted import rounding_interpreter
from peers import provider as providers
from peers import wkv_inputs, wkv_providers


def run(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    small = ["--ops", "wkv", "--tokens", "24", "--long", "40", "--channels", "5", "--out", str(folder)]
    status = accuracy.main([*small, *arguments])
    return status, json.loads((folder / "accuracy.json").read_text())["rows"]


def test_command_line_holds_the_bounds_and_prints_tables(tmp_path: Path) -> None:
    arguments = ["--ops", "wkv", "--tokens", "80", "--long", "600", "--channels", "16", "--out", str(tmp_path / "new")]
    done = run_script("accuracy.py", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["accuracy.json"]
    for text in ("| inputs", "\nwkv, float32\n", "\nwkv, bfloat16\n", "fastwkv (CPU)", "adversarial, T = 600"):
        assert text in done.stdout

    record = json.loads((tmp_path / "new" / "accuracy.json").read_text())
    assert {"device", "versions", "commit", "started"} <= record.keys()
    rows = record["rows"]
    cases = {(row["inputs"], row["dtype"], row["T"]) for row in rows}
    everyone = {"fastwkv-cpu", "fastwkv-triton", "loop", "hf", "fla"}
    interpreted = set() if torch.cuda.is_available() else {"fastwkv-triton", "fla"}
    assert len(cases) == 6
    for kind, dtype, T in cases:
        present = [row["provider"] for row in rows if (row["inputs"], row["dtype"], row["T"]) == (kind, dtype, T)]
        assert sorted(present) == sorted(everyone - (interpreted if T == 600 else set()))
    for row in rows:
        if row["provider"] == "fla" and row["status"] == "unavailable":
            assert (row["reason"], row["errors"]) == ("not installed", None)
            continue
        assert row["status"] == "ok", row
        assert tuple(row["errors"]) == RESULTS
        if row["provider"].startswith("fastwkv"):
            y, gw, other = BOUNDS[row["inputs"]]
            bounds = dict.fromkeys(RESULTS, other) | {"y": y, "gw": gw}
            if row["dtype"] == "bfloat16":
                bounds |= dict.fromkeys(("y", "gk", "gv"), 4e-3)
                assert row["errors"]["y"] < 2.5e-3  # rounded, not cut off
            assert row["bounds"] == bounds
            assert all(row["errors"][name] <= bounds[name] for name in RESULTS), row


def test_peers_are_called_as_they_expect(tmp_path: Path) -> None:
    # A log decay taken for a rate, or a state in the wrong order, would show as an error of order 1.
    status, rows = run(tmp_path, "--dtypes", "float32", "--inputs", "ordinary")
    assert status == 0
    measured = [row for row in rows if row["status"] == "ok"]
    assert {"fastwkv-cpu", "loop", "hf"} <= {row["provider"] for row in measured}
    assert all(error < 1e-5 for row in measured for error in row["errors"].values())


def test_error_beyond_its_bound_ends_with_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    class Coarse(wkv_providers.FastWKV):
        def wkv(self, decay, u, k, v, state):
            return super().wkv(decay, u, k, v.detach() + 1.001 * (v - v.detach()), state)

    subjects = {"fastwkv-cpu": accuracy.Subject("ours", Coarse(), torch.device("cpu"))}
    monkeypatch.setattr(accuracy, "subjects", lambda operator: subjects)
    status, rows = run(tmp_path, "--dtypes", "float32", "--inputs", "ordinary", "--providers", "fastwkv-cpu")
    assert status == 1
    assert [(row["status"], row["reason"]) for row in rows] == [("beyond its bounds", "gv")]
    assert "accuracy.py: ours, wkv, ordinary, float32, T = 24: beyond its bounds (gv)" in capsys.readouterr().err


def test_missing_and_failing_peers_have_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(wkv_providers.Loop, "step", fail)
    monkeypatch.setattr(providers, "not_installed", lambda package: "not installed")
    status, rows = run(tmp_path, "--dtypes", "float32", "--inputs", "ordinary", "--providers", "loop,fla")
    assert status == 0
    outcome = [(row["provider"], row["status"], row["reason"]) for row in rows]
    assert outcome == [("loop", "failed", "RuntimeError: no luck"), ("fla", "unavailable", "not installed")]
    printed = capsys.readouterr().out
    assert "PyTorch loop (CPU): RuntimeError: no luck" in printed
    assert ": not available, not installed" in printed


def test_interpreter_rounds_to_bfloat16() -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def copy(x_ptr, y_ptr, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(y_ptr + at, tl.load(x_ptr + at))

    x = torch.randn(4096) * torch.exp(20 * torch.randn(4096))
    x[:6] = torch.tensor((0.0, -0.0, torch.inf, -torch.inf, 1.99999, 1 + 2**-8))
    y = torch.empty(4096, dtype=torch.bfloat16)
    with rounding_interpreter():
        copy[(1,)](x, y, N=4096)
    assert torch.equal(y, x.bfloat16())


@pytest.mark.parametrize("kind", ["ordinary", "adversarial"])
def test_inputs_are_what_the_table_says(kind: str) -> None:
    inputs = getattr(wkv_inputs, kind)(1, 400, 64, torch.bfloat16)
    assert {t.dtype for t in (inputs.k, inputs.v, inputs.gy)} == {torch.bfloat16}
    assert {t.dtype for t in (inputs.w, inputs.u, *inputs.state)} == {torch.float32}
    if kind == "adversarial":
        assert 59 < inputs.k.abs().max() <= 60
        assert inputs.w.min() < 1e-5
        assert 10 < inputs.w.max() < 20
        assert inputs.w.min() >= 1e-6
    else:
        assert inputs.k.float().std() == pytest.approx(1, abs=0.05)


BAD = {
    "unknown operator 'attention'": ["--ops", "attention"],
    "unknown provider 'tensorflow'": ["--providers", "tensorflow"],
    "unknown kind of inputs 'nice' (choose from ordinary, adversarial)": ["--inputs", "nice"],
    "unknown dtype 'int8'": ["--dtypes", "int8"],
    "nothing to measure": ["--ops", "wkv", "--dtypes", "complex64"],
    "argument --tokens: expected a whole number of at least 1, got '0'": ["--tokens", "0"],
    **BAD_OPTION,
    **bad_results("accuracy"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_give_one_line_and_status_2(message: str, refused: Callable[..., None]) -> None:
    refused(accuracy, BAD[message], message)
