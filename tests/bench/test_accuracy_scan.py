"""The error tables of the linear scan: inputs, bounds, peers."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")

import accuracy
from peers import linear_scan_inputs as scan_inputs

RESULTS = ("h", "ga", "gx", "gh0")


def test_rows_hold_the_bounds_and_peers_are_called_as_they_expect(tmp_path: Path, capsys) -> None:
    small = ["--ops", "linear_scan,linear_scan_fixed", "--tokens", "12", "--long", "1030", "--channels", "3"]
    assert accuracy.main([*small, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"float32", "complex64", "bfloat16"}
    for row in rows:
        if row["status"] != "ok":
            assert row["status"] == "unavailable", row
            assert row["provider"] not in ("fastwkv-cpu", "loop", "associative_scan")
            continue
        assert tuple(row["errors"]) == RESULTS
        if row["provider"].startswith("fastwkv"):
            h = 1e-6 if row["T"] == 12 else 3e-6
            bounds = {"h": h, "ga": 2 * h, "gx": 2 * h, "gh0": 2 * h}
            if row["dtype"] == "bfloat16":
                bounds |= dict.fromkeys(("h", "ga", "gx"), 4e-3)
            assert row["bounds"] == bounds
        elif row["dtype"] != "bfloat16":
            assert max(row["errors"].values()) < 1e-4
    printed = capsys.readouterr().out
    for op in ("linear_scan", "linear_scan_fixed"):
        for dtype in ("float32", "complex64", "bfloat16"):
            assert f"\n{op}, {dtype}\n" in printed
    assert "| inputs" in printed
    if not torch.cuda.is_available():
        assert "accelerated-scan-warp (CUDA): not available, runs on a GPU only" in printed


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_what_the_tables_say(dtype: torch.dtype, fixed: bool) -> None:
    ordinary, adversarial = (
        draw(2, 300, 40, dtype, fixed=fixed) for draw in (scan_inputs.ordinary, scan_inputs.adversarial)
    )
    for inputs in (ordinary, adversarial):
        assert inputs.a.shape == ((40,) if fixed else (2, 300, 40))
        assert {t.dtype for t in (inputs.a, inputs.x, inputs.gh)} == {dtype}
        assert inputs.h0.dtype == torch.promote_types(dtype, torch.float32)
        assert inputs.part(7, slice(None, None, 3)).shape == (2, 7, 14)
    if dtype.is_complex:
        assert 0.9 - 1e-6 <= ordinary.a.abs().min() < 0.92
        assert 0.98 < ordinary.a.abs().max() <= 0.999 + 1e-6
        assert {tuple(t.sign().unique().tolist()) for t in (ordinary.a.real, ordinary.a.imag)} == {(-1.0, 1.0)}
        assert (adversarial.a.abs() - 1).abs().max() < 2e-7
        assert adversarial.a.angle().abs().max() > 3
    else:
        assert 0 < ordinary.a.min() < 0.9 < ordinary.a.max() <= 1
        assert (adversarial.a == 1).all()
        assert (adversarial.x >= 0).all()


def test_double_precision_has_bounds_of_its_own() -> None:
    for operator in accuracy.OPERATORS.values():
        for dtype in {"float64", "complex128"} & set(operator.dtypes):
            bounds = operator.allowed("adversarial", dtype, 8192)
            assert bounds == dict.fromkeys(operator.results, 1e-12)
