"""A model that writes printable text, and the command run within the process."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rwkv4_models import trained

from fastwkv.cli.main import main
from fastwkv.nn import RWKV4, RWKV4Config, generate

CONFIG = RWKV4Config(layers=2, width=16, vocab_size=256)


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model() -> RWKV4:
    """Every byte it is likely to write is printable ASCII, so that one character stands for one token."""
    model = trained(CONFIG)
    with torch.no_grad():
        model.ln_out.bias.fill_(1)
        model.head.weight[[*range(32), *range(127, 256)]] -= 3  # of logits, 16 channels × 3
    return model


@pytest.fixture
def folder(model: RWKV4, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run() -> Callable[..., Result]:
    def run(*arguments: object, stderr: io.StringIO | None = None) -> Result:
        out, err = io.StringIO(), stderr or io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main([str(argument) for argument in arguments])
            except SystemExit as stopped:
                status = int(stopped.code or 0)
        return Result(status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def write(folder: Path, run: Callable[..., Result]) -> Callable[..., str]:
    """Run ``fastwkv generate`` with the model, successfully; return what it prints."""

    def write(*arguments: object) -> str:
        done = run("generate", "--model", folder, *arguments)
        assert done.status == 0, done.err
        return done.out

    return write


@pytest.fixture
def expected(model: RWKV4) -> Callable[..., str]:
    """Return what the package generates after this prompt."""

    def expected(prompt: bytes, count: int, model: RWKV4 = model, **draw: float) -> str:
        tokens = generate(model, torch.tensor([list(prompt)]), count, **draw)
        return bytes(int(token) for token in tokens).decode()

    return expected
