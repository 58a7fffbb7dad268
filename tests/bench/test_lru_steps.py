"""lru_steps.py: tasks that ask for a memory, recurrences that have one or not, and what is written of them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import BAD_DEVICE, BAD_OPTION, ROOT, assert_help_names, bad_results, interrupt

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

import lru_steps
from lru_steps import COPY, DIGITS, MODELS, Trial
from papers import tasks
from papers.recurrences import Dense, Diagonal, radius
from papers.training import cosine

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def trained(task: str, model: str, steps: int, seed: int = 0) -> Trial:
    one = Trial(task, model, seed, steps, CPU)
    one.run(lambda: None)
    return one


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("task", "steps", "most", "least"), [("digits", 80, 0.6, 0.5), ("copy-100", 40, 0.9, 0.2)])
def test_tasks_are_learned_from_the_ring_and_not_from_a_short_memory(
    task: str, steps: int, most: float, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(lru_steps.TASKS[task], state=32) if task == "digits" else replace(COPY, delay=30, state=64)
    small = replace(small, sizes=small.sizes._replace(blocks=1, hidden=small.state))
    monkeypatch.setitem(lru_steps.TASKS, task, small)
    ring, short = (trained(task, model, steps).tested for model in ("lru", "short"))
    assert short["accuracy"] < least < most < ring["accuracy"]
    assert short["radius"] < 0.6 < 0.9 < ring["radius"] < 1


def test_training_is_the_same_again_and_another_with_another_seed() -> None:
    first, again, other = (trained("digits", "diagonal", 2, seed) for seed in (1, 1, 2))
    assert first.losses == again.losses != other.losses
    assert first.tested == again.tested


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("task", [DIGITS, COPY], ids=["digits", "copy"])
def test_networks_of_a_task_have_equally_many_parameters(task: Any, model: str) -> None:
    wanted, found = (sum(p.numel() for p in lru_steps.build(task, name).parameters()) for name in ("lru", model))
    assert found == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("model", MODELS)
def test_every_network_learns_with_all_parameters_recurrent_ones_at_a_quarter_of_the_rate(model: str) -> None:
    network = lru_steps.build(DIGITS, model)
    scores = network(torch.rand(4, 64, 1))
    assert scores.shape == (4, 1, 10)
    scores.logsumexp(-1).sum().backward()
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert [name.rpartition(".")[2] for name in frozen] == ["gamma_log"] * (2 if model == "ring" else 0)
    recurrent, *others = lru_steps.groups(network, 1e-3)
    assert (recurrent["lr"], recurrent["weight_decay"]) == (0.25e-3, 0)
    assert [(group["lr"], group["weight_decay"]) for group in others] == [(1e-3, 0.05)] * len(others)
    learned = [p for group in (recurrent, *others) for p in group["params"]]
    assert len(learned) == len(list(network.parameters())) - len(frozen)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)
    count = {"tanh": 2, "linear": 2, "diagonal": 4, "ring": 4}.get(model, 5)
    assert len(recurrent["params"]) == DIGITS.sizes.blocks * count


@pytest.mark.parametrize("model", ["tanh", "linear", "diagonal"])
def test_recurrences_are_what_they_say(model: str) -> None:
    torch.manual_seed(0)
    layer = Diagonal(5, 7) if model == "diagonal" else Dense(5, 7, model == "tanh")
    u = torch.randn(2, 9, 5)
    p = {name.rpartition(".")[2]: parameter.detach().double() for name, parameter in layer.named_parameters()}
    if model == "diagonal":
        A = torch.complex(p["a_re"], p["a_im"]).diag()
        B, C = torch.complex(p["B_re"], p["B_im"]), torch.complex(p["C_re"], p["C_im"])
    else:
        A, B, C = p["weight_hh_l0"], p["weight_ih_l0"], p["weight"]
    h, wanted = torch.zeros(2, 7, dtype=A.dtype), []
    for u_t in u.double().unbind(1):
        h = h @ A.T + u_t.to(A.dtype) @ B.T
        h = h.tanh() if model == "tanh" else h
        wanted.append((h @ C.T).real + p["D"] * u_t)
    # Nine steps, each of sums of at most 7 + 5 terms, of numbers of about 1.
    assert torch.allclose(layer(u).double(), torch.stack(wanted, 1), rtol=0, atol=9 * 12 * torch.finfo().eps)
    assert radius(layer) == pytest.approx(float(torch.linalg.eigvals(A).abs().max()))


def test_digits_are_split_once_and_shown_in_full() -> None:
    train, test = tasks.digits()
    assert (train.x.shape, train.y.shape) == ((1437, 64, 1), (1437, 1))
    assert (test.x.shape, test.y.shape) == ((360, 64, 1), (360, 1))
    assert (float(train.x.min()), float(train.x.max())) == (0, 1)
    assert torch.equal(test.x, tasks.digits()[1].x)
    share = torch.bincount(test.y.flatten()) / torch.bincount(train.y.flatten())
    assert float(share.max() - share.min()) < 0.02
    assert not {tuple(row) for row in train.x.flatten(1).tolist()} & {tuple(row) for row in test.x.flatten(1).tolist()}


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
    assert bool((torch.cat((tokens[:, 10:34], tokens[:, 35:]), 1) == tasks.BLANK).all())
    assert examples.y.unique().tolist() == list(range(8))


def test_rate_rises_then_falls_to_nothing() -> None:
    rates = [cosine(step, 100, 0.1) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == max(rates) == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0)
    assert cosine(0, 1, 0.1) == 1


@pytest.fixture
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and batches that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lru_steps, "COPY_TEST", 4)
    for name, task in lru_steps.TASKS.items():
        small = replace(task, sizes=task.sizes._replace(hidden=8), state=8, real_state=8, batch=2)
        monkeypatch.setitem(lru_steps.TASKS, name, small)


def rows() -> list[dict[str, Any]]:
    return json.loads(Path("lru_steps.json").read_text())["rows"]


@pytest.mark.usefixtures("_small")
def test_record_and_figure_are_of_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[Trial] = []
    run = Trial.run
    monkeypatch.setattr(Trial, "run", lambda one, tick: (trials.append(one), run(one, tick)))
    assert lru_steps.main(["--tasks", "digits,copy-400", "--seeds", "2", "--steps", "6"]) == 0
    wanted = [("digits", model, seed) for model in MODELS for seed in (0, 1)]
    wanted += [("copy-400", model, seed) for model in ("lru", "short") for seed in (0, 1)]
    assert [(row["task"], row["model"], row["seed"]) for row in rows()] == wanted
    for row, one in zip(rows(), trials, strict=True):
        assert (row["status"], row["steps"]) == ("complete", 6)
        for name, values in (("loss_curve", one.losses), ("accuracy_curve", one.correct)):
            assert row[name] == pytest.approx([sum(values[:5]) / 5, values[5]], rel=1e-4)
        assert (row["accuracy"], row["radius"]) == pytest.approx(
            (one.tested["accuracy"], one.tested["radius"]), rel=1e-4
        )
    settings = json.loads(Path("lru_steps.json").read_text())["settings"]
    assert (settings["seeds"], settings["tasks"]["digits"]["steps"], settings["tasks"]["digits"]["hidden"]) == (2, 6, 8)
    picture = Path("lru_steps.png").read_bytes()
    assert "96/96" in capsys.readouterr().err  # the progress bar
    assert lru_steps.main(["--redraw", "lru_steps.json", "--out", "again"]) == 0
    assert Path("again/lru_steps.png").read_bytes() == picture


def test_quick_run_is_one_seed_of_fewer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lru_steps.Reproduction, "carry_out", lambda program, trials, *_: trials)
    found = {(one.title, one.total) for one in lru_steps.main(["--quick", "--out", str(tmp_path)])}
    quick = (("digits", 120), ("copy-100", 40))
    assert found == {(f"{task} {model} 0", steps) for task, steps in quick for model in MODELS}


@pytest.mark.usefixtures("_small")
def test_what_was_measured_before_an_interrupt_is_kept_and_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Trial.steps

    def stopping(one: Trial, *args: Any) -> Any:
        for scores in steps(one, *args):
            yield scores
            if one.title.startswith("copy-400 short") and len(one.losses) == 8:
                interrupt()

    monkeypatch.setattr(Trial, "steps", stopping)
    assert lru_steps.main(["--tasks", "copy-400", "--seeds", "2", "--steps", "10"]) == 130
    outcome = [(row["model"], row["status"], row["steps"], len(row["accuracy_curve"])) for row in rows()]
    assert outcome == [("lru", "complete", 10, 2), ("lru", "complete", 10, 2), ("short", "interrupted", 8, 2)]
    assert Path("lru_steps.png").exists()


@pytest.mark.usefixtures("_small")
def test_diverged_training_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Diagonal, "forward", lambda self, u: u * float("nan"))
    row = trained("digits", "diagonal", 2).row()
    assert (row["status"], row["steps"], row["radius"]) == ("complete", 2, None)
    assert 0 < row["accuracy"] < 0.2  # one class for all


def test_committed_record_is_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    committed = ROOT / "bench" / "results" / "cpu-2-cores" / "lru_steps.json"
    assert lru_steps.main(["--redraw", str(committed), "--out", str(tmp_path)]) == 0
    assert "| copy-100 | diagonal |    101,640 |    79.3% |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["lru_steps.png"]


BAD = {
    "unknown task 'mnist' (choose from digits, copy-100, copy-400)": ["--tasks", "mnist"],
    "argument --seeds: expected a whole number of at least 1, got '0'": ["--seeds", "0"],
    "argument --threads: expected a whole number of at least 1, got '-1'": ["--threads=-1"],
    "'nothing' is not a result of a benchmark": ["--redraw", "nothing"],
    **BAD_OPTION,
    **BAD_DEVICE,
    **bad_results("lru_steps"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_give_one_line_and_status_2(message: str, refused: Callable[..., None]) -> None:
    refused(lru_steps, BAD[message], message)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert_help_names(lru_steps, "tasks seeds steps quick device threads out redraw", capsys)
