"""The speed of Hugging Face's model: what the program writes, and that a wrong result is not passed over."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import BAD_DEVICE, BAD_OPTION, bad_results, interrupt, run_script

for package in ("tqdm", "transformers"):
    pytest.importorskip(package)

import hf_speed

QUICK = ["--quick", "--rounds", "1", "--device", "cpu"]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "hf_speed.json").read_text())


def test_command_line_writes_a_row_for_each_pass_and_model(tmp_path: Path) -> None:
    done = run_script("hf_speed.py", *QUICK, "--out", "new", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / "new") == ["hf_speed.json"]
    record = result(tmp_path / "new")
    assert record["benchmark"] == "hf_speed"
    assert {"python", "fastwkv", "torch", "transformers"} <= record["versions"].keys()
    assert record["settings"] == {**hf_speed.QUICK_SIZES, "B": 1, "T": 64, "dtype": "float32", "seed": 0}
    assert [(row["pass"], row["provider"]) for row in record["rows"]] == [
        (name, provider) for name in hf_speed.PASSES for provider in hf_speed.PROVIDERS
    ]
    for row in record["rows"]:
        assert row["repeats"] == 1
        assert 0 < row["ms_min"] <= row["ms"]
        assert row["goal"] is None
        assert (row["error"] is None) == (row["provider"] != "patched")
        assert row["error"] is None or 0 < row["error"] < 1e-5
        assert row["times_faster"] == 1 if row["provider"] == "unpatched" else row["times_faster"] > 0
    assert all(name in done.stdout for name in hf_speed.PROVIDERS)


def test_goal_that_is_missed_is_marked() -> None:
    row = {"pass": "train", "provider": "patched", "goal": 2.8, "ms": 9.0, "ms_min": 8.0, "error": 1e-7}
    lines = hf_speed.table([row | {"times_faster": times} for times in (2.79, 2.8)]).splitlines()[2:]
    assert "2.8, MISSED" in lines[0]
    assert "2.8, reached" in lines[1]


def test_ratio_is_the_median_over_rounds_in_which_models_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = {"unpatched": [10.0, 40.0, 90.0], "patched": [5.0, 10.0, 30.0], "patched, free operator": [1.0, 1.0, 1.0]}
    turns = iter(
        [0.0] * 3 + [seconds for turn in zip(*took.values(), strict=True) for seconds in turn]  # the first are no turns
    )
    monkeypatch.setattr(hf_speed.Task, "run", lambda task: ([torch.ones(1)], next(turns)))
    arguments = ["--quick", "--passes", "prefill", "--rounds", "3", "--device", "cpu", "--out", str(tmp_path)]
    assert hf_speed.main(arguments) == 0
    rows = result(tmp_path)["rows"]
    assert [row["times_faster"] for row in rows] == [1, 3, 40]
    assert [row["ms"] for row in rows] == [40e3, 10e3, 1e3]


def test_free_operator_is_no_operator_and_leaves_nothing_behind() -> None:
    run = hf_speed.Run(hf_speed.parse([*QUICK]))
    with hf_speed.free_operator():
        free = run.model(run.tokens).logits
    with hf_speed.patch():
        true = run.model(run.tokens).logits
    assert hf_speed.relative_error(free, true) > 0.1
    assert hf_speed.relative_error(run.model(run.tokens).logits, true) < 1e-5


def test_wrong_result_gives_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hf_speed._rwkv_forward, "_mixed", lambda old, new, mix: torch.lerp(old, new, mix * 0.9))
    assert hf_speed.main([*QUICK, "--out", str(tmp_path)]) == 1
    assert "hf_speed.py: train: wrong, error" in capsys.readouterr().err


def test_interrupt_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(hf_speed.PASSES, "prefill", hf_speed.Pass(interrupt, 1.0))
    assert hf_speed.main([*QUICK, "--out", str(tmp_path)]) == 130
    assert [row["pass"] for row in result(tmp_path)["rows"]] == ["train"] * 3
    assert "interrupted" in capsys.readouterr().err


BAD = {
    "argument --passes: unknown pass 'decode' (choose from train, prefill)": ["--passes", "decode"],
    "argument --rounds: expected a whole number of at least 1, got '0'": ["--rounds", "0"],
    **BAD_OPTION,
    **BAD_DEVICE,
    **bad_results("hf_speed"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_give_one_line_and_status_2(message: str, refused: Callable[..., None]) -> None:
    refused(hf_speed, BAD[message], message)
