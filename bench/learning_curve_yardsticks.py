"""What the models of learning_curve.py are measured against: byte statistics and gzip, in bits a byte."""

import gzip
from collections.abc import Sequence

import numpy as np
from learning_curve_data import SEPARATOR, Text
from numpy.typing import NDArray


class WittenBell:
    """A model of bytes from the counts of n-grams, interpolated as Witten and Bell did.

    With n(h c) how often byte c follows the bytes h, n(h) how often any byte does and k(h) how many different ones do::

        P(c | h) = (n(h c) + k(h) P(c | h')) / (n(h) + k(h))

    where h' is h without its first byte, and 1 / 256 stands behind the shortest one, which is empty.

    Args:
        documents: what is counted; :data:`SEPARATOR` stands before each.
        order: n, at least 1: of three, a byte is told from the two before it.

    """

    def __init__(self, documents: Sequence[bytes], order: int) -> None:
        self._order = order
        grams = np.concatenate([_grams(document, order) for document in documents])
        self._counts = [np.bincount(grams & (256**n - 1), minlength=256**n).reshape(-1, 256) for n in _orders(order)]
        self._totals = [counts.sum(1) for counts in self._counts]
        self._kinds = [(counts > 0).sum(1) for counts in self._counts]

    def probabilities(self, document: bytes) -> NDArray[np.float64]:
        """Return what the model gave to each byte of the document, knowing those before it."""
        grams = _grams(document, self._order)
        result = np.full(len(document), 1 / 256)
        for n, counts, totals, kinds in zip(_orders(self._order), self._counts, self._totals, self._kinds, strict=True):
            gram = grams & (256**n - 1)
            before = gram >> 8
            known = totals[before] > 0  # or else what is shorter decides
            mixed = (counts.reshape(-1)[gram] + kinds[before] * result) / np.maximum(totals[before] + kinds[before], 1)
            result = np.where(known, mixed, result)
        return result

    def bits(self, documents: Sequence[bytes]) -> float:
        """Return the mean -log2 of the probability of every byte."""
        return -sum(float(np.log2(self.probabilities(one)).sum()) for one in documents) / sum(map(len, documents))


def measure(text: Text, seen: Sequence[bytes]) -> dict[str, float]:
    """Return the bits a byte of what is held out, of every yardstick; ``seen`` is what the models learned from."""
    held_out = text.held_out
    return {
        "trigram of all training text": WittenBell(text.training, 3).bits(held_out),
        "trigram of what the models saw": WittenBell(seen, 3).bits(held_out),
        "unigram of all training text": WittenBell(text.training, 1).bits(held_out),
        "gzip -9": gzip_bits(held_out),
    }


def gzip_bits(documents: Sequence[bytes]) -> float:
    """Return the bits a byte of ``gzip -9``, each document by itself."""
    return 8 * sum(len(gzip.compress(one, 9, mtime=0)) for one in documents) / sum(map(len, documents))


def _grams(document: bytes, order: int) -> NDArray[np.int64]:
    """Return the n bytes that end with each byte of the document, as one number."""
    padded = np.frombuffer(SEPARATOR * (order - 1) + document, np.uint8).astype(np.int64)
    result = np.zeros(len(document), np.int64)
    for n in range(order):
        result = result << 8 | padded[n : n + len(document)]
    return result


def _orders(order: int) -> range:
    return range(1, order + 1)
