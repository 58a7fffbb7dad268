"""The program that launches every kernel for compute-sanitizer, here without it: all are launched, and run."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import sanitize
import torch
from bench_scripts import ROOT, assert_refused
from piece import processes

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels, which a GPU compiles")


@without_gpu
@pytest.mark.parametrize("group", ["wkv-float32", "linear_scan-complex64"])
def test_kernels_run_packed_and_in_chunks(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "SWITCHES", [(True, True, True)])
    assert sanitize.main([group]) == 0


@without_gpu
def test_every_kernel_is_launched_packed_and_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    launched: dict[str, list[bool]] = {}

    def record(kernel: Any, *arguments: Any, **options: Any) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        launched.setdefault(kernel.__name__, []).append(named.get("edge_ptr") is not None)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    assert sanitize.main([]) == 0
    code = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert launched.keys() == set(re.findall(r"^def (\w+_kernel)\(", code, re.MULTILINE))
    for name in ("_wkv_fwd_kernel", "_wkv_bwd_kernel", "_linear_scan_fwd_kernel", "_linear_scan_bwd_kernel"):
        assert set(launched[name]) == {False, True}, name


def test_status_is_that_of_the_tool(capfd: pytest.CaptureFixture[str]) -> None:
    def under(code: str) -> int:
        return int(sanitize.under([sys.executable, "-c", code], ["wkv-float32"]))

    assert under("import os; assert os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1'") == 0
    assert under("import sys; print('found a bad write'); sys.exit(1)") == 1
    assert "found a bad write" in capfd.readouterr().out
    assert under(f"import sys; print({sanitize.REFUSED!r}); sys.exit(1)") == sanitize.NOT_AVAILABLE


def test_status_of_gpu_py_is_the_same() -> None:
    assert processes.NOT_AVAILABLE == sanitize.NOT_AVAILABLE


def test_bad_command_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(sanitize, ["wkv-int8"], "unknown group 'wkv-int8' (choose from wkv-float32, ", capsys)
    assert_refused(sanitize, ["--tool", "memcheck"], "there is no GPU here", capsys)
    assert_refused(sanitize, ["--tool", "leaks"], "invalid choice: 'leaks'", capsys)


def test_missing_tool_is_not_available(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize.shutil, "which", lambda *_, **__: None)
    assert sanitize.main(["--tool", "memcheck"]) == sanitize.NOT_AVAILABLE
    assert "not there" in capsys.readouterr().out
