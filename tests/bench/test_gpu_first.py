"""The commands for a short time on a GPU, rehearsed: their own programs, with a wrong result and a step that hangs."""

import argparse
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
from common import about, light
from gpu_minutes import commands, machine, plan, profile, step
from precompiled import kernel_cache

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels, which a GPU compiles")


def rehearsed(folder: Path, *options: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Return the exit status of a rehearsal, what it printed, and its rows."""
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), *options, "--rehearse", "--budget", "800"]
    done = subprocess.run([*command, "--out", str(folder)], capture_output=True, text=True, cwd=folder)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return done.returncode, done.stdout, rows


def statuses(rows: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    return {(row["step"], row["name"]): row["status"] for row in rows if row["what"] == "command"}


@without_gpu
def test_first_command_finds_the_wrong_result_ends_what_hangs_and_prints_a_table(tmp_path: Path) -> None:
    steps = ("--steps", "machine,correctness,headline,generation,profile", "--groups", "rwkv4_step,steps")
    status, printed, rows = rehearsed(tmp_path, "first", *steps, "--wrong", "rwkv4_step", "--hang", "profile")
    assert status == 1
    wrong = {(row["group"], "error" in row) for row in rows if row["what"] == "case"}
    assert wrong == {("rwkv4_step", True), ("steps", False)}
    assert statuses(rows) == {
        ("machine", "machine"): "passed",
        ("correctness", "rwkv4_step"): "failed",
        ("correctness", "steps"): "passed",
        ("memcheck", "rwkv4_step"): "passed",
        ("headline", "headline"): "passed",
        ("generation", "generation"): "passed",
        ("profile", "profile"): "out of time",
    }
    assert {row["group"] for row in rows if row["what"] == "memcheck"} == {"rwkv4_step"}
    kinds = {step: {row["what"] for row in rows if row["step"] == step} for step in ("headline", "generation")}
    assert kinds["headline"] == {"copy", "bandwidth", "command", "step"}
    assert kinds["generation"] == {"model", "token", "trace", "kernel", "command", "step"}
    assert not [row for row in rows if "error" in row and row["step"] in kinds]
    table = (tmp_path / "table.txt").read_text()
    assert printed.rstrip().endswith(table[table.index("A REHEARSAL") :].rstrip())
    assert "correctness rwkv4_step norm_mix bfloat16 3x65: " in table
    assert len(list(tmp_path.iterdir())) <= 8


@without_gpu
def test_second_command_measures_peers_and_generation(tmp_path: Path) -> None:
    status, printed, rows = rehearsed(tmp_path, "second", "--steps", "peers,gen_time")
    assert status == 0, printed
    assert statuses(rows) == {("peers", "peers"): "passed", ("gen_time", "gen_time"): "passed"}
    assert {"peer", "series"} <= {row["what"] for row in rows}
    assert {"ops.json", "gen_time.json"} <= {path.name for path in tmp_path.iterdir()}


def test_every_command_of_a_plan_exists() -> None:
    for one in (command for make in plan.PLANS.values() for each in make() for command in each.commands):
        if one.arguments[0] == "-m":
            assert (ROOT / "bench" / f"{one.arguments[1].replace('.', '/')}.py").is_file()
        else:
            assert (ROOT / one.arguments[0]).is_file()
        if one.arguments[:2] == ("-m", "gpu_minutes.step"):
            assert one.arguments[2] in step.STEPS
            assert (ROOT / "bench" / "gpu_minutes" / f"{one.arguments[2]}.py").is_file()
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
    row = {"step": "run", "at": 0.1, "what": "begun", "command": "second", "budget": 380.0, "commit": "1", "code": "4"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + '\n{"what": "cut o')
    assert gpu.main(["table", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("gpu.py second: 0 s of 380, commit 1, code 4\n\nNOTHING FAILED")


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


def test_kernels_for_another_machine_are_no_failure_of_a_rehearsal(tmp_path: Path, monkeypatch: Any) -> None:
    assert machine.unpacked(tmp_path / "cache.tar.xz", tmp_path)["kernels"] == 0
    why = "made with Triton 3.6.0, here is 3.9.0"
    monkeypatch.setattr(kernel_cache, "unpack", lambda *_: kernel_cache.Fit(reasons=(why,)))
    (tmp_path / "cache.tar.xz").touch()
    assert machine.unpacked(tmp_path / "cache.tar.xz", tmp_path)["error"] == why
    row = machine.unpacked(tmp_path / "cache.tar.xz", tmp_path, rehearse=True)
    assert "error" not in row
    assert row["notes"] == [why]


def test_missing_tools_and_gpu_are_said(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(light.shutil, "which", lambda *_, **__: None)
    assert step.main(["profile"]) == light.NOT_AVAILABLE
    assert json.loads(capsys.readouterr().out)["reason"] == "there is no ncu"
    assert machine.run(argparse.Namespace(rehearse=False)) == 1
    assert "there is no GPU here" in capsys.readouterr().out


@without_gpu
def test_first_call_that_compiles_is_no_measure(capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_minutes import headline
    from launch_shapes.device import Rehearsal

    calls: list[float] = []

    class Slow(Rehearsal):
        def now(self) -> float:  # the first call takes ten seconds more, of whose clock this is the fourth reading
            calls.append(time.perf_counter())
            return calls[-1] + 10.0 * (len(calls) > 3)

    slow = headline.Effort(repeats=1, seconds=0.0, turn=1e-3, once=0.25, most=1)
    assert headline.measure(headline.cases(True)[1], Slow(), 1.0, slow, machine.Clocks())
    assert [json.loads(line)["times"] > 0 for line in capsys.readouterr().out.splitlines()] == [True, True]
