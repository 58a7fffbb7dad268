"""What the programs of the benchmarks share while they run: how they end early, what they say of a busy machine."""

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import interrupt
from common import program, result_file


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("run", "status", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (interrupt, 130, "\ninterrupted: writing what was measured\n"),
        (terminate, 130, "\ninterrupted: writing what was measured\n"),
    ],
    ids=["done", "wrong", "interrupted", "terminated"],
)
def test_run_is_saved_once_however_it_ends(
    run: Any, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, saved = signal.getsignal(signal.SIGTERM), []
    assert program.run_and_save(run, lambda: saved.append(signal.getsignal(signal.SIGTERM))) == status
    assert saved == [before]  # which is put back first
    assert signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr() == ("", said)


def test_error_is_not_hidden_but_what_was_measured_is_saved() -> None:
    before, saved = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(ZeroDivisionError):
        program.run_and_save(lambda: 1 // 0, lambda: saved.append(None))
    assert len(saved) == 1
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("cores", "device", "said"),
    [
        ([None, 0.1], "cpu", ""),
        ([], "cpu", ""),
        ([1.5, 0.3], "cuda", ""),
        ([None, 0.3, 1.5], "cpu", "some.py: other processes kept up to 1.5 cores busy: these times say little\n"),
    ],
)
def test_busy_cores_are_complained_about_on_a_cpu(
    cores: list[float | None], device: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program.complain_of_other_work("some.py", [{"other_cores": number} for number in cores], torch.device(device))
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_collector_waits_and_is_left_as_it_was(collects: bool) -> None:
    before = gc.isenabled()

    def work() -> None:
        with program.no_garbage_collection():
            assert not gc.isenabled()
            interrupt()

    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(KeyboardInterrupt):
            work()
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


def test_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result"
    result_file.replace(path, lambda part: part.write_text("first"))

    def failing(part: Path) -> None:
        part.write_text("half")
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        result_file.replace(path, failing)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
