"""The text of learning_curve.py: what is trained on, what is held out, and what every step sees."""

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

SEPARATOR = b"\0"  # stands before every document; no source file holds it
ONE_IN = 20  # files are held out
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


@dataclass(frozen=True)
class Text:
    """Whole documents, each of them either trained on or held out."""

    title: str
    training: tuple[bytes, ...]
    held_out: tuple[bytes, ...]

    @cached_property
    def digest(self) -> str:
        """Tell one text from another."""
        parts = [hashlib.sha256(one).hexdigest() for one in (*self.training, b"held out", *self.held_out)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


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


@dataclass(frozen=True)
class Batch:
    """What a step sees: ``inputs`` and the bytes after them, ``targets``, both int64 ``[B, T]``."""

    inputs: Tensor
    targets: Tensor
    first: bool  # nothing comes before it
    cu_seqlens: Tensor  # where texts start if the windows are packed, one after another, and cut between documents


class Batches:
    """The batches of every training: windows of T bytes, none of them twice before all were seen.

    The documents are shuffled, joined and cut into B streams of equal length, and these into windows. Consecutive
    batches go on where the one before ended, row by row; otherwise windows come in random order.
    """

    def __init__(self, text: Text, rows: int, length: int, seed: int, consecutive: bool = False) -> None:
        """Lay out the windows."""
        generator = torch.Generator().manual_seed(seed)
        documents = [text.training[n] for n in torch.randperm(len(text.training), generator=generator).tolist()]
        joined = b"".join(SEPARATOR + document for document in documents)
        stream = len(joined) // rows
        self.windows = (stream - 1) // length  # of each row
        if self.windows < 1:
            raise ValueError(f"the text must have at least {rows * (length + 1)} bytes, got {len(joined)}")
        self._length = length
        self._bytes = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
        starts = torch.tensor([0, *(1 + len(document) for document in documents[:-1])]).cumsum(0)
        self._starts = torch.zeros(len(joined), dtype=torch.bool).index_fill(0, starts, True)
        self._offsets = stream * torch.arange(rows)[:, None] + length * torch.arange(self.windows)
        if not consecutive:
            order = torch.randperm(self._offsets.numel(), generator=generator)
            self._offsets = self._offsets.flatten()[order].view_as(self._offsets)

    def __getitem__(self, step: int) -> Batch:
        """Return what this step sees; it depends on nothing else."""
        which = step % self.windows
        index = self._offsets[:, which, None] + torch.arange(self._length + 1)
        tokens, starts = self._bytes[index].long(), self._starts[index[:, :-1]]
        starts[:, 0] = True
        ends = torch.tensor([starts.numel()])
        cu_seqlens = torch.cat((starts.flatten().nonzero().flatten(), ends))
        return Batch(tokens[:, :-1], tokens[:, 1:], which == 0, cu_seqlens)

    def seen(self, steps: int) -> list[bytes]:
        """Return what so many steps see, documents and pieces of them."""
        begins = self._offsets[:, :steps].flatten().sort().values.tolist()
        pieces = [bytes(self._bytes[begin : begin + self._length].numpy()) for begin in begins]
        return [part for piece in pieces for part in piece.split(SEPARATOR) if part]
