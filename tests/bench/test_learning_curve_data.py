"""What learning_curve.py trains on, holds out and measures its models against."""

import gzip
import math
from collections import Counter
from pathlib import Path

import learning_curve_data as data
import learning_curve_yardsticks as yardsticks
import numpy as np
import pytest
import torch

DOCUMENTS = tuple(bytes([65 + n]) * (7 + 5 * n) for n in range(9))  # 243 bytes, each document of one letter
TEXT = data.Text("letters", DOCUMENTS, (b"held out",))


def test_files_are_trained_on_or_held_out_by_their_names(tmp_path: Path) -> None:
    names = [f"package/module_{n}.py" for n in range(200)]
    for name in (*names, "tests/one.py", "package/test/two.py", "idlelib/three.py", "site-packages/x/four.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "package" / "empty.py").touch()
    (tmp_path / "package" / "notes.txt").write_text("no source")
    text = data.standard_library(tmp_path)
    assert sorted(one.decode() for one in (*text.training, *text.held_out)) == sorted(names)
    assert [one.decode() for one in text.held_out] == sorted(name for name in names if data.is_held_out(name))
    assert 4 <= len(text.held_out) <= 20


def test_names_held_out_are_the_same_on_every_machine() -> None:
    names = [f"module_{n}.py" for n in range(100)]
    assert [n for n, name in enumerate(names) if data.is_held_out(name)] == [3, 21, 31, 53, 56, 64, 74, 89]


def test_standard_library_is_a_text_of_many_files_none_of_them_in_both_parts() -> None:
    text = data.standard_library()
    assert len(text.training) > 300
    assert len(text.held_out) > 10
    assert not any(data.SEPARATOR in document for document in (*text.training, *text.held_out))


def test_digest_tells_texts_and_their_parts_apart() -> None:
    texts = [((b"ab", b"c"), (b"d",)), ((b"ab",), (b"c", b"d")), ((b"a", b"bc"), (b"d",)), ((b"ab", b"c"), (b"e",))]
    assert len({data.Text("", *text).digest for text in texts}) == 4


def test_last_twentieth_of_a_file_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(200)))
    text = data.from_file(tmp_path / "text")
    assert (text.training, text.held_out) == ((bytes(range(190)),), (bytes(range(190, 200)),))


def tokens(batch: "data.Batch") -> torch.Tensor:
    """The window of every row with the byte after it."""
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    return torch.cat((batch.inputs, batch.targets[:, -1:]), 1)


@pytest.mark.parametrize("consecutive", [False, True])
def test_every_window_comes_once_a_round(consecutive: bool) -> None:
    batches = data.Batches(TEXT, 3, 8, seed=0, consecutive=consecutive)
    assert batches.windows == 10  # three streams of 84 bytes
    rounds = [[bytes(row.tolist()) for n in range(10) for row in tokens(batches[first + n])] for first in (0, 10)]
    assert rounds[0] == rounds[1]
    joined = b"".join(rounds[0][n][:8] for n in range(30))
    pieces = b"".join(batches.seen(10))
    assert Counter(joined.replace(b"\0", b"")) == Counter(pieces)
    assert len(joined) == 240
    assert [batches[n].first for n in range(11)] == [True] + 9 * [False] + [True]


def test_consecutive_windows_go_on_where_the_row_ended() -> None:
    batches = data.Batches(TEXT, 3, 8, seed=0, consecutive=True)
    for n in range(9):
        assert torch.equal(batches[n].targets[:, -1], batches[n + 1].inputs[:, 0])
    rows = [bytes(torch.cat([batches[n].inputs[row] for n in range(10)]).tolist()) for row in range(3)]
    assert sorted(letter for row in rows for letter in row.replace(b"\0", b"")) != sorted(rows[0])
    assert all(len(set(row) - {0}) < 9 for row in rows)


def test_windows_are_shuffled_by_the_seed() -> None:
    first, again, other = (data.Batches(TEXT, 3, 8, seed) for seed in (1, 1, 2))
    same = [torch.equal(first[n].inputs, again[n].inputs) for n in range(10)]
    different = [torch.equal(first[n].inputs, other[n].inputs) for n in range(10)]
    assert all(same)
    assert not any(different)


def test_packed_texts_start_at_windows_and_at_documents() -> None:
    batches = data.Batches(TEXT, 3, 8, seed=0)
    cuts = 0
    for n in range(batches.windows):
        batch = batches[n]
        flat = batch.inputs.flatten()
        starts = {0, 8, 16} | set((flat == 0).nonzero().flatten().tolist())
        assert batch.cu_seqlens.tolist() == [*sorted(starts), 24]
        cuts += len(starts) - 3
    assert cuts >= 5  # of nine documents; others start with a window or between two streams


def test_steps_see_no_more_than_their_windows() -> None:
    batches = data.Batches(TEXT, 3, 8, seed=0)
    seen = Counter(b"".join(batches.seen(2)))
    wanted = Counter(torch.cat([batches[n].inputs.flatten() for n in range(2)]).tolist())
    del wanted[0]
    assert seen == wanted


def test_text_that_fills_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="the text must have at least 400 bytes, got 252"):
        data.Batches(TEXT, 4, 99, seed=0)


def test_unigram_of_a_known_string_is_counted_by_hand() -> None:
    model = yardsticks.WittenBell([b"aab"], 1)
    a, b, new = model.probabilities(b"abc")
    assert (a, b, new) == pytest.approx(((2 + 2 / 256) / 5, (1 + 2 / 256) / 5, (2 / 256) / 5), rel=1e-15)
    bits = -(2 * math.log2(a) + math.log2(b) + math.log2(new)) / 4
    assert model.bits([b"aa", b"bc"]) == pytest.approx(bits, rel=1e-15)


def test_trigram_of_a_known_string_is_counted_by_hand() -> None:
    model = yardsticks.WittenBell([b"abab"], 3)  # contexts: two separators, then what came before
    unigram = (2 + 2 / 256) / 6  # of "a", and of "b"
    bigram = {"after a": (2 + unigram) / 3, "after b": (1 + unigram) / 2}
    assert model.probabilities(b"xab")[2] == pytest.approx(bigram["after a"], rel=1e-15)  # "xa" was never seen
    assert model.probabilities(b"bab")[2] == pytest.approx((1 + bigram["after a"]) / 2, rel=1e-15)
    assert model.probabilities(b"aba")[2] == pytest.approx((1 + bigram["after b"]) / 2, rel=1e-15)
    assert model.probabilities(b"cd")[1] == pytest.approx(2 / 256 / 6, rel=1e-15)  # "c" was never seen


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_of_all_bytes_sum_to_one(order: int) -> None:
    model = yardsticks.WittenBell([b"the cat sat on the mat", b"a hat"], order)
    contexts = [b"", b"t", b"th", b"zz", b"az", b"za", b"at"]
    for context in contexts:
        total = sum(model.probabilities(context + bytes([byte]))[-1] for byte in range(256))
        assert total == pytest.approx(1, abs=1e-13)


def test_trigram_predicts_what_it_was_made_of_better_than_less_context_does() -> None:
    document = b"def one(self):\n    return self.one\n" * 20
    bits = [yardsticks.WittenBell([document], order).bits([document]) for order in (1, 2, 3)]
    assert bits == sorted(bits, reverse=True)
    assert bits[2] < 0.6 < 3.5 < bits[0]


def test_bits_count_every_byte_of_every_document_once() -> None:
    model = yardsticks.WittenBell([b"abc" * 9], 3)
    documents = [b"abcab", b"c"]
    nats = -sum(np.log(model.probabilities(document)).sum() for document in documents)
    assert model.bits(documents) == pytest.approx(nats / math.log(2) / 6, rel=1e-14)


def test_gzip_compresses_each_document_by_itself_as_well_as_it_can() -> None:
    document = Path(__file__).read_bytes()
    assert len(gzip.compress(document, 6)) > len(gzip.compress(document, 9))
    assert yardsticks.gzip_bits((document, document)) == 8 * len(gzip.compress(document, 9)) / len(document)


def test_yardsticks_are_of_the_held_out_text() -> None:
    text = data.Text("", (b"ab" * 50, b"cd" * 50), (b"abab", b"cdcd"))
    found = yardsticks.measure(text, [b"ab" * 50])
    assert found["trigram of all training text"] < found["trigram of what the models saw"]
    assert found["trigram of all training text"] < found["unigram of all training text"]
    assert found["gzip -9"] == yardsticks.gzip_bits(text.held_out)
