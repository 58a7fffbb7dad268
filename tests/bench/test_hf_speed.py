"""The speed of Hugging Face's model: its rows, and that a wrong result is not passed over."""

import json
import math

import pytest
import torch
from bench_scripts import interrupt

for package in ("tqdm", "transformers"):
    pytest.importorskip(package)

import hf_speed
from peers.operator import relative_error

QUICK = ["--quick", "--rounds", "1", "--device", "cpu"]


def rows(folder):
    return json.loads((folder / "hf_speed.json").read_text())["rows"]


def test_program_writes_a_row_for_each_pass_and_model(tmp_path, capsys):
    assert hf_speed.main([*QUICK, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "hf_speed.json").read_text())
    assert record["settings"] == {**hf_speed.QUICK_SIZES, "B": 1, "T": 64, "dtype": "float32", "seed": 0}
    order = [(name, provider) for name in hf_speed.PASSES for provider in hf_speed.PROVIDERS]
    assert [(row["pass"], row["provider"]) for row in record["rows"]] == order
    for row in record["rows"]:
        assert row["repeats"] == 1
        assert 0 < row["ms_min"] <= row["ms"]
        assert row["goal"] is None
        assert (row["error"] is None) == (row["provider"] != "patched")
        assert row["error"] is None or 0 < row["error"] < 1e-5
        assert row["times_faster"] == 1 if row["provider"] == "unpatched" else row["times_faster"] > 0
    assert all(name in capsys.readouterr().out for name in ["unpatched"])


def test_goal_that_is_missed_is_marked():
    row = {"pass": "train", "provider": "patched", "goal": 2.8, "ms": 9.0, "ms_min": 8.0, "error": 1e-7}
    record = {"rows": [row | {"times_faster": times} for times in (2.79, 2.8)]}
    assert ["MISSED" in line for line in hf_speed.HFSpeed.table(record).splitlines()[2:]] == [True, False]


def test_ratio_is_the_median_over_rounds_in_which_models_take_turns(tmp_path, monkeypatch):
    took = {"unpatched": [10.0, 40.0, 90.0], "patched": [5.0, 10.0, 30.0], "patched, free operator": [1.0, 1.0, 1.0]}
    rounds = [seconds for turn in zip(*took.values(), strict=True) for seconds in turn]
    turns = iter([0.0] * 3 + rounds)  # the first are no turns
    monkeypatch.setattr(hf_speed.Task, "run", lambda task: ([torch.ones(1)], next(turns)))
    arguments = ["--quick", "--passes", "prefill", "--rounds", "3", "--device", "cpu", "--out", str(tmp_path)]
    assert hf_speed.main(arguments) == 0
    assert [row["times_faster"] for row in rows(tmp_path)] == [1, 3, 40]
    assert [row["ms"] for row in rows(tmp_path)] == [40e3, 10e3, 1e3]


def test_free_operator_is_no_operator_and_leaves_nothing_behind(tmp_path):
    run = hf_speed.HFSpeed(hf_speed.HFSpeed.parse([*QUICK, "--out", str(tmp_path)]))
    with hf_speed.free_operator():
        free = run.model(run.tokens).logits
    with hf_speed.patch():
        true = run.model(run.tokens).logits
    assert relative_error(free, true) > 0.1
    assert relative_error(run.model(run.tokens).logits, true) < 1e-5


@pytest.mark.parametrize("factor", [0.9, math.nan])
def test_wrong_result_gives_status_1(factor, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hf_speed._rwkv_forward, "_mixed", lambda old, new, mix: torch.lerp(old, new, mix * factor))
    assert hf_speed.main([*QUICK, "--passes", "prefill", "--out", str(tmp_path)]) == 1
    assert "hf_speed.py: prefill: wrong, error" in capsys.readouterr().err


def test_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(hf_speed.PASSES, "prefill", hf_speed.Pass(interrupt, 1.0))
    assert hf_speed.main([*QUICK, "--out", str(tmp_path)]) == 130
    assert [row["pass"] for row in rows(tmp_path)] == ["train"] * 3
