"""The command for a short time on a GPU, rehearsed: its own programs, with a wrong result and a step that hangs."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from bench_scripts import ROOT, assert_refused
from common import about
from piece import commands, machine, memcheck, plan, processes, profile
from ready import kernel_cache

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels, which a GPU compiles")


@without_gpu
def test_rehearsal_finds_the_wrong_result_ends_what_hangs_and_prints_a_table(tmp_path: Path) -> None:
    options = ["--steps", "machine,correctness,profile", "--groups", "rwkv4_step,steps", "--budget", "800"]
    injected = ["--wrong", "rwkv4_step", "--hang", "profile"]
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "first", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run([*command, *options, *injected], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    cases: dict[str, list[dict[str, Any]]] = {"rwkv4_step": [], "steps": []}
    for row in rows:
        if row["what"] == "case":
            cases[row["group"]].append(row)
    assert all("error" in row for row in cases["rwkv4_step"])
    assert not any("error" in row for row in cases["steps"])
    ended = {row["name"]: row["status"] for row in rows if row["what"] == "command" and row["step"] != "correctness"}
    assert ended == {"machine": "passed", "rwkv4_step": "passed", "profile": "out of time"}  # the second under memcheck
    assert {row["group"] for row in rows if row["what"] == "memcheck"} == {"rwkv4_step"}
    table = (tmp_path / "table.txt").read_text()
    assert done.stdout.rstrip().endswith(table[table.index("A REHEARSAL") :].rstrip())
    assert "correctness rwkv4_step norm_mix bfloat16 3x65: " in table
    assert len(list(tmp_path.iterdir())) <= 8


@without_gpu
@pytest.mark.parametrize("program", ["headline", "generation", "profile", "peers", "gen_time_rows"])
def test_steps_are_rehearsed_by_their_own_programs(program: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)] if program in ("peers", "gen_time_rows") else []
    command = [sys.executable, "-m", f"piece.{program}", "--rehearse", *out]
    environment = processes.environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kinds = {
        "headline": {"copy", "bandwidth"},
        "generation": {"model", "token", "trace", "kernel"},
        "profile": set(),
        "peers": {"copy", "peer"},
        "gen_time_rows": {"series"},
    }
    assert {row["what"] for row in rows} == kinds[program]
    assert not any("error" in row for row in rows)


def test_every_command_of_a_plan_exists() -> None:
    for steps in (plan.first(), plan.second()):
        for one in (command for step in steps for command in step.commands):
            if one.arguments[0] == "-m":
                assert (ROOT / "bench" / "piece" / f"{one.arguments[1].removeprefix('piece.')}.py").is_file()
            assert not any(re.search(r"\{\w+\}", argument) for argument in one.filled(5.0, "out"))


def test_commit_is_told_where_there_is_no_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(commands.COMMIT, raising=False)
    assert commands.commit("given") == "given"
    monkeypatch.setenv(commands.COMMIT, "of the environment")
    assert commands.commit() == about._commit() == "of the environment"
    monkeypatch.delenv(commands.COMMIT)
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(commands.runner, "READY", tmp_path)
    assert commands.commit() is None
    (tmp_path / "commit").write_text("of the preparation\n")
    assert commands.commit() == "of the preparation"


def test_table_is_printed_once_more(tmp_path: Path, capsys: Any) -> None:
    row = {
        "step": "run",
        "at": 0.1,
        "what": "begun",
        "command": "second",
        "budget": 380.0,
        "commit": "123",
        "code": "4",
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + '\n{"what": "cut o')
    assert gpu.main(["table", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("gpu.py second: 0 s of 380, commit 123, code 4\n\nNOTHING FAILED")


def test_bad_command_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for arguments, message in (
        (["first"], "the following arguments are required: --out"),
        (["first", "--out", "file/x"], "cannot write into 'file/x': Not a directory"),
        (["first", "--out", "x", "--budget", "soon"], "expected at least 10 seconds, got 'soon'"),
        (["first", "--out", "x", "--steps", "none"], "unknown 'none' (choose from machine, correctness, "),
        (["second", "--out", "x", "--groups", "none"], "unknown 'none' (choose from wkv-float32, "),
        (["first", "--out", "x", "--hang", "profile"], "--wrong and --hang are for a rehearsal"),
        (["table", "--out", "x"], "there is no rows.jsonl in 'x'"),
    ):
        assert_refused(gpu, arguments, message, capsys)


def test_what_ncu_prints_becomes_a_row_a_kernel() -> None:
    text = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","_wkv_fwd_kernel","gpu__time_duration.sum","us","1,234.5"
"0","1","_wkv_fwd_kernel","another","%","1"
"1","1","_wkv_bwd_kernel","launch__registers_per_thread","register/thread","238"
"""
    forward, backward = profile.figures(text)
    assert forward == {"what": "profile", "kernel": "_wkv_fwd_kernel", "us": [1234.5, "us"]}
    assert backward["registers"] == [238.0, "register/thread"]
    assert list(profile.figures("==ERROR== ERR_NVGPUCTRPERM")) == []


def test_what_the_sanitizer_finds_becomes_rows(capsys: Any) -> None:
    said = ["case T=1 C=3", "========= Invalid __global__ read of size 4 bytes", "========= ERROR SUMMARY: 1 error"]
    code = f"import sys; print({chr(10).join(said)!r}); sys.exit(1)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert memcheck.report("wkv-float32", process) == 1
    first, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["case"], first["error"]) == ("T=1 C=3", "Invalid __global__ read of size 4 bytes")
    assert (last["errors"], last["last"]) == (1, "T=1 C=3")


def test_kernels_for_another_machine_are_no_failure_of_a_rehearsal(tmp_path: Path, monkeypatch: Any) -> None:
    fit = kernel_cache.Fit(reasons=("made with Triton 3.6.0, here is 3.9.0",))
    monkeypatch.setattr(kernel_cache, "unpack", lambda *_: fit)
    (tmp_path / "cache.tar.xz").touch()
    row = machine.unpacked(tmp_path / "cache.tar.xz", tmp_path)
    assert row["error"] == "made with Triton 3.6.0, here is 3.9.0"
    row = machine.unpacked(tmp_path / "cache.tar.xz", tmp_path, rehearse=True)
    assert "error" not in row
    assert row["notes"] == ["made with Triton 3.6.0, here is 3.9.0"]


def test_missing_tools_and_cache_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(profile.shutil, "which", lambda *_, **__: None)
    assert profile.main([]) == memcheck.main(["steps"]) == 77
    assert [json.loads(line)["reason"] for line in capsys.readouterr().out.splitlines()] == [
        "there is no ncu",
        "there is no such tool",
    ]
    assert machine.unpacked(tmp_path / "cache.tar.xz", tmp_path)["kernels"] == 0
    assert machine.main([]) == 1
    assert "there is no GPU here" in capsys.readouterr().out


def test_first_call_that_compiles_is_no_measure(capsys: pytest.CaptureFixture[str]) -> None:
    from piece import clocks, headline, host_clock

    calls: list[float] = []

    class Slow(host_clock.Immediate):
        def now(self) -> float:  # the first call takes ten seconds more, of whose clock this is the fourth reading
            calls.append(time.perf_counter())
            return calls[-1] + 10.0 * (len(calls) > 3)

    slow = headline.Effort(repeats=1, seconds=0.0, turn=1e-3, once=0.25, most=1)
    good = headline.measure(headline.cases(True)[1], Slow(), 1.0, slow, clocks.Clocks())
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert good
    assert [row["times"] > 0 for row in found] == [True, True]
