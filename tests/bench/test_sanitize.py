"""The program that launches every kernel for compute-sanitizer, here without it: all are launched, and run."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import sanitize
import torch
from bench_scripts import ROOT, assert_refused

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels, which a GPU compiles")


@without_gpu
def test_every_kernel_is_launched_packed_and_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from correctness import checks, groups
    from triton.runtime.interpreter import InterpretedFunction

    launched: dict[str, list[bool]] = {}

    def record(kernel: Any, *arguments: Any, **options: Any) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        launched.setdefault(kernel.__name__, []).append(named.get("edge_ptr") is not None)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    monkeypatch.setattr(checks, "the_device", lambda rehearse: torch.device("cpu"))
    for group in groups.GROUPS[:-1]:  # of the last one the kernels are those of the others
        sanitize.launch(group, rehearse=False)
    code = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert launched.keys() == set(re.findall(r"^def (\w+_kernel)\(", code, re.MULTILINE))
    for name in ("_wkv_fwd_kernel", "_wkv_bwd_kernel", "_linear_scan_fwd_kernel", "_linear_scan_bwd_kernel"):
        assert set(launched[name]) == {False, True}, name


def test_status_is_that_of_the_tool_and_its_finds_are_rows(capfd: pytest.CaptureFixture[str]) -> None:
    def under(*said: str, status: int = 0) -> tuple[int, list[dict[str, Any]]]:
        code = f"import os, sys; assert 'PYTORCH_NO_CUDA_MEMORY_CACHING' in os.environ; print({chr(10).join(said)!r})"
        ended = sanitize.under([sys.executable, "-c", f"{code}; sys.exit({status})"], "steps")
        return ended, [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    assert under("========= ERROR SUMMARY: 0 errors") == (
        0, [{"what": "memcheck", "group": "steps", "errors": 0, "last": ""}],
    )  # fmt: skip
    found = ("case T=1 C=3", "========= Invalid __global__ read of size 4 bytes", "========= ERROR SUMMARY: 1 error")
    status, (first, last) = under(*found, status=1)
    assert status == 1
    assert (first["case"], first["error"]) == ("T=1 C=3", "Invalid __global__ read of size 4 bytes")
    assert (last["errors"], last["last"], last["error"]) == (1, "T=1 C=3", "exit status 1")
    assert under(sanitize.REFUSED, status=1)[0] == sanitize.NOT_AVAILABLE


def test_bad_command_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(sanitize, ["wkv-int8"], "unknown group 'wkv-int8' (choose from wkv-float32, ", capsys)
    assert_refused(sanitize, ["--tool", "leaks"], "invalid choice: 'leaks'", capsys)


@without_gpu
def test_machine_without_tool_or_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sanitize, "tool", lambda name: None)
    assert sanitize.main(["--tool", "memcheck", "steps"]) == sanitize.NOT_AVAILABLE
    assert "there is no such tool" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no GPU here"):
        sanitize.main(["steps"])
