"""Prompts of any length: read in pieces, with the numbers of one piece, in the same memory."""

import pytest
import torch
from rwkv4_models import fields, text, trained
from timing.live_bytes import LiveBytes
from torch import Tensor

from fastwkv.nn import RWKV4, RWKV4Config, RWKV4State, generate, prefill


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens of each text are read at once."""
    found, features = [], RWKV4.features

    def recorded(self: RWKV4, tokens: Tensor, state: RWKV4State | None = None):
        found.append(tokens.shape[1])
        return features(self, tokens, state)

    monkeypatch.setattr(RWKV4, "features", recorded)
    return found


@pytest.mark.parametrize(
    ("batch", "length", "pieces"),
    [(1, 24, [24]), (1, 25, [24, 1]), (1, 60, [24, 24, 12]), (5, 9, [4, 4, 1]), (24, 2, [1, 1]), (99, 2, [1, 1])],
)
def test_pieces_are_bounded_for_all_texts_together(batch, length, pieces, lengths, monkeypatch) -> None:
    monkeypatch.setattr(prefill, "PIECE", 24)
    next(generate(trained(), text(batch, length), 1))
    assert lengths == pieces


def test_pieces_give_what_one_piece_gives(monkeypatch) -> None:
    model, tokens = trained().double(), text(2, 61)
    with torch.no_grad():
        _, before = model(text(2, 3, seed=1))
    whole = generate(model, tokens, 12, state=before)
    wanted = next(whole), fields(whole.state), list(whole)
    for piece in (2, 9, 64, 128):
        monkeypatch.setattr(prefill, "PIECE", piece)
        parts = generate(model, tokens, 12, state=before)
        assert torch.equal(next(parts), wanted[0])
        for name, value in fields(parts.state).items():
            torch.testing.assert_close(value, wanted[1][name], rtol=1e-12, atol=1e-12)
        assert all(map(torch.equal, parts, wanted[2]))


def test_prompt_of_one_piece_gives_the_bits_of_the_model() -> None:
    model, tokens = trained(), text(2, 100)
    with torch.inference_mode():
        x, state = prefill.read(model, tokens, None)
        y, same = model.features(tokens)
    assert torch.equal(x, y[:, -1])
    assert all(map(torch.equal, state.tensors().values(), same.tensors().values()))


def test_memory_does_not_grow_with_the_prompt() -> None:
    model = RWKV4(RWKV4Config(layers=2, width=8, vocab_size=31))
    peaks = []
    for length in (2 * prefill.PIECE, 16384):
        tokens = text(1, length)
        with LiveBytes() as memory:
            next(generate(model, tokens, 1))
        peaks.append(memory.peak)
    assert 4 * 4 * 8 * prefill.PIECE < peaks[0] == peaks[1]  # of the one tensor of 4 D numbers a token
    with LiveBytes() as memory, torch.inference_mode():
        model.features(tokens)
    assert memory.peak > 3 * peaks[0]


def test_memory_does_not_grow_with_the_layers() -> None:
    peaks = []
    for layers in (2, 6):
        model = RWKV4(RWKV4Config(layers=layers, width=8, vocab_size=31))
        with LiveBytes() as memory, torch.inference_mode():
            prefill.read(model, text(1, 1000), None)
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] < 4 * 1000 * 8  # less than one tensor of D numbers a token


def test_counted_memory_is_that_of_the_tensors_that_live() -> None:
    with LiveBytes() as memory:
        x = torch.zeros(100)
        y = x[10:] + 1
        assert (memory.now, memory.peak) == (760, 760)
        del y
        x.add_(1)
        assert (memory.now, memory.peak) == (400, 760)
        x = x.view(10, 10)
    del x
    assert (memory.now, memory.peak) == (0, 760)
