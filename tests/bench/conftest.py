"""Fixtures of the tests of the benchmarks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bench_scripts import assert_refused, occupy


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let PyTorch compute in one thread, and afterwards in as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[ModuleType, list[str], str], None]:
    """Assert that a program refuses these arguments with this message, in a folder that is occupied."""
    monkeypatch.chdir(tmp_path)

    def check(script: ModuleType, arguments: list[str], message: str) -> None:
        occupy(tmp_path, script)
        assert_refused(script, arguments, message, capsys)

    return check
