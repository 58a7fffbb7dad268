"""The error tables: their rows, the bounds that this package promises, how it fails."""

import json

import pytest
import torch
from bench_scripts import run_script

for package in ("tqdm", "transformers"):
    pytest.importorskip(package)

import accuracy
from interpreted import rounding_interpreter
from peers import provider as providers
from peers import wkv_providers
from peers.operators import OPERATORS

# Allowed in float32, by operator and inputs, up to 1024 tokens and beyond: of the output, of gw, of other gradients.
BOUNDS = {
    ("wkv", "ordinary"): [(5e-7, 2e-6, 2e-6)] * 2,
    ("wkv", "adversarial"): [(2e-6, 2e-5, 5e-6)] * 2,
    ("scan", "ordinary"): [(1e-6, 2e-6, 2e-6), (3e-6, 6e-6, 6e-6)],
    ("scan", "adversarial"): [(1e-6, 2e-6, 2e-6), (3e-6, 6e-6, 6e-6)],
}


def run(folder, *arguments):
    small = ["--ops", "wkv", "--tokens", "24", "--long", "40", "--channels", "5", "--out", str(folder)]
    status = accuracy.main([*small, *arguments])
    return status, json.loads((folder / "accuracy.json").read_text())["rows"]


def test_program_holds_the_bounds_and_calls_peers_as_they_expect(tmp_path):
    # Run as users do: the interpreter is asked for when Triton is imported. A log decay taken for a rate, or a state
    # in the wrong order, would show as an error of order 1.
    arguments = ["--tokens", "16", "--long", "1030", "--channels", "3", "--out", str(tmp_path)]
    done = run_script("accuracy.py", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    for text in ("| inputs", "\nwkv, float32\n", "\nlinear_scan, complex64\n", "\nlinear_scan_fixed, bfloat16\n"):
        assert text in done.stdout
    rows = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    for op, operator in OPERATORS.items():
        here = [row for row in rows if row["op"] == op]
        plan = [("ordinary", 16), ("adversarial", 16), ("adversarial", 1030)]
        wanted = {(kind, dtype, T) for kind, T in plan for dtype in operator.accuracy_dtypes}
        assert {(row["inputs"], row["dtype"], row["T"]) for row in here} == wanted
        quick = {row["provider"] for row in here if row["T"] == 1030}
        assert {"fastwkv-cpu", "loop"} <= quick
        assert torch.cuda.is_available() or "fastwkv-triton" not in quick
        ok = {row["provider"] for row in here if row["status"] == "ok"}
        assert {"fastwkv-cpu", "fastwkv-triton", "loop", *(["hf"] if op == "wkv" else ["associative_scan"])} <= ok
        for row in here:
            if row["status"] != "ok":
                assert row["status"] == "unavailable", row
            elif row["provider"].startswith("fastwkv"):
                output, gw, other = BOUNDS[op[:3] if op == "wkv" else "scan", row["inputs"]][row["T"] > 1024]
                bounds = dict.fromkeys(operator.results, other) | {operator.output: output}
                bounds |= {"gw": gw} if op == "wkv" else {}
                if row["dtype"] == "bfloat16":
                    bounds |= dict.fromkeys(("y", "gk", "gv") if op == "wkv" else ("h", "ga", "gx"), 4e-3)
                    assert row["errors"][operator.output] < 2.5e-3  # rounded, not cut off
                assert row["bounds"] == bounds
                assert all(row["errors"][name] <= bounds[name] for name in operator.results), row
            elif row["dtype"] != "bfloat16":
                assert max(row["errors"].values()) < 1e-4, row


def test_double_precision_has_bounds_of_its_own():
    for operator in OPERATORS.values():
        for dtype in {"float64", "complex128"} & set(operator.dtypes):
            assert operator.allowed("adversarial", dtype, 8192) == dict.fromkeys(operator.results, 1e-12)


def test_error_beyond_its_bound_ends_with_status_1(tmp_path, monkeypatch, capsys):
    class Coarse(wkv_providers.FastWKV):
        def wkv(self, decay, u, k, v, state):
            return super().wkv(decay, u, k, v.detach() + 1.001 * (v - v.detach()), state)

    monkeypatch.setitem(OPERATORS["wkv"].providers, "fastwkv", Coarse())
    status, rows = run(tmp_path, "--dtypes", "float32", "--inputs", "ordinary", "--providers", "fastwkv-cpu")
    assert status == 1
    assert [(row["status"], row["reason"]) for row in rows] == [("beyond its bounds", "gv")]
    wanted = "accuracy.py: fastwkv (CPU), wkv, ordinary, float32, T = 24: beyond its bounds (gv)"
    assert wanted in capsys.readouterr().err


def test_missing_and_failing_peers_have_rows(tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(wkv_providers.Loop, "step", fail)
    monkeypatch.setattr(providers, "not_installed", lambda package: "not installed")
    status, rows = run(tmp_path, "--dtypes", "float32", "--inputs", "ordinary", "--providers", "loop,fla")
    assert status == 0
    outcome = [(row["provider"], row["status"], row["reason"]) for row in rows]
    assert outcome == [("loop", "failed", "RuntimeError: no luck"), ("fla", "unavailable", "not installed")]
    printed = capsys.readouterr().out
    assert "PyTorch loop, unbound (CPU): RuntimeError: no luck" in printed
    assert ": not available, not installed" in printed


def test_interpreter_rounds_to_bfloat16():
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
