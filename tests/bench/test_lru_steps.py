"""The LRU paper's steps as an experiment: that a ring near the unit circle learns, and how the program behaves."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import BAD_DEVICE, BAD_OPTION, assert_help_names, bad_results, interrupt, run_script
from torch import nn

CPU = torch.device("cpu")

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)


import lru_steps
import lru_steps_models as models
import lru_steps_tasks as tasks
import lru_steps_training as training

pytestmark = pytest.mark.usefixtures("one_thread")
DIGITS, COPY = tasks.TASKS["digits"], tasks.TASKS["copy-100"]


def trained(task: Any, model: str, steps: int, seed: int = 0) -> Any:
    one = training.Training(task, model, seed)
    one.run(CPU, steps, lambda: None)
    return one


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "lru_steps.json").read_text())


@pytest.mark.unpoisoned
def test_digits_are_learned_from_the_ring_and_not_from_a_short_memory() -> None:
    ring, short = (trained(DIGITS, model, 120) for model in ("lru", "short"))
    assert ring.accuracy > 0.9
    assert 0.15 < short.accuracy < 0.6  # the last pixels tell something
    assert ring.losses[-1] < 0.5 < short.losses[-1]
    assert short.radius < 0.6 < 0.9 < ring.radius < 1


@pytest.mark.unpoisoned
def test_copying_is_learned_from_the_ring_and_not_from_a_short_memory() -> None:
    task = replace(COPY, delay=30, hidden=64, state=64)
    ring, short = (trained(task, model, 80) for model in ("lru", "short"))
    assert ring.accuracy > 0.9
    assert short.accuracy < 0.2


@pytest.mark.parametrize("model", models.NAMES)
def test_training_is_the_same_again_and_another_with_another_seed(model: str) -> None:
    task = replace(DIGITS, models=(model,))
    first, again, other = (trained(task, model, 3, seed) for seed in (1, 1, 2))
    assert first.losses == again.losses
    assert first.accuracy == again.accuracy
    assert first.losses != other.losses


@pytest.mark.parametrize("model", models.NAMES)
@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=tasks.TASKS)
def test_networks_of_a_task_have_equally_many_parameters(task: Any, model: str) -> None:
    wanted, found = (sum(p.numel() for p in models.Network(task, name).parameters()) for name in ("lru", model))
    assert found == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("model", models.NAMES)
def test_every_network_reads_digits_in_order_and_learns_with_all_parameters(model: str) -> None:
    network = models.Network(replace(DIGITS, dropout=0.0), model)
    x = torch.rand(4, 64, 1)
    scores = network(x)
    assert scores.shape == (4, 1, 10)
    scores.logsumexp(-1).sum().backward()
    learned = [p for p in network.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert [name.rpartition(".")[2] for name in frozen] == ["gamma_log"] * (2 if model == "ring" else 0)


@pytest.mark.parametrize("kind", [models.TanhRNN, models.LinearRNN, models.Diagonal])
def test_recurrences_are_what_they_say(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer, u = kind(5, 7).double(), torch.randn(2, 9, 5, dtype=torch.float64)
    if kind is models.Diagonal:
        A = torch.complex(layer.a_re, layer.a_im).diag()
        B, C = torch.complex(layer.B_re, layer.B_im), torch.complex(layer.C_re, layer.C_im)
    else:
        A, B, C = layer.rnn.weight_hh_l0, layer.rnn.weight_ih_l0, layer.C.weight
    h, wanted = torch.zeros(2, 7, dtype=A.dtype), []
    for u_t in u.unbind(1):
        h = h @ A.T + u_t.to(A.dtype) @ B.T
        h = h.tanh() if kind is models.TanhRNN else h
        wanted.append((h @ C.T).real + layer.D * u_t)
    assert torch.allclose(layer(u), torch.stack(wanted, 1), rtol=1e-12, atol=1e-12)
    assert layer.radius() == pytest.approx(float(torch.linalg.eigvals(A.detach()).abs().max()))


@pytest.mark.parametrize("model", [name for name in models.NAMES if name not in ("ring", "lru", "short")])
def test_eigenvalues_train_at_the_smaller_rate_in_every_network(model: str) -> None:
    network = models.Network(DIGITS, model)
    recurrent, *others = training.groups(network, 1e-3)
    assert recurrent["lr"] == 0.25e-3
    assert recurrent["weight_decay"] == 0
    assert [(group["lr"], group["weight_decay"]) for group in others] == [(1e-3, 0.05)] * len(others)
    assert sum(len(group["params"]) for group in (recurrent, *others)) == len(list(network.parameters()))
    assert len(recurrent["params"]) == DIGITS.blocks * (4 if model == "diagonal" else 2)


def test_digits_are_split_once_and_shown_in_full() -> None:
    train, test = tasks.digits()
    assert (train.x.shape, train.y.shape) == ((1437, 64, 1), (1437, 1))
    assert (test.x.shape, test.y.shape) == ((360, 64, 1), (360, 1))
    assert float(train.x.min()) == 0
    assert float(train.x.max()) == 1
    assert torch.equal(test.x, tasks.digits()[1].x)
    share = torch.bincount(test.y.flatten()) / torch.bincount(train.y.flatten())
    assert float(share.max() - share.min()) < 0.02
    together = {tuple(row) for row in train.x.flatten(1).tolist()} & {tuple(row) for row in test.x.flatten(1).tolist()}
    assert not together


def test_shuffled_batches_show_each_example_once_a_round() -> None:
    examples = tasks.Examples(torch.arange(10.0)[:, None, None], torch.arange(10)[:, None])
    batches = tasks.shuffled(examples, 4, torch.Generator().manual_seed(0))
    rounds = [torch.cat([next(batches).y for _ in range(2)]).flatten().tolist() for _ in range(3)]
    assert all(len(set(one)) == 8 for one in rounds)
    assert rounds[0] != rounds[1]


def test_copy_memory_shows_symbols_then_blanks_then_asks() -> None:
    examples = tasks.copy_memory(16, 25, torch.Generator().manual_seed(0))
    assert (examples.x.shape, examples.y.shape) == ((16, 45, 10), (16, 10))
    tokens = examples.x.argmax(-1)
    assert bool((examples.x.sum(-1) == 1).all())
    assert torch.equal(tokens[:, :10], examples.y)
    assert bool((tokens[:, 34] == tasks.GO).all())
    blank = torch.cat((tokens[:, 10:34], tokens[:, 35:]), 1)
    assert bool((blank == tasks.BLANK).all())
    assert examples.y.unique().tolist() == list(range(8))


def test_rate_rises_then_falls_to_nothing() -> None:
    rates = [training.relative_rate(step, 100) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == max(rates) == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0)
    assert training.relative_rate(0, 1) == 1


def test_command_line_writes_figure_and_record(tmp_path: Path) -> None:
    arguments = ["--steps", "6", "--seeds", "1", "--tasks", "digits", "--out", "new"]
    done = run_script("lru_steps.py", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["lru_steps.json", "lru_steps.png"]
    assert (tmp_path / "new" / "lru_steps.png").read_bytes().startswith(b"\x89PNG")
    assert "36/36" in done.stderr  # the progress bar
    assert all(name in done.stdout for name in models.NAMES.values())
    assert "| task " in done.stdout

    record = result(tmp_path / "new")
    assert record["benchmark"] == "lru_steps"
    assert record["device"]["threads"] == 1
    assert {"python", "fastwkv", "torch", "scikit-learn"} <= record["versions"].keys()
    assert record["settings"]["seeds"] == 1
    assert record["settings"]["tasks"]["digits"]["steps"] == 6
    assert [(row["task"], row["model"], row["seed"]) for row in record["rows"]] == [
        ("digits", model, 0) for model in models.NAMES
    ]
    for row in record["rows"]:
        assert (row["status"], row["steps"]) == ("complete", 6)
        assert 0 <= row["accuracy"] <= 1
        assert row["steps_per_second"] > 0
        assert row["radius"] > 0
        assert row["parameters"] > 50_000
        assert len(row["loss_curve"]) == len(row["accuracy_curve"]) == 2


def test_every_task_model_and_seed_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "COPY_TEST", 4)
    small = [replace(task, hidden=8, state=8, real_state=8, batch=2) for task in tasks.TASKS.values()]
    for task in small:
        monkeypatch.setitem(tasks.TASKS, task.name, task)
    assert lru_steps.main(["--seeds", "2", "--steps", "2", "--out", str(tmp_path)]) == 0
    assert [(row["task"], row["model"], row["seed"]) for row in result(tmp_path)["rows"]] == [
        (task.name, model, seed) for task in small for model in task.models for seed in (0, 1)
    ]
    assert (tmp_path / "lru_steps.png").exists()


def test_quick_run_is_one_seed_of_fewer_steps(tmp_path: Path) -> None:
    args = lru_steps.parse(["--quick", "--out", str(tmp_path)])
    run = lru_steps.Run(args)
    assert [task.name for task in args.tasks] == ["digits", "copy-100"]
    assert {one.seed for one in run.trainings} == {0}
    steps = run.record()["settings"]["tasks"]
    assert all(steps[task.name]["steps"] == task.quick_steps < task.steps for task in (DIGITS, COPY))


def test_interrupt_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = training.Training.run

    def stopping(one: Any, device: torch.device, steps: int, tick: Any) -> None:
        ticks = iter(range(8))

        def stop() -> None:
            tick()
            if one.model == "short" and next(ticks) == 7:
                interrupt()

        whole(one, device, steps, stop)

    monkeypatch.setattr(training.Training, "run", stopping)
    monkeypatch.setitem(tasks.TASKS, "copy-100", replace(COPY, models=("lru", "short", "ring"), batch=2))
    assert lru_steps.main(["--tasks", "copy-100", "--seeds", "1", "--steps", "10", "--out", str(tmp_path)]) == 130
    outcome = [(row["status"], row["steps"], len(row["loss_curve"])) for row in result(tmp_path)["rows"]]
    assert outcome == [("complete", 10, 2), ("interrupted", 8, 2), ("not run", 0, 0)]
    assert (tmp_path / "lru_steps.png").exists()
    assert "interrupted" in capsys.readouterr().err


def test_diverged_training_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.Diagonal, "forward", lambda self, u: u * float("nan"))
    monkeypatch.setitem(tasks.TASKS, "digits", replace(DIGITS, models=("diagonal",)))
    assert lru_steps.main(["--tasks", "digits", "--seeds", "1", "--steps", "2", "--out", str(tmp_path)]) == 0
    (row,) = result(tmp_path)["rows"]
    assert (row["status"], row["radius"], row["loss_curve"]) == ("complete", None, [None])
    assert 0 < row["accuracy"] < 0.2  # one class for all


BAD = {
    "unknown task 'mnist' (choose from digits, copy-100, copy-400)": ["--tasks", "mnist"],
    "argument --seeds: expected a whole number of at least 1, got '0'": ["--seeds", "0"],
    "argument --steps: expected a whole number of at least 1, got 'many'": ["--steps", "many"],
    "argument --threads: expected a whole number of at least 1, got '-1'": ["--threads=-1"],
    **BAD_OPTION,
    **BAD_DEVICE,
    **bad_results("lru_steps"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_give_one_line_and_status_2(message: str, refused: Callable[..., None]) -> None:
    refused(lru_steps, BAD[message], message)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert_help_names(lru_steps, "tasks seeds steps quick device threads out", capsys)
