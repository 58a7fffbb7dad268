"""Trainings of learning_curve.py: equal models and batches, options that change what they should, and interrupts."""

import importlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

for package in ("safetensors", "transformers"):
    pytest.importorskip(package)

data, models, training, evaluation, checkpoint = (
    importlib.import_module(f"learning_curve_{name}")
    for name in ("data", "models", "training", "evaluation", "checkpoint")
)
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
LINES = [f"line {n}: {n * n} is the square of {n}\n".encode() for n in range(120)]
TEXT = data.Text("squares", tuple(b"".join(LINES[n : n + 5]) for n in range(0, 100, 5)), (b"".join(LINES[100:]),))
ROWS, LENGTH = 4, 32
SETTINGS = training.Settings(
    model="rwkv4",
    text=TEXT.digest,
    layers=2,
    width=32,
    length=LENGTH,
    batch=ROWS,
    steps=12,
    seed=0,
    consecutive=False,
    recipe=models.Recipe(1e-2, (0.9, 0.99)),
    options=training.Options(),
)


def start(**changes: Any) -> Any:
    """A training from its beginning; options of RWKV-4 are given by name."""
    options = {name: changes.pop(name) for name in list(changes) if hasattr(SETTINGS.options, name)}
    settings = replace(SETTINGS, **changes, options=training.Options(**options))
    batches = data.Batches(TEXT, settings.batch, settings.length, settings.seed, settings.consecutive)
    return training.Training(settings, batches, CPU)


def trained(steps: int, **changes: Any) -> Any:
    one = start(**changes)
    while one.position < steps:
        one.step()
    return one


def one_that_matters(one: Any) -> Any:
    """Give every weight a say: those of a fresh RWKV-4 are zero where tokens meet."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return one


@pytest.mark.parametrize(("layers", "width"), [(1, 32), (2, 64), (4, 128), (6, 256)])
def test_both_models_have_equally_many_parameters(layers: int, width: int) -> None:
    rwkv4, transformer = (models.build(name, layers, width, 64, 0) for name in ("rwkv4", "transformer"))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (rwkv4, transformer)]
    assert sizes[0] == 2 * 256 * width + 13 * width**2 * layers + width * (11 * layers + 4)
    assert sizes[1] == pytest.approx(sizes[0], rel=2e-3)


@pytest.mark.parametrize("model", models.NAMES)
def test_logits_of_a_byte_do_not_depend_on_those_after_it(model: str) -> None:
    one = one_that_matters(start(model=model))
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 12:] = 7
    with torch.no_grad():
        logits, other = (models.predict(one.model, text) for text in (tokens, changed))
    assert torch.allclose(logits[:, :12], other[:, :12], atol=1e-5)
    assert not torch.allclose(logits[:, 12:], other[:, 12:], atol=1e-2)


def test_both_models_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Any]] = {"rwkv4": [], "transformer": []}
    for model, batches in seen.items():
        one = start(model=model)
        loss = one.loss
        monkeypatch.setattr(one, "loss", lambda batch, b=batches, loss=loss: (b.append(batch), loss(batch))[1])
        for _ in range(4):
            one.step()
    for first, second in zip(*seen.values(), strict=True):
        assert torch.equal(first.inputs, second.inputs)
        assert torch.equal(first.targets, second.targets)
    assert not torch.equal(seen["rwkv4"][0].inputs, seen["rwkv4"][1].inputs)


def test_rate_rises_if_it_warms_up_then_falls_to_a_sixtieth() -> None:
    plain, warm = models.Recipe(0.5, (0.9, 0.99)), models.Recipe(0.5, (0.9, 0.95), warm_up=0.1)
    rates, warmed = ([recipe.rate_of(step, 100) for step in range(100)] for recipe in (plain, warm))
    assert rates[49] == pytest.approx(0.5 / 60**0.5)
    assert rates[99] == pytest.approx(0.5 / 60)
    assert rates == sorted(rates, reverse=True)
    assert warmed[9:] == rates[9:]
    assert warmed[4] == pytest.approx(rates[4] / 2)


def test_decay_and_bonus_are_trained_at_twice_and_three_times_the_rate() -> None:
    one = start()
    names = {id(parameter): name for name, parameter in one.model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in one.optimizer.param_groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    for name, scale in scales.items():
        assert scale == (2 if "time_decay" in name else 3 if "time_first" in name else 1)
    one.step()
    first = SETTINGS.recipe.rate_of(0, SETTINGS.steps)
    assert [group["lr"] for group in one.optimizer.param_groups] == [
        g["lr_scale"] * first for g in one.optimizer.param_groups
    ]
    assert one.optimizer.defaults["betas"] == (0.9, 0.99)
    assert (one.optimizer.defaults["eps"], one.optimizer.defaults["weight_decay"]) == (1e-8, 0)


@pytest.mark.parametrize("model", models.NAMES)
def test_models_learn(model: str) -> None:
    losses = trained(12, model=model).losses
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("option", ["truncated", "packed", "gradient_checkpointing", "bfloat16"])
def test_rwkv4_learns_with_every_option(option: str) -> None:
    losses = trained(12, **{option: True}, consecutive=option == "truncated").losses
    assert losses[-1] < 0.75 * losses[0]


def test_gradient_checkpointing_gives_the_same_curve() -> None:
    plain, saving = trained(12), trained(12, gradient_checkpointing=True)
    assert saving.model.gradient_checkpointing
    assert saving.losses == plain.losses


def test_bfloat16_gives_nearly_the_same_curve() -> None:
    plain, half = (torch.tensor(trained(6, bfloat16=option).losses) for option in (False, True))
    assert not torch.equal(plain, half)
    assert torch.allclose(plain, half, rtol=5e-3)


def test_truncated_equals_plain_for_the_first_window_and_knows_more_in_the_next() -> None:
    plain, truncated = (one_that_matters(start(consecutive=True, **options)) for options in ({}, {"truncated": True}))
    first, second = (plain._batches[n] for n in range(2))
    assert float(truncated.loss(first).detach()) == pytest.approx(float(plain.loss(first).detach()), rel=1e-6)
    both = torch.cat((first.inputs, second.inputs), 1)
    logits = plain.model(both)[0][:, LENGTH:].detach()
    whole = float(F.cross_entropy(logits.flatten(0, 1), second.targets.flatten()))
    carried = truncated.loss(second)
    assert float(carried.detach()) == pytest.approx(whole, rel=1e-6)
    assert float(plain.loss(second).detach()) != pytest.approx(whole, rel=1e-4)
    carried.backward()  # through the second window only
    assert all(not field.requires_grad for field in (truncated.state.att_x, *truncated.state.wkv))
    again = plain._batches[plain._batches.windows]
    assert float(truncated.loss(again).detach()) == pytest.approx(float(plain.loss(first).detach()), rel=1e-6)


def test_packed_windows_lose_only_what_came_before_their_document() -> None:
    packed, plain = one_that_matters(start(packed=True)), one_that_matters(start())
    cut = 0
    for n in range(plain._batches.windows):
        batch = plain._batches[n]
        with torch.no_grad():
            found = packed._predict(batch.inputs, batch).view(ROWS, LENGTH, 256)
            known = plain._predict(batch.inputs, batch)
        for row, tokens in enumerate(batch.inputs):
            starts = (tokens == 0).nonzero().flatten().tolist()
            first = starts[0] if starts else LENGTH
            assert torch.allclose(found[row, :first], known[row, :first], atol=1e-5)
            if 0 < first < LENGTH:
                cut += 1
                assert not torch.allclose(found[row, first:], known[row, first:], atol=1e-3)
                with torch.no_grad():
                    alone = models.predict(plain.model, tokens[None, first:])[0]
                assert torch.allclose(found[row, first:], alone, atol=1e-5)
    assert cut > 5


@pytest.mark.unpoisoned
@pytest.mark.parametrize("model", ["rwkv4", "truncated", "transformer"])
def test_resumed_training_equals_the_uninterrupted_one_bit_for_bit(model: str, tmp_path: Path) -> None:
    truncated = model == "truncated"
    changes = {"model": "rwkv4" if truncated else model, "truncated": truncated, "consecutive": truncated}
    whole = trained(12, **changes)
    trained(7, **changes).save(tmp_path / "checkpoint")
    torch.manual_seed(99)
    resumed = start(**changes)
    resumed.load(tmp_path / "checkpoint")
    assert resumed.position == len(resumed.seconds) == 7
    while resumed.position < 12:
        resumed.step()
    assert resumed.losses == whole.losses
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], parameter), name
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint"]


def test_run_leaves_a_checkpoint_now_and_then_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "EVERY", 5)
    positions: list[int] = []
    one = start()
    save = one.save
    monkeypatch.setattr(one, "save", lambda path: (positions.append(one.position), save(path)))
    ticks: list[int] = []
    one.run(tmp_path / "checkpoint", lambda: ticks.append(one.position))
    assert positions == [5, 10, 12]
    assert ticks == list(range(1, 13))


def test_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint"
    one = trained(2)
    one.save(path)
    before = path.read_bytes()

    def breaking(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(b"half of")
        raise KeyboardInterrupt

    one.step()
    monkeypatch.setattr(checkpoint, "save_file", breaking)
    with pytest.raises(KeyboardInterrupt):
        one.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


OTHER = {
    "is of a run with steps 12 and not 13": {"steps": 13},
    "is of a run with seed 0 and not 1": {"seed": 1},
    "is of a run with consecutive False and not True": {"consecutive": True},
    "and not {'truncated': False, 'packed': True, ": {"packed": True},
}


@pytest.mark.parametrize("message", OTHER)
def test_checkpoint_of_other_settings_is_refused(message: str, tmp_path: Path) -> None:
    trained(1).save(tmp_path / "checkpoint")
    one = start(**OTHER[message])
    with pytest.raises(checkpoint.WrongCheckpoint) as refused:
        one.load(tmp_path / "checkpoint")
    assert message in str(refused.value)
    assert one.position == 0


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x02\0\0\0\0\0\0\0{}"], ids=["empty", "text", "foreign"])
def test_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(checkpoint.WrongCheckpoint, match="is not a checkpoint of this program"):
        start().load(tmp_path / "checkpoint")


DOCUMENTS = (b"x", b"two windows and three bytes " + bytes(range(39)), TEXT.held_out[0])


@pytest.mark.parametrize("model", models.NAMES)
def test_windowed_bits_are_of_every_byte_without_what_came_before_its_window(model: str) -> None:
    one = one_that_matters(start(model=model))
    nats, count = 0.0, 0
    for document in DOCUMENTS:
        tokens = torch.tensor(list(b"\0" + document))
        for first in range(0, len(document), LENGTH):
            inputs, targets = tokens[first : first + LENGTH], tokens[first + 1 : first + LENGTH + 1]
            with torch.no_grad():
                logits = models.predict(one.model, inputs[None, : len(targets)])[0]
            nats += float(F.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
    assert count == sum(map(len, DOCUMENTS))
    bits = evaluation.windowed_bits(one.model, DOCUMENTS, LENGTH, CPU)
    assert bits == pytest.approx(nats / math.log(2) / count, rel=1e-6)


@pytest.mark.parametrize("together", [16, 2**14])
def test_carried_bits_are_of_every_byte_with_all_that_came_before_it(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "TOGETHER", together)
    model = one_that_matters(start()).model
    nats = 0.0
    for document in DOCUMENTS:
        tokens = torch.tensor(list(b"\0" + document))
        with torch.no_grad():
            nats += float(F.cross_entropy(model(tokens[None, :-1])[0][0], tokens[1:], reduction="sum"))
    bits = evaluation.carried_bits(model, DOCUMENTS, CPU)
    assert bits == pytest.approx(nats / math.log(2) / sum(map(len, DOCUMENTS)), rel=1e-6)
    assert bits != pytest.approx(evaluation.windowed_bits(model, DOCUMENTS, LENGTH, CPU), rel=1e-4)
