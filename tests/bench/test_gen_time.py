"""The headline curve: the models, the protocols, the record, and how the program fails."""

import itertools
import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from bench_scripts import ROOT, environment

for package in ("matplotlib", "tqdm", "transformers"):
    pytest.importorskip(package)

import gen_time
from generation import models, series

CPU = torch.device("cpu")
EVERYONE = ["rwkv4", "gpt-neox", "opt", "bloom", "gpt-neo"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(gen_time, "WARM_UP", 2)
    monkeypatch.setattr(gen_time.figure, "draw", lambda record, path: path)  # takes long
    monkeypatch.setattr(series, "REPEAT_FOR", math.inf)  # however slow the machine
    for protocol in ("recurrent", "kv-cache"):
        monkeypatch.setitem(series.PASSES, protocol, 2)


def result(folder):
    return json.loads((folder / "gen_time.json").read_text())


def run(folder, *arguments):
    status = gen_time.main(["--device", "cpu", "--out", str(folder), *arguments])
    return status, [(one["status"], one["tokens"]) for one in result(folder)["series"]]


def after(count, event, protocol):
    """Return a protocol that does something when so many tokens are there."""
    whole = models.PROTOCOLS[protocol]

    def steps(model, tokens):
        for n, carried in enumerate(whole(model, tokens)):
            if n == count:
                event()
            yield carried

    return steps


def raising(error):
    def event():
        raise error

    return event


def test_program_writes_a_record_and_names_its_figure(tmp_path, capsys):
    prompt = tmp_path / "secret-name.txt"
    prompt.write_text("Call me Ishmael.")
    status, _ = run(tmp_path, "--tokens", "24", "--prompt", str(prompt), "--models", "rwkv4,opt")
    assert status == 0
    printed = capsys.readouterr()
    assert "24/24" in printed.err  # the progress bar
    assert f"wrote {tmp_path / 'gen_time.json'}, {tmp_path / 'gen_time.png'}" in printed.out
    for text in ("s at 6", "s at 12", "s at 24", "exponent", "ms/token, start", "ms/token, end", "memory", "15.4 kB"):
        assert text in printed.out
    text = (tmp_path / "gen_time.json").read_text()
    assert "secret-name" not in text
    record = json.loads(text)
    assert record["settings"]["prompt_tokens"] == 16
    assert record["settings"]["prompt"] == "Call me Ishmael."
    names = [("rwkv4", "recurrent"), ("opt", "kv-cache"), ("opt", "recompute")]
    assert [(one["name"], one["protocol"]) for one in record["series"]] == names
    size = models.SIZES["tiny"]
    carried = [
        [size.layers * size.width * 5 * 4] * 24,
        [2 * size.layers * size.width * 4 * (16 + n) for n in range(24)],
        [8 * (16 + n + 1) for n in range(24)],
    ]
    assert [one["state_or_cache_bytes"] for one in record["series"]] == carried
    for one in record["series"]:
        assert (one["status"], one["tokens"]) == ("complete", 24)
        assert one["exponent"] is not None
        assert one["graph"] is (False if one["name"] == "rwkv4" else None)
        assert one["cumulative_seconds"][0] > 0
        assert all(a < b for a, b in itertools.pairwise(one["cumulative_seconds"]))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 9 bytes")],
)
def test_out_of_memory_is_recorded_and_the_rest_goes_on(error, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.PROTOCOLS, "kv-cache", after(4, raising(error), "kv-cache"))
    status, outcome = run(tmp_path, "--tokens", "8", "--models", "rwkv4,opt")
    assert status == 0
    assert outcome == [("complete", 8), ("out of memory", 4), ("complete", 8)]
    assert "out of memory at token 4" in capsys.readouterr().out


def test_out_of_memory_while_building_is_recorded(tmp_path, monkeypatch):
    build = models.build

    def failing(name, *rest):
        return raising(torch.OutOfMemoryError("no room"))() if name == "bloom" else build(name, *rest)

    monkeypatch.setattr(models, "build", failing)
    outcome = run(tmp_path, "--tokens", "3", "--models", "bloom,rwkv4")
    assert outcome == (0, [("out of memory", 0), ("out of memory", 0), ("complete", 3)])


def test_other_errors_are_not_hidden(tmp_path, monkeypatch):
    error = RuntimeError("shapes do not match")
    monkeypatch.setitem(models.PROTOCOLS, "kv-cache", after(4, raising(error), "kv-cache"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(tmp_path, "--tokens", "8", "--models", "rwkv4,opt")
    assert result(tmp_path)["series"][0]["tokens"] == 8


def test_time_that_is_over_ends_a_series_and_all_after_it(tmp_path, monkeypatch, capsys):
    args = gen_time.GenTime.parse(["--tokens", "9", "--minutes", "1", "--models", "rwkv4,opt", "--out", str(tmp_path)])
    one = gen_time.GenTime(args)
    assert 50 < one.deadline - time.monotonic() < 61
    over = after(5, lambda: setattr(one, "deadline", -math.inf), "kv-cache")
    monkeypatch.setitem(models.PROTOCOLS, "kv-cache", over)
    one.run()
    outcome = [(entry["status"], entry["tokens"]) for entry in result(tmp_path)["series"]]
    assert outcome == [("complete", 9), ("out of time", 6), ("out of time", 0)]
    assert "out of time at token 6" in one.table(one.record())


def test_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(models.PROTOCOLS, "recompute", after(5, raising(KeyboardInterrupt()), "recompute"))
    outcome = run(tmp_path, "--tokens", "9", "--models", "rwkv4,opt")
    assert outcome == (130, [("complete", 9), ("complete", 9), ("interrupted", 5)])


def test_signal_leaves_measured_data_on_disk(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "gen_time.py"), "--tokens", "100000", "--models", "rwkv4"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)], env=environment(), stdout=pipe, stderr=pipe, text=True, cwd=tmp_path
    )
    try:
        while not ((tmp_path / "gen_time.json").exists() and result(tmp_path)["series"][0]["tokens"] > 16):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "rwkv4 recurrent" in output
    (one,) = result(tmp_path)["series"]
    assert one["status"] == "interrupted"
    assert 16 < one["tokens"] < 100000
    assert one["exponent"] is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gen_time.json", "gen_time.png"]


@pytest.mark.parametrize("name", EVERYONE)
def test_protocols_generate_the_same_tokens(name, monkeypatch):
    size = models.RWKV4Config(layers=3, width=64, vocab_size=256)
    model = models.build(name, size, 40, CPU, torch.float64, seed=0)
    prompt = torch.tensor([list(b"hello")])
    drawn, argmax = [], torch.Tensor.argmax

    def spy(tensor, *args, **options):
        token = argmax(tensor, *args, **options)
        drawn.append(int(token))
        return token

    monkeypatch.setattr(torch.Tensor, "argmax", spy)
    for protocol in ["recurrent"] if name == "rwkv4" else ["kv-cache", "recompute"]:
        steps = models.PROTOCOLS[protocol](model, prompt)
        with torch.inference_mode():
            for _ in range(12):
                next(steps)
    if name == "rwkv4":  # the whole sequence again for every token
        tokens = prompt
        for _ in range(12):
            tokens = torch.cat((tokens, model(tokens)[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert len(drawn) == 24
    assert drawn[:12] == drawn[12:]


@pytest.mark.parametrize("name", EVERYONE)
def test_models_of_one_size_have_its_layers_width_and_vocabulary(name):
    size = models.SIZES["169m"]
    model = models.build(name, size, 40, torch.device("meta"), torch.float32, seed=0)
    embedding = next(p for p in model.parameters() if p.shape[0] == size.vocab_size)
    assert tuple(embedding.shape) == (50277, 768)
    weights = sum(p.numel() for p in model.parameters())
    blocks = (13 if name == "rwkv4" else 12) * 768**2 * 12
    ends = (2 if name in ("rwkv4", "gpt-neox") else 1) * 50277 * 768  # the others tie embedding and head
    assert weights == pytest.approx(blocks + ends, rel=0.005)


def test_weights_are_random_but_those_of_the_seed():
    rwkv = models.build("rwkv4", models.SIZES["tiny"], 8, CPU, torch.float32, seed=0)
    assert all(parameter.any() for parameter in rwkv.parameters() if parameter.dim() == 2)

    def weights(seed):
        model = models.build("gpt-neox", models.SIZES["tiny"], 8, CPU, torch.float32, seed)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
