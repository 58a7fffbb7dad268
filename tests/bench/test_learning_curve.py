"""learning_curve.py: two models of one size that learn, the bits a byte that are reported, and what is written."""

import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import BAD_DEVICE, BAD_OPTION, ROOT, assert_help_names, bad_results, interrupt
from torch.nn import functional as F

for package in ("matplotlib", "tqdm", "transformers"):
    pytest.importorskip(package)

import learning_curve
from learning_curve import Learner, Recipe
from papers import language_models as models
from papers.text import Text, Windows, ngram_bits

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
LINES = [f"line {n}: {n * n} is the square of {n}\n".encode() for n in range(120)]
TEXT = Text("squares", tuple(b"".join(LINES[n : n + 5]) for n in range(0, 100, 5)), (b"".join(LINES[100:]),))
ROWS, LENGTH = 4, 32
SETTINGS = {"layers": 2, "width": 32, "length": LENGTH, "batch": ROWS, "steps": 6, "seed": 0, "rate": 2e-2}
TINY = ["--layers", "1", "--width", "32", "--length", "16", "--batch", "2", "--steps", "20", "--threads", "1"]
TINY += ["--device", "cpu", "--text", "text"]


def learner(name: str = "rwkv4", **changes: Any) -> Learner:
    args = Namespace(**SETTINGS | dict.fromkeys(learning_curve.OPTIONS, False) | changes, device=CPU)
    windows = Windows(TEXT.training, ROWS, LENGTH, args.seed, args.truncated)
    return Learner(name, windows, TEXT, args)


def trained(name: str = "rwkv4", **changes: Any) -> Learner:
    one = learner(name, **changes)
    one.run(lambda: None)
    return one


def one_that_matters(one: Learner) -> Learner:
    """Give every weight a say: those of a fresh RWKV-4 are zero where tokens meet."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return one


@pytest.mark.parametrize(("layers", "width"), [(1, 32), (3, 96)])
def test_both_models_have_equally_many_parameters(layers: int, width: int) -> None:
    sizes = [learning_curve.parameters(models.build(name, layers, width, 64, 0)) for name in learning_curve.MODELS]
    assert sizes[0] == 2 * 256 * width + 13 * width**2 * layers + width * (11 * layers + 4)
    assert sizes[1] == pytest.approx(sizes[0], rel=2e-3)


@pytest.mark.parametrize("name", learning_curve.MODELS)
def test_logits_of_a_byte_do_not_depend_on_those_after_it(name: str) -> None:
    model = one_that_matters(learner(name)).model
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 12:] = 7
    with torch.no_grad():
        logits, other = (models.logits_of(model, text) for text in (tokens, changed))
    assert torch.allclose(logits[:, :12], other[:, :12], atol=1e-5)
    assert not torch.allclose(logits[:, 12:], other[:, 12:], atol=1e-2)


# The heads start so that logits of a normalised vector have these variances: RWKV-4's is orthogonal, scaled by half the
# root of V / D, GPT-NeoX's is N(0, 2 / 5 D).
@pytest.mark.parametrize(("name", "variance"), [("rwkv4", 1 / 4), ("transformer", 2 / 5)])
def test_fresh_model_guesses(name: str, variance: float) -> None:
    with torch.no_grad():
        logits = models.logits_of(learner(name).model, torch.arange(256).view(-1, LENGTH))
    loss = float((logits.logsumexp(-1) - logits.mean(-1)).mean())  # whatever the next byte is
    # Three standard deviations of half the variance of 256 logits; no vector is counted on to differ from the others.
    assert loss == pytest.approx(math.log(256) + variance / 2, abs=3 * math.sqrt(2 / 256) * variance / 2)


@pytest.mark.parametrize("name", learning_curve.MODELS)
def test_models_learn_more_than_how_frequent_bytes_are(name: str) -> None:
    unigram = ngram_bits(TEXT.training, TEXT.held_out, 1)
    assert trained(name, steps=24).bits < unigram - 1  # a bit at least from the bytes before


@pytest.mark.parametrize("option", learning_curve.OPTIONS)
def test_options_reach_rwkv4_which_learns(option: str) -> None:
    one = trained(steps=12, **{option: True})
    assert one.row()["options"] == [option]
    assert one.losses[-1] < 0.75 * one.losses[0]
    assert learner("transformer", **{option: True}).options == []


def test_same_settings_give_the_same_losses_and_others_do_not() -> None:
    first, again, rate, seed = (trained(**change).losses for change in ({}, {}, {"rate": 1e-2}, {"seed": 1}))
    assert first == again
    assert first[0] == rate[0]
    assert first[1:] != rate[1:]
    assert first != seed


def test_truncated_equals_plain_for_the_first_window_and_knows_more_in_the_next() -> None:
    plain, truncated = one_that_matters(learner()), one_that_matters(learner(truncated=True))
    first, second = (truncated.windows[n] for n in range(2))
    assert torch.allclose(truncated.predict(first)[0], plain.predict(first)[0], atol=1e-5)
    truncated.losses.append(0.0)  # the first step is done
    found = truncated.predict(second)[0]
    both = torch.cat((first[:, :-1], second[:, :-1]), 1)
    assert torch.allclose(found, plain.model(both)[0][:, LENGTH:].flatten(0, 1), atol=1e-5)
    assert not torch.allclose(found, plain.predict(second)[0], atol=1e-3)
    found.sum().backward()  # through the second window only
    assert not any(tensor.requires_grad for tensor in truncated._state.tensors().values())


def test_packed_windows_lose_only_what_came_before_their_document() -> None:
    packed, plain = one_that_matters(learner(packed=True)), one_that_matters(learner())
    cut = 0
    for n in range(plain.windows.count):
        window = plain.windows[n]
        with torch.no_grad():
            found, known = (one.predict(window)[0].view(ROWS, LENGTH, 256) for one in (packed, plain))
        for row, tokens in enumerate(window[:, :-1]):
            first = next(iter((tokens == 0).nonzero().flatten().tolist()), LENGTH)
            assert torch.allclose(found[row, :first], known[row, :first], atol=1e-5)
            if 0 < first < LENGTH:
                cut += 1
                assert not torch.allclose(found[row, first:], known[row, first:], atol=1e-3)
                with torch.no_grad():
                    alone = models.logits_of(plain.model, tokens[None, first:])[0]
                assert torch.allclose(found[row, first:], alone, atol=1e-5)
    assert cut > 5


def test_rate_rises_if_it_warms_up_then_falls_to_a_sixtieth() -> None:
    plain, warm = Recipe(0.5, (0.9, 0.99)), Recipe(0.5, (0.9, 0.95), warm_up=0.1)
    rates, warmed = ([recipe.rate_of(step, 100) for step in range(100)] for recipe in (plain, warm))
    assert rates[49] == pytest.approx(0.5 / 60**0.5)
    assert rates[99] == pytest.approx(0.5 / 60)
    assert rates == sorted(rates, reverse=True)
    assert warmed[9:] == rates[9:]
    assert warmed[4] == pytest.approx(rates[4] / 2)


DOCUMENTS = (b"x", b"two windows and three bytes " + bytes(range(39)), TEXT.held_out[0])


def nats(model: torch.nn.Module, document: bytes, length: int) -> float:
    """The loss of every byte of a document, window by window."""
    tokens, total = torch.tensor(list(b"\0" + document)), 0.0
    for first in range(0, len(document), length):
        targets = tokens[first + 1 : first + length + 1]
        with torch.no_grad():
            logits = models.logits_of(model, tokens[None, first : first + len(targets)])[0]
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
    return total


@pytest.mark.parametrize("name", learning_curve.MODELS)
def test_windowed_bits_are_of_every_byte_without_what_came_before_its_window(name: str) -> None:
    model = one_that_matters(learner(name)).model
    wanted = sum(nats(model, document, LENGTH) for document in DOCUMENTS) / math.log(2) / sum(map(len, DOCUMENTS))
    assert models.windowed_bits(model, DOCUMENTS, LENGTH, CPU) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("together", [16, 2**14])
def test_carried_bits_are_of_every_byte_with_all_that_came_before_it(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "TOGETHER", together)
    model = one_that_matters(learner()).model
    wanted = sum(nats(model, document, 10**6) for document in DOCUMENTS) / math.log(2) / sum(map(len, DOCUMENTS))
    bits = models.carried_bits(model, DOCUMENTS, CPU)
    assert bits == pytest.approx(wanted, rel=1e-6)
    assert bits != pytest.approx(models.windowed_bits(model, DOCUMENTS, LENGTH, CPU), rel=1e-4)


@pytest.fixture
def _text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_bytes(b"".join(LINES[:100]))


def record() -> dict[str, Any]:
    return json.loads(Path("learning_curve.json").read_text())


@pytest.mark.usefixtures("_text")
def test_record_and_figure_are_of_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learners: list[Learner] = []
    run = Learner.run
    monkeypatch.setattr(Learner, "run", lambda one, tick: (learners.append(one), run(one, tick)))
    assert learning_curve.main(TINY) == 0
    found, size = record(), Path("text").stat().st_size
    assert found["benchmark"] == "learning_curve"
    assert {"python", "fastwkv", "torch", "transformers"} <= found["versions"].keys()
    sizes = {"layers": 1, "width": 32, "length": 16, "batch": 2, "steps": 20}
    assert sizes.items() <= found["settings"].items()
    text = {"title": "text", "training_bytes": size - size // 20, "held_out_bytes": size // 20, "held_out_documents": 1}
    assert found["text"] == text
    assert found["yardsticks"].keys() >= {"trigram of what the models saw", "unigram of all training text", "gzip -9"}
    assert [row["model"] for row in found["rows"]] == ["rwkv4", "transformer"]
    for row, one in zip(found["rows"], learners, strict=True):
        bits = [loss / math.log(2) for loss in one.losses]
        assert row["curve"] == pytest.approx([sum(bits[:16]) / 16, sum(bits[16:]) / 4], rel=1e-4)
        assert row["bytes"] == 20 * 2 * 16
        assert row["bits"] == pytest.approx(one.bits, rel=1e-4)
        assert (row["carried_bits"] is None) == (row["model"] == "transformer")
        assert row["steps_per_second"] > 0
    printed, picture = capsys.readouterr(), Path("learning_curve.png").read_bytes()
    assert "40/40" in printed.err  # the progress bar
    assert all(f"\n{name}: {bits:.3f} bits a byte" in printed.out for name, bits in found["yardsticks"].items())
    assert learning_curve.main(["--redraw", "learning_curve.json", "--out", "again"]) == 0
    assert Path("again/learning_curve.png").read_bytes() == picture


@pytest.mark.usefixtures("_text")
@pytest.mark.parametrize("failure", ["interrupt", "nan"])
def test_what_was_measured_before_an_interrupt_or_beside_nan_is_kept_and_drawn(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = Learner.predict

    def failing(one: Learner, window: torch.Tensor) -> Any:
        scores, classes = predict(one, window)
        if one.name == "transformer" and len(one.losses) == 7:
            return (interrupt() if failure == "interrupt" else scores * math.nan), classes
        return scores, classes

    monkeypatch.setattr(Learner, "predict", failing)
    assert learning_curve.main(TINY) == (130 if failure == "interrupt" else 0)
    rows = [(row["bytes"] // 32, len(row["curve"]), row["bits"] is None) for row in record()["rows"]]
    assert rows == [(20, 2, False), (7 if failure == "interrupt" else 20, 1 if failure == "interrupt" else 2, True)]
    assert Path("learning_curve.png").exists()


def bits(rwkv4: float | None, transformer: float) -> dict[str, Any]:
    rows = [{"model": "rwkv4", "bits": rwkv4}, {"model": "transformer", "bits": transformer}]
    return {"rows": rows, "yardsticks": {"trigram of all training text": 2.6, "gzip -9": 2.0}}


def test_what_was_missed_is_said() -> None:
    assert not [line for line in learning_curve.remarks(bits(2.5, 2.45)) if "MISSED" in line]
    below = "MISSED: RWKV-4 needs 2.650 bits a byte, not fewer than the trigram of all training text with 2.600"
    assert learning_curve.remarks(bits(2.65, 2.62))[2:] == [below]
    behind = "MISSED: RWKV-4 needs 2.500 bits a byte, 4.2 % more than the transformer with 2.400"
    assert learning_curve.remarks(bits(2.5, 2.4))[2:] == [behind]
    assert len(learning_curve.remarks(bits(None, 2.5))) == 4


def test_committed_record_is_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    committed = ROOT / "bench" / "results" / "cpu-2-cores" / "learning_curve.json"
    assert learning_curve.main(["--redraw", str(committed), "--out", str(tmp_path)]) == 0
    assert "| rwkv4       | 1.883 |        1.851 |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["learning_curve.png"]


BAD = {
    "unknown model 'lstm' (choose from rwkv4, transformer)": ["--models", "lstm"],
    "argument --steps: expected a whole number of at least 1, got '0'": ["--steps", "0"],
    "--width must be a multiple of 32, got 100": ["--width", "100"],
    "argument --rate: invalid float value: 'fast'": ["--rate", "fast"],
    "--rate must be positive and finite, got 0.0": ["--rate", "0"],
    "argument --packed: not allowed with argument --truncated": ["--truncated", "--packed"],
    "cannot read 'nothing': No such file or directory": ["--text", "nothing"],
    "the text must have at least 20 bytes, got 4": ["--text", "short"],
    "the text must have at least 4112 bytes, got ": ["--text", "text"],
    "'nothing' is not a result of a benchmark": ["--redraw", "nothing"],
    "'ops.json' is not a result of this program": ["--redraw", "ops.json"],
    **BAD_OPTION,
    **BAD_DEVICE,
    **bad_results("learning_curve"),
}


@pytest.mark.usefixtures("_text")
@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_give_one_line_and_status_2(message: str, refused: Callable[..., None]) -> None:
    Path("short").write_text("tiny")
    Path("ops.json").write_text('{"benchmark": "ops", "device": {}, "rows": []}')
    refused(learning_curve, BAD[message], message)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    options = "models text quick layers width length batch steps rate seed truncated packed gradient-checkpointing"
    assert_help_names(learning_curve, f"{options} bfloat16 device threads out redraw", capsys)
