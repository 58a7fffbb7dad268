"""Text for models of bytes: what is trained on, what is held out, and what simple predictors need for it."""

import gzip
import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SEPARATOR = b"\0"  # stands before every document; no source file holds it
ONE_IN = 20  # files are held out
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


class Text(NamedTuple):
    """Whole documents, each of them either trained on or held out."""

    title: str
    training: tuple[bytes, ...]
    held_out: tuple[bytes, ...]


def standard_library(folder: Path | None = None) -> Text:
    """Return the sources of Python's standard library; the hash of its name decides whether a file is held out."""
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    documents: tuple[list[bytes], list[bytes]] = [], []
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if LEFT_OUT.isdisjoint(name.parts) and (document := path.read_bytes()):
            documents[is_held_out(name.as_posix())].append(document)
    return Text("Python's standard library", *map(tuple, documents))


def is_held_out(name: str) -> bool:
    """Whether the file of this name is held out: one in twenty, the same ones on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % ONE_IN == 0


def from_file(path: Path) -> Text:
    """Return the text of a file, of which the last twentieth is held out."""
    content = path.read_bytes()
    cut = len(content) - len(content) // ONE_IN
    if cut == len(content):
        raise ValueError(f"the text must have at least {ONE_IN} bytes, got {cut}")
    return Text(path.name, (content[:cut],), (content[cut:],))


class Windows:
    """The batches of a training: windows of T bytes and the byte after each, none twice before all were seen.

    The documents are shuffled, joined and cut into B streams of equal length, and these into windows. Consecutive
    batches go on where the one before ended, row by row; otherwise windows come in random order.
    """

    def __init__(self, documents: Sequence[bytes], rows: int, length: int, seed: int, consecutive: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(documents), generator=generator).tolist()
        joined = b"".join(SEPARATOR + documents[n] for n in order)
        stream = len(joined) // rows
        self.count = (stream - 1) // length  # of each row
        if self.count < 1:
            raise ValueError(f"the text must have at least {rows * (length + 1)} bytes, got {len(joined)}")
        self._bytes, self._length = torch.frombuffer(bytearray(joined), dtype=torch.uint8), length
        self._offsets = stream * torch.arange(rows)[:, None] + length * torch.arange(self.count)
        if not consecutive:
            shuffled = torch.randperm(self._offsets.numel(), generator=generator)
            self._offsets = self._offsets.flatten()[shuffled].view_as(self._offsets)

    def __getitem__(self, step: int) -> Tensor:
        """Return what this step sees, int64 ``[B, T + 1]``."""
        return self._bytes[self._offsets[:, step % self.count, None] + torch.arange(self._length + 1)].long()

    def seen(self, steps: int) -> list[bytes]:
        """Return what so many steps see, documents and pieces of them."""
        begins = self._offsets[:, :steps].flatten().sort().values.tolist()
        pieces = [bytes(self._bytes[begin : begin + self._length].numpy()) for begin in begins]
        return [part for piece in pieces for part in piece.split(SEPARATOR) if part]


def gzip_bits(documents: Sequence[bytes]) -> float:
    """Return the bits a byte of ``gzip -9``, each document by itself."""
    return 8 * sum(len(gzip.compress(one, 9, mtime=0)) for one in documents) / sum(map(len, documents))


def ngram_bits(counted: Sequence[bytes], documents: Sequence[bytes], order: int) -> float:
    """Return the bits a byte that documents take a model of n-grams, n being the order: the mean -log2 of P."""
    return float(-np.log2(witten_bell(counted, documents, order)).mean())


def witten_bell(counted: Sequence[bytes], documents: Sequence[bytes], order: int) -> NDArray[np.float64]:
    """Return the probability of every byte of the documents, by the n-grams that were counted in others.

    Interpolated as Witten and Bell did. With n(h c) how often byte c follows the bytes h, n(h) how often any byte does
    and k(h) how many different ones do::

        P(c | h) = (n(h c) + k(h) P(c | h')) / (n(h) + k(h))

    where h' is h without its first byte, and 1 / 256 stands behind the shortest one, which is empty.
    """
    known, asked = _grams(counted, order), _grams(documents, order)
    result = np.full(len(asked), 1 / 256)
    for n in range(1, order + 1):
        counts = np.bincount(known & (256**n - 1), minlength=256**n).reshape(-1, 256)
        gram = asked & (256**n - 1)
        total, kinds = counts.sum(1)[gram >> 8], (counts > 0).sum(1)[gram >> 8]
        mixed = (counts.reshape(-1)[gram] + kinds * result) / np.maximum(total + kinds, 1)
        result = np.where(total > 0, mixed, result)  # or else what is shorter decides
    return result


def _grams(documents: Sequence[bytes], order: int) -> NDArray[np.int64]:
    """Return the n bytes that end with each byte of the documents, as one number; separators stand before each."""
    before = SEPARATOR * (order - 1)
    parts = [np.frombuffer(before + document, np.uint8).astype(np.int64) for document in documents]
    grams = [sum(part[n : len(part) - order + 1 + n] << 8 * (order - 1 - n) for n in range(order)) for part in parts]
    return np.concatenate(grams)
