"""The speed of generation: what the program writes, what counts as read, and that other tokens are not passed over."""

import argparse
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import BAD_DEVICE, BAD_OPTION, bad_results, interrupt, run_script
from recorded_graph import RecordedGraph

for package in ("tqdm", "transformers"):
    pytest.importorskip(package)

import decode
from generation import decode as decode_run
from generation import models

QUICK = ["--quick", "--rounds", "1", "--device", "cpu"]
SIZE = models.RWKV4Config(layers=2, width=16, vocab_size=40)
ARGUMENTS = argparse.Namespace(
    device=torch.device("cpu"), batch=2, tokens=6, rounds=3, prefill=9, temperature=1.0, seed=0
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.ops_timing, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setitem(models.SIZES, "tiny", SIZE)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """The graphs that are made, as if there were a GPU."""
    made: list[RecordedGraph] = []

    def make(*arguments: Any) -> RecordedGraph:
        made.append(RecordedGraph(*arguments))
        return made[-1]

    module = importlib.import_module("fastwkv.nn.generation")
    for place in (module, decode_run):
        monkeypatch.setattr(place, "why_no_graph", lambda *_: None)
    monkeypatch.setattr(module, "Graph", make)
    return made


def model(dtype: torch.dtype = torch.float32) -> Any:
    return models.build("rwkv4", SIZE, 0, torch.device("cpu"), dtype, 0)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "decode.json").read_text())


def test_command_line_writes_a_row_for_each_way(tmp_path: Path) -> None:
    done = run_script("decode.py", *QUICK, "--dtypes", "float32,bfloat16", "--out", "new", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / "new") == ["decode.json"]
    record = result(tmp_path / "new")
    assert record["benchmark"] == "decode"
    assert {"python", "fastwkv", "torch"} <= record["versions"].keys()
    assert record["copy_gbps"] > 0
    wanted = {"batch": 1, "tokens": 8, "rounds": 1, "temperature": 1.0, "seed": 0, "quick": True, "prefill_tokens": 64}
    assert record["settings"] == wanted
    one = [("decode", False, "ok"), ("decode", True, "unavailable"), ("prefill", None, "ok")]
    assert [(row["pass"], row["graph"], row["status"]) for row in record["rows"]] == one * 2
    assert [row["dtype"] for row in record["rows"]] == ["float32"] * 3 + ["bfloat16"] * 3
    for row in record["rows"]:
        if row["status"] == "ok":
            assert 0 < row["ms_min"] <= row["ms"]
            assert row["tokens_per_second"] > 0
            assert (row["fraction"] is None) == (row["pass"] == "prefill")
            assert (row["peak_bytes"] is None) == (row["pass"] == "decode")
    assert "unavailable, the model is on cpu, and only a GPU has CUDA graphs" in done.stdout


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_read_are_all_but_the_other_rows_of_the_embedding(batch: int, dtype: torch.dtype) -> None:
    D, L, V, e = SIZE.width, SIZE.layers, SIZE.vocab_size, dtype.itemsize
    everything = 2 * V * D + 13 * D * D * L + D * (11 * L + 4)
    assert decode_run.parameters_read(model(dtype), batch) == e * (everything - (V - min(batch, V)) * D)


def test_rows_count_tokens_and_compare_with_the_limit(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, took = decode_run.Task.run, iter([50.0, 50.0, 1.2, 0.6, 6.0, 3.0, 2.4, 1.2])  # the first two are not counted
    monkeypatch.setattr(decode_run.Task, "run", lambda task: (run(task)[0], next(took)))
    one = model()
    plain, graph = decode_run.decode_rows(one, ARGUMENTS, copy_gbps=10.0)
    limit = decode_run.parameters_read(one, 2) / 10e9 * 1e3
    for row, used, ms in ((plain, False, 400.0), (graph, True, 200.0)):
        assert row["graph"] is used
        assert row["status"] == "ok"
        assert row["ms"] == pytest.approx(ms)
        assert row["ms_min"] == pytest.approx(ms / 2)
        assert row["tokens_per_second"] == pytest.approx(2e3 / ms)  # two texts
        assert row["limit_ms"] == pytest.approx(limit)
        assert row["fraction"] == pytest.approx(limit / ms)
    # Every run recorded its second token, and nothing but launches was timed.
    assert [(one.captures, one.replays) for one in graphs] == [(1, 1 + 6)] * 4


def test_other_tokens_with_a_graph_give_status_1(
    graphs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RecordedGraph, "replay", lambda graph: None)  # the same token again and again
    assert decode.main([*QUICK, "--out", str(tmp_path)]) == 1
    assert [row["status"] for row in result(tmp_path)["rows"]] == ["ok", "wrong", "ok"]
    assert "decode.py: tiny float32: other tokens with a graph than without" in capsys.readouterr().err


def test_prompt_is_read_in_bounded_memory() -> None:
    row = decode_run.prefill_row(model(), ARGUMENTS)
    assert row["tokens_per_second"] == pytest.approx(2 * 9 / row["ms"] * 1e3)
    assert 2 * 9 * 4 * SIZE.width * 4 < row["peak_bytes"] < 1e5


def test_out_of_memory_is_recorded_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = models.build

    def failing(name: str, size: Any, positions: int, device: Any, dtype: torch.dtype, seed: int) -> Any:
        if dtype == torch.float64:
            raise torch.OutOfMemoryError("no room")
        return build(name, size, positions, device, dtype, seed)

    monkeypatch.setattr(models, "build", failing)
    assert decode.main([*QUICK, "--dtypes", "float64,float32", "--out", str(tmp_path)]) == 0
    rows = [(row["dtype"], row["status"], row["reason"]) for row in result(tmp_path)["rows"]]
    assert rows[0] == ("float64", "failed", "out of memory")
    assert rows[1][:2] == ("float32", "ok")


def test_interrupt_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "prefill_row", interrupt)
    assert decode.main([*QUICK, "--out", str(tmp_path)]) == 130
    assert [row["pass"] for row in result(tmp_path)["rows"]] == ["decode", "decode"]


@pytest.mark.parametrize("cores", [0.05, 1.5, None])
def test_other_work_on_the_machine_is_complained_about(
    cores: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode_run.OtherWork, "cores", lambda self: cores)
    assert decode.main([*QUICK, "--out", str(tmp_path)]) == 0
    assert ("kept up to 1.5 cores busy" in capsys.readouterr().err) == (cores == 1.5)


BAD = {
    "argument --sizes: unknown size '5b' (choose from tiny, 169m": ["--sizes", "5b"],
    "argument --dtypes: unknown dtype 'int8'": ["--dtypes", "int8"],
    "argument --tokens: expected a whole number of at least 1, got '0'": ["--tokens", "0"],
    "argument --temperature: expected a number of at least 0, got '-1'": ["--temperature", "-1"],
    "argument --temperature: expected a number of at least 0, got 'hot'": ["--temperature", "hot"],
    **BAD_OPTION,
    **BAD_DEVICE,
    **bad_results("decode"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_give_one_line_and_status_2(message: str, refused: Callable[..., None]) -> None:
    refused(decode, BAD[message], message)
