"""The headline curve's program: what it measures, what it writes, how it fails."""

import importlib
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
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gen_time.py"

for package in ("matplotlib", "tqdm", "transformers"):
    pytest.importorskip(package)


def load(name: str) -> ModuleType:
    """Import a module of bench/, which is a folder of scripts and no package."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


gen_time, series, figure, models = map(load, ("gen_time", "gen_time_series", "gen_time_figure", "gen_time_models"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gen_time, "WARM_UP", 2)
    monkeypatch.setattr(gen_time, "SAVE_EVERY", 0.0)
    for protocol in ("recurrent", "kv-cache"):
        monkeypatch.setitem(series.PASSES, protocol, 2)
    monkeypatch.setattr(gen_time.figure, "draw", lambda record, path: path.write_text("a figure"))


draw = figure.draw


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
    command = [
        sys.executable,
        str(SCRIPT),
        "--tokens",
        "24",
        "--models",
        "rwkv4,gpt-neox",
        "--out",
        str(tmp_path / "new"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, cwd=tmp_path)
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
    size, prompt = models.SIZES["tiny"], len(gen_time_prompt())
    assert state == [size.layers * size.width * 5 * 4] * 5
    assert cache == [2 * size.layers * size.width * 4 * (prompt + n) for n in range(5)]
    assert text == [8 * (prompt + n + 1) for n in range(5)]


def gen_time_prompt() -> str:
    return load("gen_time_options").PROMPT


@pytest.mark.parametrize("name", ["rwkv4", "gpt-neox", "opt", "bloom", "gpt-neo"])
def test_protocols_generate_the_same_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = models.RWKV4Config(layers=3, width=64, vocab_size=256)
    model = models.build(name, size, 40, torch.device("cpu"), torch.float64, seed=0)
    prompt = torch.tensor([list(b"hello")])
    drawn: list[int] = []
    argmax = torch.Tensor.argmax

    def spy(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        token = argmax(tensor, *args, **options)
        drawn.append(int(token))
        return token

    monkeypatch.setattr(torch.Tensor, "argmax", spy)
    texts = []
    for protocol in ["recurrent"] if name == "rwkv4" else ["kv-cache", "recompute"]:
        drawn.clear()
        steps = models.PROTOCOLS[protocol](model, prompt)
        with torch.inference_mode():
            for _ in range(12):
                next(steps)
        texts.append(list(drawn))
    if name == "rwkv4":
        from fastwkv.nn import generate

        texts.append([int(token) for token in generate(model, prompt, 12)])
    assert len(texts[0]) == 12
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["rwkv4", "gpt-neox", "opt", "bloom", "gpt-neo"])
def test_models_of_one_size_have_its_layers_width_and_vocabulary(name: str) -> None:
    size = models.SIZES["169m"]
    model = models.build(name, size, 40, torch.device("meta"), torch.float32, seed=0)
    embedding = next(p for p in model.parameters() if p.shape[0] == size.vocab_size)
    assert tuple(embedding.shape) == (50277, 768)
    weights = sum(p.numel() for p in model.parameters())
    blocks = (13 if name == "rwkv4" else 12) * 768**2 * 12
    ends = (2 if name in ("rwkv4", "gpt-neox") else 1) * 50277 * 768  # the others tie embedding and head
    assert weights == pytest.approx(blocks + ends, rel=0.005)


def test_random_rwkv_has_no_zero_matrix() -> None:
    model = models.build("rwkv4", models.SIZES["tiny"], 8, torch.device("cpu"), torch.float32, seed=0)
    assert all(parameter.any() for parameter in model.parameters() if parameter.dim() == 2)


def test_same_seed_builds_the_same_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = models.build("gpt-neox", models.SIZES["tiny"], 8, torch.device("cpu"), torch.float32, seed)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


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
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "gen_time.json").exists() and result(tmp_path)["series"][0]["tokens"] > 16):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        output, errors = process.communicate(timeout=200)
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
    "unknown device 'abacus'": ["--device", "abacus"],
    "unknown device 'meta'": ["--device", "meta"],
    "there is no device 'cuda:99'": ["--device", "cuda:99"],
    "argument --size: invalid choice: '5b'": ["--size", "5b"],
    "argument --dtype: invalid choice: 'int8'": ["--dtype", "int8"],
    "--tokens must be at least 1, got 0": ["--tokens", "0"],
    "argument --tokens: invalid int value: 'many'": ["--tokens", "many"],
    "cannot read the prompt 'nowhere.txt': No such file or directory": ["--prompt", "nowhere.txt"],
    "the prompt 'empty.txt' is empty": ["--prompt", "empty.txt"],
    "cannot write into 'empty.txt/results': Not a directory": ["--out", "empty.txt/results"],
    "unrecognized arguments: --fast": ["--fast"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_give_one_line_and_status_2(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    with pytest.raises(SystemExit) as stopped:
        gen_time.main(BAD[message])
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in printed.err
    assert printed.err.startswith("gen_time.py: ")
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert not Path("gen_time.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_gives_status_2(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit) as stopped:
        gen_time.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gen_time.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in ("size", "tokens", "device", "dtype", "models", "protocols", "prompt", "out", "seed"):
        assert f"--{option} " in text
    assert all(len(line) <= 120 for line in text.splitlines())


@given(st.floats(0.5, 3.0), st.floats(1e-6, 1e2), st.integers(16, 2000), st.floats(0, 1e3))
@settings(max_examples=50, deadline=None)
def test_exponent_of_a_power_law_is_its_power(power: float, scale: float, tokens: int, prompt: float) -> None:
    cumulative = [
        scale * (prompt + n**power) for n in range(tokens)
    ]  # the first token is there when the prompt is read
    assert series.exponent(cumulative) == pytest.approx(power, abs=1e-3)


def test_exponent_of_mixed_growth_lies_between() -> None:
    cumulative = [1e-3 * n + 1e-5 * n * n for n in range(1, 1025)]
    exact = (1e-3 * 400 + 2e-5 * 400**2) / (1e-3 * 400 + 1e-5 * 400**2)  # the local slope in the middle of the fit
    assert series.exponent(cumulative) == pytest.approx(exact, abs=0.05)


def test_exponent_needs_16_tokens() -> None:
    assert series.exponent([0.1 * n for n in range(1, 16)]) is None
    assert series.exponent([0.1 * n for n in range(1, 17)]) == pytest.approx(1)


def test_passes_combine_to_the_median_of_each_token() -> None:
    one = series.Series("rwkv4", "recurrent", seconds=[[1, 2, 30, 4], [1, 20, 3, 4], [10, 2, 3]])
    assert one.cumulative == [1, 3, 6, 10]
    assert series.Series("rwkv4", "recurrent").cumulative == []


def test_slow_series_makes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps() -> Iterator[torch.Tensor]:
        while True:
            yield torch.zeros(3)

    quick, slow = series.Series("rwkv4", "recurrent"), series.Series("rwkv4", "recurrent")
    series.measure(quick, steps, 2, lambda: None, lambda: None)
    monkeypatch.setattr(series, "REPEAT_FOR", 0.0)
    series.measure(slow, steps, 2, lambda: None, lambda: None)
    assert (len(quick.seconds), len(slow.seconds)) == (series.PASSES["recurrent"], 1)


def test_clock_stops_only_when_the_device_has_finished() -> None:
    events: list[str] = []

    def steps() -> Iterator[torch.Tensor]:
        while True:
            events.append("step")
            yield torch.zeros(3)

    one = series.Series("rwkv4", "recompute")
    series.measure(one, steps, 2, lambda: events.append("synchronize"), lambda: events.append("tick"))
    assert events == ["step", "synchronize", "tick"] * 2
    assert one.carried == [12, 12]
    assert len(one.cumulative) == 2


@given(st.lists(st.floats(-50, 450), min_size=1, max_size=9), st.floats(1, 40))
def test_labels_stand_apart_and_keep_their_order(positions: list[float], gap: float) -> None:
    moved = figure.spread(positions, gap, 0, 400)
    order = sorted(range(len(positions)), key=positions.__getitem__)
    ordered = [moved[i] for i in order]
    assert all(b - a >= gap * (1 - 1e-9) for a, b in itertools.pairwise(ordered))
    assert min(moved) >= -1e-6
    assert max(moved) <= 400 + 1e-6
    room = all(b - a >= gap for a, b in zip(sorted(positions), sorted(positions)[1:], strict=False))
    if room and min(positions) >= 0 and max(positions) <= 400 - gap * (len(positions) - 1):
        assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(moved, positions, strict=True))


@pytest.mark.parametrize("measured", [False, True])
def test_figure_shows_whatever_was_measured(measured: bool, tmp_path: Path) -> None:
    runs = [
        series.Series("rwkv4", "recurrent", "complete", 1, [[0.1] * 40]),
        series.Series("gpt-neox", "kv-cache", "interrupted", 1, [[0.1] * 20, [0.2]]),
        series.Series("bloom", "recompute", "out of memory", 1, [[0.1 * n for n in range(1, 9)]]),
        series.Series("opt", "recompute", "out of memory"),
        series.Series("gpt-neo", "recompute"),
    ]
    settings = {"layers": 1, "width": 1, "dtype": "float32", "prompt_tokens": 1}
    device = {"type": "cpu", "name": "a chip", "threads": 1}
    record = {
        "series": [one.record() for one in (runs if measured else runs[3:])],
        "settings": settings,
        "device": device,
    }
    draw(record, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
