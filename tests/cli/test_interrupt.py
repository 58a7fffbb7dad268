"""Ctrl-C while the command starts ends it at once, with status 130 and without a word, and no other program."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastwkv import _startup

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "import sys\nfrom fastwkv.cli.main import main\nsys.exit(main())\n"  # as pip writes it
STARTS = {
    "module": ("-m", "fastwkv", "info", "x"),
    "module, options of Python": ("-X", "utf8", "-mfastwkv", "--version"),
    "script": ("fastwkv", "info", "x"),
}
IMPORTS = {  # what importing PyTorch does when it is interrupted, from Python and as its code in C may
    "waits": "",
    "swallows": "except BaseException:\n    raise ImportError('cannot be imported') from None\n",
}


def interrupted(folder: Path, during: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python, interrupted while it imports a stand-in for PyTorch that never ends."""
    (folder / "fastwkv").write_text(SCRIPT)
    (folder / "torch").mkdir()
    wait = "import pathlib, time\npathlib.Path('started').touch()\ntry:\n    while True:\n        time.sleep(0.01)\n"
    (folder / "torch" / "__init__.py").write_text(wait + (IMPORTS[during] or "finally:\n    pass\n"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while not (folder / "started").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("during", IMPORTS)
@pytest.mark.parametrize("start", STARTS)
def test_interruption_during_the_import_of_torch_ends_quietly(start: str, during: str, tmp_path: Path) -> None:
    done = interrupted(tmp_path, during, *STARTS[start])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_interruption_of_other_programs_is_left_alone(tmp_path: Path) -> None:
    done = interrupted(tmp_path, "waits", "-c", "import fastwkv")
    assert done.stderr.endswith("KeyboardInterrupt\n")


@pytest.fixture
def handler():
    before = signal.getsignal(signal.SIGINT)
    yield lambda: signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("argv", "orig_argv", "is_it"),
    [
        (["-m", "info"], ["python", "-m", "fastwkv", "info"], True),
        (["-m"], ["python", "-mfastwkv"], True),
        (["/usr/bin/fastwkv"], ["python", "/usr/bin/fastwkv"], True),
        (["fastwkv.exe", "info"], ["fastwkv.exe", "info"], True),
        (["-m", "fastwkv"], ["python", "-m", "pytest", "fastwkv"], False),
        (["-m"], [], False),
        (["-c"], ["python", "-c", "import fastwkv"], False),
        ([""], ["python"], False),
        ([], [], False),
        (["train.py", "fastwkv"], ["python", "train.py", "fastwkv"], False),
    ],
)
def test_only_the_command_changes_what_ctrl_c_does(argv, orig_argv, is_it, handler, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _startup.end_when_interrupted()
    assert (handler() is not signal.default_int_handler) == is_it
    _startup.interrupt_as_usual()
    assert handler() is signal.default_int_handler


def test_ctrl_c_that_is_ignored_or_handled_stays_so(handler, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastwkv"])
    for own in (signal.SIG_IGN, signal.SIG_DFL, lambda *_: None):
        signal.signal(signal.SIGINT, own)
        _startup.end_when_interrupted()
        assert handler() is own
        _startup.interrupt_as_usual()
        assert handler() is own


def test_command_that_has_started_is_interrupted_as_any_program(handler, run, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastwkv"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _startup.end_when_interrupted()
    run("--version")
    assert handler() is signal.default_int_handler
