"""The headline curve's program: what it measures, what it writes, how it fails."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_scripts import BAD_DEVICE, BAD_OPTION, ROOT, assert_help_names, bad_results, environment, run_script

SCRIPT = ROOT / "bench" / "gen_time.py"

for package in ("matplotlib", "tqdm", "transformers"):
    pytest.importorskip(package)


import gen_time
from generation import models, options, series


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gen_time, "WARM_UP", 2)
    monkeypatch.setattr(gen_time, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(series, "REPEAT_FOR", math.inf)  # however slow the machine
    for protocol in ("recurrent", "kv-cache"):
        monkeypatch.setitem(series.PASSES, protocol, 2)
    monkeypatch.setattr(gen_time.figure, "draw", lambda record, path: path.write_text("a figure"))


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gen_time.json").read_text())


def failing_after(count: int, error: BaseException, protocol: str) -> Callable[[Any, Any], Iterator[Any]]:
    whole = models.PROTOCOLS[protocol]

    def steps(model: Any, tokens: Any) -> Iterator[Any]:
        for n, carried in enumerate(whole(model, tokens)):
            if n == count:
                raise error
            yield carried

    return steps


def test_command_line_writes_figure_and_record(tmp_path: Path) -> None:
    done = run_script("gen_time.py", "--tokens", "24", "--models", "rwkv4,gpt-neox", "--out", "new", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["gen_time.json", "gen_time.png"]
    assert (tmp_path / "new" / "gen_time.png").read_bytes().startswith(b"\x89PNG")
    assert "24/24" in done.stderr  # the progress bar
    for text in ("s at 6", "s at 12", "s at 24", "exponent", "ms/token, start", "ms/token, end", "memory", "15.4 kB"):
        assert text in done.stdout

    record = result(tmp_path / "new")
    assert record["device"]["type"] == "cpu" or torch.cuda.is_available()
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "fastwkv", "transformers"} <= record["versions"].keys()
    assert {"size", "tokens", "dtype", "seed", "prompt_tokens", "layers", "width"} <= record["settings"].keys()
    assert [(one["name"], one["protocol"]) for one in record["series"]] == [
        ("rwkv4", "recurrent"),
        ("gpt-neox", "kv-cache"),
        ("gpt-neox", "recompute"),
    ]
    for one in record["series"]:
        assert one["status"] == "complete"
        assert one["tokens"] == 24
        assert one["exponent"] is not None
        assert one["graph"] is (torch.cuda.is_available() if one["name"] == "rwkv4" else None)
        seconds, carried = one["cumulative_seconds"], one["state_or_cache_bytes"]
        assert len(seconds) == len(carried) == 24
        assert seconds[0] > 0
        assert all(a < b for a, b in itertools.pairwise(seconds))


def test_record_names_neither_host_nor_paths(tmp_path: Path) -> None:
    prompt = tmp_path / "secret-name.txt"
    prompt.write_text("Call me Ishmael.")
    assert gen_time.main(["--tokens", "3", "--models", "rwkv4", "--out", str(tmp_path), "--prompt", str(prompt)]) == 0
    text = (tmp_path / "gen_time.json").read_text()
    for name in (os.uname().nodename, str(ROOT), str(tmp_path), "secret-name", str(Path.home())):
        assert name not in text or len(name) < 2
    assert result(tmp_path)["settings"]["prompt_tokens"] == 16


def test_state_is_constant_and_cache_grows(tmp_path: Path) -> None:
    assert gen_time.main(["--tokens", "5", "--models", "rwkv4,opt", "--out", str(tmp_path)]) == 0
    state, cache, text = (one["state_or_cache_bytes"] for one in result(tmp_path)["series"])
    size, prompt = models.SIZES["tiny"], len(options.PROMPT)
    assert state == [size.layers * size.width * 5 * 4] * 5
    assert cache == [2 * size.layers * size.width * 4 * (prompt + n) for n in range(5)]
    assert text == [8 * (prompt + n + 1) for n in range(5)]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 9 bytes")],
)
def test_out_of_memory_is_recorded_and_the_rest_goes_on(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(models.PROTOCOLS, "kv-cache", failing_after(4, error, "kv-cache"))
    assert gen_time.main(["--tokens", "8", "--out", str(tmp_path)]) == 0
    rwkv, cache, recompute = result(tmp_path)["series"]
    assert (cache["status"], cache["tokens"], len(cache["cumulative_seconds"])) == ("out of memory", 4, 4)
    assert (rwkv["status"], rwkv["tokens"]) == (recompute["status"], recompute["tokens"]) == ("complete", 8)
    assert "out of memory at token 4" in capsys.readouterr().out
    assert (tmp_path / "gen_time.png").exists()


def test_out_of_memory_while_building_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = models.build

    def failing(name: str, *rest: Any) -> Any:
        if name == "bloom":
            raise torch.OutOfMemoryError("no room")
        return build(name, *rest)

    monkeypatch.setattr(models, "build", failing)
    assert gen_time.main(["--tokens", "3", "--models", "bloom,rwkv4", "--out", str(tmp_path)]) == 0
    statuses = [(one["status"], one["tokens"]) for one in result(tmp_path)["series"]]
    assert statuses == [("out of memory", 0), ("out of memory", 0), ("complete", 3)]


def test_other_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("shapes do not match")
    monkeypatch.setitem(models.PROTOCOLS, "kv-cache", failing_after(4, error, "kv-cache"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        gen_time.main(["--tokens", "8", "--out", str(tmp_path)])
    assert result(tmp_path)["series"][0]["tokens"] == 8


def test_time_that_is_over_ends_a_series_and_all_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kv_cache, seconds = models.PROTOCOLS["kv-cache"], [0.0]
    monkeypatch.setattr(gen_time, "time", SimpleNamespace(monotonic=lambda: seconds[0]))

    def slow(model: Any, tokens: Any) -> Iterator[Any]:
        for n, carried in enumerate(kv_cache(model, tokens)):
            if n == 5:
                seconds[0] = 61.0
            yield carried

    monkeypatch.setitem(models.PROTOCOLS, "kv-cache", slow)
    assert gen_time.main(["--tokens", "9", "--minutes", "1", "--out", str(tmp_path)]) == 0
    outcome = [(one["status"], one["tokens"]) for one in result(tmp_path)["series"]]
    assert outcome == [("complete", 9), ("out of time", 6), ("out of time", 0)]
    assert "out of time at token 6" in capsys.readouterr().out
    assert (tmp_path / "gen_time.png").exists()


def test_interrupt_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.PROTOCOLS, "recompute", failing_after(5, KeyboardInterrupt(), "recompute"))
    assert gen_time.main(["--tokens", "9", "--out", str(tmp_path)]) == 130
    outcome = [(one["status"], one["tokens"]) for one in result(tmp_path)["series"]]
    assert outcome == [("complete", 9), ("complete", 9), ("interrupted", 5)]
    assert (tmp_path / "gen_time.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_measured_data_on_disk(number: int, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--tokens", "100000", "--models", "rwkv4", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which shells let background jobs ignore
    )
    try:
        while not ((tmp_path / "gen_time.json").exists() and result(tmp_path)["series"][0]["tokens"] > 16):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
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


BAD = {
    "unknown model 'gpt-5' (choose from rwkv4, gpt-neox, opt, bloom, gpt-neo)": ["--models", "rwkv4,gpt-5"],
    "unknown protocol 'beam' (choose from recompute, kv-cache)": ["--protocols", "beam"],
    "argument --size: invalid choice: '5b'": ["--size", "5b"],
    "argument --dtype: invalid choice: 'int8'": ["--dtype", "int8"],
    "--tokens must be at least 1, got 0": ["--tokens", "0"],
    "argument --tokens: invalid int value: 'many'": ["--tokens", "many"],
    "cannot read the prompt 'nowhere': No such file or directory": ["--prompt", "nowhere"],
    "the prompt 'file' is empty": ["--prompt", "file"],
    "argument --minutes: expected a whole number of at least 1, got '0'": ["--minutes", "0"],
    **BAD_OPTION,
    **BAD_DEVICE,
    **bad_results("gen_time"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_give_one_line_and_status_2(message: str, refused: Callable[..., None]) -> None:
    refused(gen_time, BAD[message], message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_gives_status_2(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit) as stopped:
        gen_time.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert_help_names(gen_time, "size tokens device dtype models protocols prompt out seed minutes", capsys)
