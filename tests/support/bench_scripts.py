"""The programs of bench/, which is a folder of scripts and no package: imported, run, and given bad arguments."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
from timing import by_turns

ROOT = Path(__file__).resolve().parents[2]

# Arguments that programs refuse, by the complaint; the files and folders are those of `occupy`.
BAD_OPTION = {
    "unrecognized arguments: --fast": ["--fast"],
    "cannot write into 'file/results': Not a directory": ["--out", "file/results"],
}
BAD_DEVICE = {
    "unknown device 'abacus' (choose from cpu, cuda, cuda:N)": ["--device", "abacus"],
    "unknown device 'meta'": ["--device", "meta"],
    "there is no device 'cuda:99' here": ["--device", "cuda:99"],
}
OCCUPIED = {"other": json.dumps({"device": {"name": "another machine"}}), "broken": "{", "foreign": "[]"}


def environment() -> dict[str, str]:
    """Return that of a process in which bench/ is found and kernels can be compiled.

    Its threads would wait for those of other tests: it has one.
    """
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join((str(ROOT), str(ROOT / "bench")))
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def run_script(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program as a user does, in another folder."""
    command = [sys.executable, str(ROOT / "bench" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder)


def occupy(folder: Path, script: ModuleType) -> None:
    """Put a file where no results can be, and results that are not to be replaced into folders."""
    (folder / "file").touch()
    for name, text in OCCUPIED.items():
        (folder / name).mkdir()
        (folder / name / f"{script.__name__}.json").write_text(text)


def bad_results(script: str) -> dict[str, list[str]]:
    """Return the folders of `occupy` that a program does not write into, by what it says of them."""
    choose = "choose another folder with --out"
    return {
        f"'other/{script}.json' was measured on 'another machine'; {choose}": ["--out", "other"],
        f"'broken/{script}.json' is not a result of this program; {choose}": ["--out", "broken"],
        f"'foreign/{script}.json' is not a result of this program; {choose}": ["--out", "foreign"],
    }


def assert_refused(script: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that a program answers these arguments with one line and status 2, and writes nothing."""
    before = _files()
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in printed.err
    assert printed.err.startswith(f"{script.__name__}.py: ")
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert _files() == before


def _files() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def assert_help_names(script: ModuleType, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that the help of a program names these options, no others, and is not too wide."""
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert sorted(re.findall(r"^  --([a-z0-9-]+)", text, re.MULTILINE)) == sorted(options.split())
    assert all(len(line) <= 120 for line in text.splitlines())


def interrupt(*_: Any, **__: Any) -> NoReturn:
    """Do what Ctrl-C does."""
    raise KeyboardInterrupt


def measured(task: Any, effort: Any) -> dict[str, Any]:
    """Run a task as the programs that time do, once for its result and then by turns; return its figures."""
    _, task.first = task.run()
    by_turns.measure([task], effort, lambda: None)
    assert task.failure is None
    return task.figures()
