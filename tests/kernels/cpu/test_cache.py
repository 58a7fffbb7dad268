"""Compiled kernels on disk: whatever has become of the files, a call returns what it should."""

import hashlib
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SOURCE = """
from fastwkv.kernels.cpu.numerics import kernel

@kernel
def twice(x):
    return 2 * x
"""


def kernel_of(folder: Path) -> Any:
    """The kernel as a process has it that begins now: nothing of it is compiled yet, its files lie in the folder."""
    (source := folder / "twice.py").write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("twice", source)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.twice


def was_read(kernel: Any) -> bool:
    return bool(kernel.stats.cache_hits) and not kernel.stats.cache_misses


def written(folder: Path) -> dict[str, Path]:
    """The index and the compiled form, by the ends of their names, of a kernel that was called once."""
    return {path.suffix: path for path in (folder / "__pycache__").iterdir() if path.suffix in (".nbi", ".nbc")}


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Less of a file, nothing of it, other bytes, or one other bit."""
    how = draw(st.sampled_from(("cut", "other bytes", "bit")))
    if how == "other bytes":
        return draw(st.binary(max_size=2000))
    place = draw(st.integers(0, len(whole) - 1))
    if how == "cut":
        return whole[:place]
    return whole[:place] + bytes([whole[place] ^ 1 << draw(st.integers(0, 7))]) + whole[place + 1 :]


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@settings(max_examples=20)
@given(data=st.data())
def test_damaged_file_is_replaced(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    assert kernel_of(tmp_path)(3) == 6
    path = written(tmp_path)[suffix]
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    kernel = kernel_of(tmp_path)
    assert kernel(4) == 8
    assert not was_read(kernel)
    kernel = kernel_of(tmp_path)
    assert kernel(5) == 10
    assert was_read(kernel)


def test_files_that_are_whole_are_read(tmp_path: Path) -> None:
    kernel_of(tmp_path)(3)
    before = {path: path.stat().st_mtime_ns for path in written(tmp_path).values()}
    kernel = kernel_of(tmp_path)
    assert kernel(4) == 8
    assert was_read(kernel)
    assert {path: path.stat().st_mtime_ns for path in written(tmp_path).values()} == before


def test_damage_to_one_compiled_form_leaves_the_others(tmp_path: Path) -> None:
    kernel = kernel_of(tmp_path)
    kernel(3)
    written(tmp_path)[".nbc"].write_bytes(b"")
    kernel(2.5)
    kernel = kernel_of(tmp_path)
    assert kernel(1.5) == 3
    assert was_read(kernel)
    assert kernel(4) == 8
    assert not was_read(kernel)


def test_compiled_form_for_another_signature_is_not_run(tmp_path: Path) -> None:
    # As two processes leave them that begin at once, each with a signature of its own: both choose the first name.
    kernel_of(tmp_path)(3)
    first = written(tmp_path)
    for_integers = first[".nbc"].read_bytes()
    first[".nbi"].unlink()
    kernel_of(tmp_path)(2.5)
    first[".nbc"].write_bytes(for_integers)
    kernel = kernel_of(tmp_path)
    assert kernel(2.5) == 5.0
    assert not was_read(kernel)


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("content", [b"no pickle", pickle.dumps("0.1") + pickle.dumps(3), b"cno_such_module\nname\n."])
def test_whole_file_of_something_else_is_replaced(tmp_path: Path, suffix: str, content: bytes) -> None:
    kernel_of(tmp_path)(3)
    written(tmp_path)[suffix].write_bytes(content + hashlib.sha256(content).digest())
    assert kernel_of(tmp_path)(4) == 8
    kernel = kernel_of(tmp_path)
    assert kernel(5) == 10
    assert was_read(kernel)


def test_files_of_another_numba_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other:
        other.setattr("numba.__version__", "0.1")
        kernel_of(tmp_path)(3)
    kernel = kernel_of(tmp_path)
    assert kernel(4) == 8
    assert not was_read(kernel)
    kernel = kernel_of(tmp_path)
    assert kernel(5) == 10
    assert was_read(kernel)


def folder_in_the_place_of_the_index(files: dict[str, Path]) -> None:
    files[".nbi"].unlink()
    files[".nbi"].mkdir()


def folder_in_the_place_of_the_compiled_form(files: dict[str, Path]) -> None:
    files[".nbc"].unlink()
    files[".nbc"].mkdir()


def file_in_the_place_of_the_folder(files: dict[str, Path]) -> None:
    folder = files[".nbi"].parent
    folder.rename(folder.with_name("elsewhere"))
    folder.write_bytes(b"")


@pytest.mark.parametrize(
    "spoil",
    [folder_in_the_place_of_the_index, folder_in_the_place_of_the_compiled_form, file_in_the_place_of_the_folder],
)
def test_files_that_cannot_be_replaced_stop_no_call(tmp_path: Path, spoil: Callable[[dict[str, Path]], None]) -> None:
    kernel_of(tmp_path)(3)
    kernel = kernel_of(tmp_path)
    spoil(written(tmp_path))
    assert [kernel(4), kernel(2.5), kernel(5)] == [8, 5.0, 10]
    assert not was_read(kernel)


def test_full_disk_stops_no_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    kernel = kernel_of(tmp_path)
    monkeypatch.setattr("os.replace", full)
    assert [kernel(4), kernel(2.5)] == [8, 5.0]
    assert not written(tmp_path)


CALL = "import torch, fastwkv; x = torch.ones(1, 2, 3); print(fastwkv.linear_scan(0.5 * x, x)[0, 1, 0].item())"


def test_operator_runs_in_a_process_that_finds_damaged_files(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True)
        assert (done.stdout.strip(), done.stderr) == ("1.5", "")
        assert {path.suffix for path in tmp_path.rglob("*") if path.stat().st_size > 64} >= {".nbi", ".nbc"}
        for path in tmp_path.rglob("*.nb?"):
            path.write_bytes(path.read_bytes()[:64])
