"""The program learning_curve.py: what it writes, how it goes on, and what it says."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import BAD_DEVICE, BAD_OPTION, assert_help_names, assert_refused, bad_results, run_script

for package in ("matplotlib", "safetensors", "tqdm", "transformers"):
    pytest.importorskip(package)

import learning_curve
import learning_curve_results as results
import learning_curve_training as training

TINY = ["--layers", "1", "--width", "32", "--length", "16", "--batch", "2", "--steps", "20", "--threads", "1"]
TINY += ["--device", "cpu", "--text", "text"]
FILES = ["learning_curve.json", "learning_curve.png"]
YARDSTICKS = [
    "trigram of all training text",
    "trigram of what the models saw",
    "unigram of all training text",
    "gzip -9",
]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("".join(f"line {n}: {n * n} is the square of {n}\n" for n in range(100)))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def record(folder: str = ".") -> dict[str, Any]:
    return json.loads(Path(folder, "learning_curve.json").read_text())


def curves(folder: str) -> dict[str, list[float]]:
    return {row["model"]: row["curve"] for row in record(folder)["rows"]}


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, model: str = "transformer") -> None:
    """Let Ctrl-C come in the middle of a step, once."""
    loss = training.Training.loss

    def stopping(one: Any, batch: Any) -> Any:
        if one.settings.model == model and one.position == step:
            monkeypatch.setattr(training.Training, "loss", loss)
            signal.raise_signal(signal.SIGTERM)
        return loss(one, batch)

    monkeypatch.setattr(training.Training, "loss", stopping)


def test_command_line_writes_figure_and_record() -> None:
    done = run_script("learning_curve.py", *TINY, "--out", "new", folder=Path())
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in Path("new").iterdir()) == FILES  # no checkpoint is left
    assert Path("new/learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "40/40" in done.stderr  # the progress bar
    assert all(f"| {name} " in done.stdout for name in ("RWKV-4", "RWKV-4, state carried", "Transformer", *YARDSTICKS))

    found = record("new")
    assert found["benchmark"] == "learning_curve"
    assert found["device"]["threads"] == 1
    assert {"python", "fastwkv", "torch", "transformers", "safetensors"} <= found["versions"].keys()
    sizes = {"layers": 1, "width": 32, "length": 16, "batch": 2, "steps": 20}
    assert sizes.items() <= found["settings"].items()
    size = Path("text").stat().st_size
    text = {"title": "text", "training_bytes": size - size // 20, "held_out_bytes": size // 20, "held_out_documents": 1}
    assert found["text"] == text
    assert list(found["yardsticks"]) == YARDSTICKS
    assert [row["model"] for row in found["rows"]] == ["rwkv4", "transformer"]
    for row in found["rows"]:
        assert len(row["curve"]) == 2  # 16 steps, and what is left
        assert row["bytes"] == 20 * 2 * 16
        assert row["steps_per_second"] > 0
        assert 3 < row["bits"] < 8
        assert (row["carried_bits"] is None) == (row["model"] == "transformer")
    assert found["rows"][0]["recipe"]["betas"] == [0.9, 0.99]


@pytest.mark.unpoisoned
def test_interrupted_run_goes_on_to_the_same_curves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "EVERY", 3)
    assert learning_curve.main([*TINY, "--out", "whole"]) == 0
    interrupt_at(8, monkeypatch)
    assert learning_curve.main([*TINY, "--out", "part"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(path.name for path in Path("part").iterdir()) == [
        "learning_curve.rwkv4.safetensors",
        "learning_curve.transformer.safetensors",
    ]
    assert learning_curve.main([*TINY, "--out", "part"]) == 0
    printed = capsys.readouterr().err
    assert "RWKV-4 goes on from step 20" in printed
    assert "Transformer goes on from step 6" in printed
    assert curves("part") == curves("whole")
    assert [row["bits"] for row in record("part")["rows"]] == [row["bits"] for row in record("whole")["rows"]]
    assert sorted(path.name for path in Path("part").iterdir()) == FILES


def test_checkpoint_of_other_options_is_refused_unless_the_run_is_fresh(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "EVERY", 3)
    interrupt_at(8, monkeypatch, "rwkv4")
    assert learning_curve.main(TINY) == 130
    capsys.readouterr()
    message = "'learning_curve.rwkv4.safetensors' is of a run with seed 0 and not 1; --fresh starts again"
    assert_refused(learning_curve, [*TINY, "--seed", "1"], message, capsys)
    assert learning_curve.main([*TINY, "--seed", "1", "--fresh"]) == 0
    assert "goes on" not in capsys.readouterr().err
    assert record()["settings"]["seed"] == 1


OPTIONS = {
    "truncated": ["--truncated"],
    "packed": ["--packed"],
    "gradient_checkpointing": ["--gradient-checkpointing"],
    "bfloat16": ["--bfloat16"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_reach_rwkv4_and_are_recorded(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert learning_curve.main([*TINY, "--models", "rwkv4", *OPTIONS[option]]) == 0
    (row,) = record()["rows"]
    assert row["options"] == [option]
    assert f"| RWKV-4, {option.replace('_', ' ')} " in capsys.readouterr().out
    assert row["curve"][1] < row["curve"][0]


def test_rate_and_seed_change_the_curve_and_the_same_ones_do_not() -> None:
    alone = [*TINY, "--models", "rwkv4"]
    for folder, more in {"a": [], "b": [], "rate": ["--rate", "0.01"], "seed": ["--seed", "1"]}.items():
        assert learning_curve.main([*alone, *more, "--out", folder]) == 0
    assert curves("a") == curves("b")
    assert curves("a") != curves("rate")
    assert curves("a") != curves("seed")
    assert record("rate")["rows"][0]["recipe"]["rate"] == 0.01


def test_quick_run_is_of_smaller_models_and_fewer_steps() -> None:
    parser = learning_curve.command_line()
    full, quick = (
        learning_curve.parse(parser, ["--text", "text", "--batch", "1", *more]) for more in ([], ["--quick"])
    )
    for name in ("layers", "width", "length", "steps"):
        assert getattr(quick, name) == learning_curve.QUICK[name] < getattr(full, name) == learning_curve.FULL[name]
    assert full.batch == quick.batch == 1


def bits(rwkv4: float, transformer: float | None = None) -> dict[str, Any]:
    rows = [{"model": "rwkv4", "bits": rwkv4}]
    rows += [] if transformer is None else [{"model": "transformer", "bits": transformer}]
    yardsticks = {"trigram of all training text": 2.6, "trigram of what the models saw": 2.7, "gzip -9": 2.0}
    return {"rows": rows, "yardsticks": yardsticks}


def test_what_was_missed_is_said() -> None:
    assert results.missed(bits(2.5, 2.45)) == []
    assert results.missed(bits(2.5)) == []
    assert results.missed(bits(2.65)) == [
        "RWKV-4 needs 2.650 bits a byte, not fewer than the trigram of all training text with 2.600"
    ]
    assert results.missed(bits(2.5, 2.4)) == [
        "RWKV-4 needs 2.500 bits a byte, 4.2 % more than the transformer with 2.400"
    ]
    assert len(results.missed(bits(2.6, 2.5))) == 2
    assert len(results.missed(bits(float("nan"), 2.5))) == 2


def test_points_of_a_curve_are_means_in_bits() -> None:
    nats = [0.6931471805599453 * value for value in [*range(16), 3.0, 5.0]]
    assert results.curve(nats) == pytest.approx([7.5, 4])


def test_diverged_training_is_drawn_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = training.Training.loss
    monkeypatch.setattr(training.Training, "loss", lambda one, batch: loss(one, batch) * float("nan"))
    assert learning_curve.main(TINY) == 0
    assert curves(".") == {"rwkv4": [None, None], "transformer": [None, None]}
    assert Path("learning_curve.png").exists()


BAD = {
    "unknown model 'lstm' (choose from rwkv4, transformer)": ["--models", "lstm"],
    "argument --steps: expected a whole number of at least 1, got '0'": ["--steps", "0"],
    "argument --width: expected a whole number of at least 1, got 'wide'": ["--width", "wide"],
    "--width must be a multiple of 32, got 100": ["--width", "100"],
    "argument --rate: expected a positive number, got 'fast'": ["--rate", "fast"],
    "argument --rate: expected a positive number, got '0'": ["--rate", "0"],
    "argument --seed: invalid int value: 'x'": ["--seed", "x"],
    "argument --packed: not allowed with argument --truncated": ["--truncated", "--packed"],
    "cannot read 'nothing': No such file or directory": ["--text", "nothing"],
    "cannot read 'other': Is a directory": ["--text", "other"],
    "the text must have at least 20 bytes, got 4": ["--text", "short"],
    "the text must have at least 4112 bytes, got ": ["--text", "text", "--length", "256", "--batch", "16"],
    "'kept/learning_curve.rwkv4.safetensors' is not a checkpoint of this program; --fresh starts again": [
        *TINY,
        "--out",
        "kept",
    ],
    **BAD_OPTION,
    **BAD_DEVICE,
    **bad_results("learning_curve"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_give_one_line_and_status_2(message: str, refused: Callable[..., None]) -> None:
    Path("short").write_text("tiny")
    Path("kept").mkdir()
    Path("kept/learning_curve.rwkv4.safetensors").write_text("no checkpoint")
    refused(learning_curve, BAD[message], message)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    options = "models text quick layers width length batch steps rate seed truncated packed gradient-checkpointing"
    assert_help_names(learning_curve, f"{options} bfloat16 fresh device threads out", capsys)
