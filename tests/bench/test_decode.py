"""The speed of generation: its rows, the bytes that count as read, and that other tokens are not passed over."""

import importlib
import json
from argparse import Namespace

import pytest
import torch
from bench_scripts import interrupt
from recorded_graph import RecordedGraph

for package in ("tqdm", "transformers"):
    pytest.importorskip(package)

import decode
from generation import decode as decode_run
from generation import models

QUICK = ["--quick", "--rounds", "1", "--device", "cpu"]
SIZE = models.RWKV4Config(layers=2, width=16, vocab_size=40)
ARGUMENTS = Namespace(device=torch.device("cpu"), batch=2, tokens=6, rounds=3, prefill=9, temperature=1.0, seed=0)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(decode.by_turns, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setitem(models.SIZES, "tiny", SIZE)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are made, as if there were a GPU."""
    made = []

    def make(*arguments):
        made.append(RecordedGraph(*arguments))
        return made[-1]

    module = importlib.import_module("fastwkv.nn.generation")
    for place in (module, decode_run):
        monkeypatch.setattr(place, "why_no_graph", lambda *_: None)
    monkeypatch.setattr(module, "Graph", make)
    return made


def model(dtype=torch.float32):
    return models.build("rwkv4", SIZE, 0, torch.device("cpu"), dtype, 0)


def rows(folder):
    return json.loads((folder / "decode.json").read_text())["rows"]


def test_program_writes_a_row_for_each_way(tmp_path, capsys):
    assert decode.main([*QUICK, "--dtypes", "float32,bfloat16", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "decode.json").read_text())
    assert record["copy_gbps"] == 10.0
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
    assert "not available, the model is on cpu, and only a GPU has CUDA graphs" in capsys.readouterr().out


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_read_are_all_but_the_other_rows_of_the_embedding(batch, dtype):
    D, L, V, e = SIZE.width, SIZE.layers, SIZE.vocab_size, dtype.itemsize
    everything = 2 * V * D + 13 * D * D * L + D * (11 * L + 4)
    assert decode_run.parameters_read(model(dtype), batch) == e * (everything - (V - min(batch, V)) * D)


def test_rows_count_tokens_and_compare_with_the_limit(graphs, monkeypatch):
    run, took = decode_run.Task.run, iter([50.0, 50.0, 1.2, 0.6, 6.0, 3.0, 2.4, 1.2])  # the first two are not counted
    monkeypatch.setattr(decode_run.Task, "run", lambda task: (run(task)[0], next(took)))
    one = model()
    plain, graph = decode_run.decode_rows(one, ARGUMENTS, copy_gbps=10.0)
    limit = decode_run.parameters_read(one, 2) / 10e9 * 1e3
    for row, used, ms in ((plain, False, 400.0), (graph, True, 200.0)):
        assert (row["graph"], row["status"]) == (used, "ok")
        assert row["ms"] == pytest.approx(ms)
        assert row["ms_min"] == pytest.approx(ms / 2)
        assert row["tokens_per_second"] == pytest.approx(2e3 / ms)  # two sequences
        assert row["limit_ms"] == pytest.approx(limit)
        assert row["fraction"] == pytest.approx(limit / ms)
    # Every run recorded its second token, and nothing but launches was timed.
    assert [(one.captures, one.replays) for one in graphs] == [(1, 1 + 6)] * 4


def test_other_tokens_with_a_graph_give_status_1(graphs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RecordedGraph, "replay", lambda graph: None)  # the same token again and again
    assert decode.main([*QUICK, "--out", str(tmp_path)]) == 1
    assert [row["status"] for row in rows(tmp_path)] == ["ok", "wrong", "ok"]
    assert "decode.py: tiny float32: other tokens with a graph than without" in capsys.readouterr().err


def test_prompt_is_read_in_bounded_memory():
    row = decode_run.prefill_row(model(), ARGUMENTS)
    assert row["tokens_per_second"] == pytest.approx(2 * 9 / row["ms"] * 1e3)
    assert 2 * 9 * 4 * SIZE.width * 4 < row["peak_bytes"] < 1e5


def test_out_of_memory_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    build = models.build

    def failing(name, size, positions, device, dtype, seed):
        if dtype == torch.float64:
            raise torch.OutOfMemoryError("no room")
        return build(name, size, positions, device, dtype, seed)

    monkeypatch.setattr(models, "build", failing)
    assert decode.main([*QUICK, "--dtypes", "float64,float32", "--out", str(tmp_path)]) == 0
    found = [(row["dtype"], row["status"], row["reason"]) for row in rows(tmp_path)]
    assert found[:2] == [("float64", "failed", "out of memory"), ("float32", "ok", None)]


def test_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "prefill_row", interrupt)
    assert decode.main([*QUICK, "--out", str(tmp_path)]) == 130
    assert [row["pass"] for row in rows(tmp_path)] == ["decode", "decode"]
