"""The programs of bench/, which is a folder of scripts and no package: imported, run, and given bad arguments."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    """Import a module of bench/."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def run_script(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program as a user does, in another folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)  # it is the program that sets it
    command = [sys.executable, str(ROOT / "bench" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=folder)


def assert_refused(script: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that a program answers these arguments with one line and status 2, and writes nothing."""
    before = {path for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in printed.err
    assert printed.err.startswith(f"{script.__name__}.py: ")
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert {path for path in Path().rglob("*") if path.is_file()} == before
