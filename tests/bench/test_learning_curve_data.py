"""What models of bytes are trained on, what is held out, and the predictors that they are measured against."""

import gzip
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from papers import text
from papers.text import Windows, ngram_bits, witten_bell

DOCUMENTS = tuple(bytes([65 + n]) * (7 + 5 * n) for n in range(9))  # 243 bytes, each document of one letter


def test_files_are_trained_on_or_held_out_by_their_names(tmp_path: Path) -> None:
    names = [f"package/module_{n}.py" for n in range(200)]
    for name in (*names, "tests/one.py", "package/test/two.py", "idlelib/three.py", "site-packages/x/four.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "package" / "empty.py").touch()
    (tmp_path / "package" / "notes.txt").write_text("no source")
    found = text.standard_library(tmp_path)
    assert sorted(one.decode() for one in (*found.training, *found.held_out)) == sorted(names)
    assert [one.decode() for one in found.held_out] == sorted(name for name in names if text.is_held_out(name))
    assert 4 <= len(found.held_out) <= 20


def test_names_held_out_are_the_same_on_every_machine() -> None:
    names = [f"module_{n}.py" for n in range(100)]
    assert [n for n, name in enumerate(names) if text.is_held_out(name)] == [3, 21, 31, 53, 56, 64, 74, 89]


def test_standard_library_is_a_text_of_many_files_none_of_them_in_both_parts() -> None:
    found = text.standard_library()
    assert len(found.training) > 300
    assert len(found.held_out) > 10
    assert not any(text.SEPARATOR in document for document in (*found.training, *found.held_out))


def test_last_twentieth_of_a_file_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(200)))
    found = text.from_file(tmp_path / "text")
    assert (found.training, found.held_out) == ((bytes(range(190)),), (bytes(range(190, 200)),))


@pytest.mark.parametrize("consecutive", [False, True])
def test_every_window_comes_once_a_round(consecutive: bool) -> None:
    windows = Windows(DOCUMENTS, 3, 8, seed=0, consecutive=consecutive)
    assert windows.count == 10  # three streams of 84 bytes
    rounds = [[bytes(row.tolist()) for n in range(10) for row in windows[first + n]] for first in (0, 10)]
    assert rounds[0] == rounds[1]
    joined = b"".join(window[:8] for window in rounds[0])
    assert len(joined) == 240
    assert Counter(joined.replace(b"\0", b"")) == Counter(b"".join(windows.seen(10)))
    both = joined.replace(b"\0", b""), b"".join(DOCUMENTS)
    assert not Counter(both[0]) - Counter(both[1])


def test_consecutive_windows_go_on_where_the_row_ended() -> None:
    windows = Windows(DOCUMENTS, 3, 8, seed=0, consecutive=True)
    for n in range(9):
        assert torch.equal(windows[n][:, -1], windows[n + 1][:, 0])


def test_windows_are_shuffled_by_the_seed() -> None:
    first, again, other = (Windows(DOCUMENTS, 3, 8, seed, consecutive=False) for seed in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in range(10))
    assert not any(torch.equal(first[n], other[n]) for n in range(10))


def test_steps_see_no_more_than_their_windows() -> None:
    windows = Windows(DOCUMENTS, 3, 8, seed=0, consecutive=False)
    wanted = Counter(torch.cat([windows[n][:, :-1].flatten() for n in range(2)]).tolist())
    del wanted[0]
    assert Counter(b"".join(windows.seen(2))) == wanted


def test_text_that_fills_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="the text must have at least 400 bytes, got 252"):
        Windows(DOCUMENTS, 4, 99, seed=0, consecutive=False)


def test_unigram_of_a_known_string_is_counted_by_hand() -> None:
    a, b, new = witten_bell([b"aab"], [b"abc"], 1)
    assert (a, b, new) == pytest.approx(((2 + 2 / 256) / 5, (1 + 2 / 256) / 5, (2 / 256) / 5), rel=1e-15)
    bits = -(2 * math.log2(a) + math.log2(b) + math.log2(new)) / 4
    assert ngram_bits([b"aab"], [b"aa", b"bc"], 1) == pytest.approx(bits, rel=1e-15)


def test_trigram_of_a_known_string_is_counted_by_hand() -> None:
    xab, bab, aba, cd = np.split(witten_bell([b"abab"], [b"xab", b"bab", b"aba", b"cd"], 3), [3, 6, 9])
    unigram = (2 + 2 / 256) / 6  # of "a", and of "b"; contexts are two separators, then what came before
    bigram = {"after a": (2 + unigram) / 3, "after b": (1 + unigram) / 2}
    assert xab[2] == pytest.approx(bigram["after a"], rel=1e-15)  # "xa" was never seen
    assert bab[2] == pytest.approx((1 + bigram["after a"]) / 2, rel=1e-15)
    assert aba[2] == pytest.approx((1 + bigram["after b"]) / 2, rel=1e-15)
    assert cd[1] == pytest.approx(2 / 256 / 6, rel=1e-15)  # "c" was never seen


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_of_all_bytes_sum_to_one(order: int) -> None:
    counted = [b"the cat sat on the mat", b"a hat"]
    for context in [b"", b"t", b"th", b"zz", b"az", b"za", b"at"]:
        every = [context + bytes([byte]) for byte in range(256)]
        found = witten_bell(counted, every, order).reshape(256, -1)[:, -1]
        assert found.sum() == pytest.approx(1, abs=1e-13)


def test_gzip_compresses_each_document_by_itself_as_well_as_it_can() -> None:
    document = Path(__file__).read_bytes()
    assert len(gzip.compress(document, 6)) > len(gzip.compress(document, 9))
    assert text.gzip_bits((document, document)) == 8 * len(gzip.compress(document, 9)) / len(document)
