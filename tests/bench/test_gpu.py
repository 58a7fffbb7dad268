"""The program that runs all that needs a GPU: which parts, how they end, what is remembered. The parts are small."""

import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import ROOT, assert_refused

for package in ("tqdm", "transformers"):
    pytest.importorskip(package)

import gpu as program
from common import about, command_line
from common.light import NOT_AVAILABLE
from gpu_minutes import parts as gpu
from gpu_minutes import processes

ABOUT = {"device": {"type": "cuda", "name": "NVIDIA H200"}, "versions": {}, "commit": "1234567"}


def part(name: str, code: str = "pass") -> Any:
    return gpu.Part(name, f"runs {name}", (sys.executable, "-c", code))


def run(folder: Path, *parts: Any, **options: Any) -> int:
    return gpu.run(parts, gpu.Record(folder, ABOUT), folder / "logs", **options)


def statuses(folder: Path) -> dict[str, str]:
    return {row["part"]: row["status"] for row in json.loads((folder / "gpu.json").read_text())["rows"]}


@pytest.mark.parametrize(
    ("name", "slug"), [("NVIDIA H200", "nvidia-h200"), ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3")]
)
def test_folder_is_named_after_the_device(name: str, slug: str) -> None:
    assert about.slug(name) == slug


def test_parts_run_in_order_and_a_failure_does_not_stop_the_next(tmp_path: Path, capsys: Any) -> None:
    where = f"import os; print('second'); exit(3 * (os.environ['PYTHONPATH'].split(os.pathsep)[0] == {str(ROOT)!r}))"
    assert run(tmp_path, part("one", "print('first')"), part("two", where)) == 1
    assert run(tmp_path, part("three")) == 0
    assert statuses(tmp_path) == {"one": "passed", "two": "failed", "three": "passed"}
    printed = capsys.readouterr().out
    assert printed.index("first") < printed.index("second") < printed.index("two                    failed")
    assert (tmp_path / "logs" / "two.log").read_text() == "second\n"
    text = (tmp_path / "gpu.json").read_text()
    rows = json.loads(text)["rows"]
    assert rows[0]["commit"] == "1234567"
    assert all(row["seconds"] > 0 for row in rows)
    assert str(tmp_path) not in text


def test_a_part_that_has_passed_is_not_run_again_and_one_that_failed_is(tmp_path: Path, monkeypatch: Any) -> None:
    def marking(name: str, status: int) -> Any:
        return part(name, f"import sys; open({str(tmp_path / name)!r}, 'a').write('x'); sys.exit({status})")

    parts = marking("good", 0), marking("bad", 1), marking("absent", NOT_AVAILABLE)

    def runs() -> dict[str, int]:
        return {name: (tmp_path / name).stat().st_size for name in ("good", "bad", "absent")}

    assert [run(tmp_path, *parts), run(tmp_path, *parts)] == [1, 1]
    assert runs() == {"good": 1, "bad": 2, "absent": 1}
    assert statuses(tmp_path)["absent"] == "not available"
    assert run(tmp_path, parts[0], again=True) == 0
    assert runs()["good"] == 2
    monkeypatch.setattr(gpu, "code", lambda: "changed")
    assert run(tmp_path, parts[0]) == 0
    assert runs()["good"] == 3


def test_part_out_of_time_is_asked_to_end_and_what_it_wrote_stays(tmp_path: Path) -> None:
    written = tmp_path / "written"
    code = f"""
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path({str(written)!r}).write_text("half")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("started", flush=True)
time.sleep(3600)
"""
    limit = 1.0  # in which it has to be up; a slow machine needs a longer one
    while not written.exists():
        limit *= 2
        ended, seconds = gpu.run_part(part("slow", code), tmp_path / "log", limit=limit, grace=limit)
        assert ended == "out of time"
        assert seconds >= limit
    assert written.read_text() == "half"
    assert (tmp_path / "log").read_text() == "started\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_interrupted_part_is_ended_and_not_recorded(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
import os, pathlib, signal, time
pathlib.Path({str(child)!r}).write_text(str(os.getpid()))
os.kill(os.getppid(), signal.SIGINT)
time.sleep(3600)
"""
    with processes.signals(signal.default_int_handler, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        run(tmp_path, part("one", code))
    assert not Path(f"/proc/{child.read_text()}").exists()
    assert not (tmp_path / "gpu.json").exists()


def test_a_name_stands_for_all_parts_that_begin_so() -> None:
    known = [part(name) for name in ("ops-wkv", "ops-scan", "opsother", "tests")]
    parser = command_line.Parser(prog="gpu.py")

    def names(*wanted: str) -> list[str]:
        return [found.name for found in gpu.chosen(wanted, known, parser)]

    assert names("ops") == ["ops-wkv", "ops-scan"]
    assert names("tests", "ops-scan") == ["ops-scan", "tests"]
    assert names() == ["ops-wkv", "ops-scan", "opsother", "tests"]


def test_every_test_file_but_those_of_programs_and_pages_is_in_exactly_one_part() -> None:
    files = [name for one in gpu.parts(ROOT) for name in one.command if name.startswith("tests/")]
    wanted = {path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    assert sorted(files) == sorted(str(path) for path in wanted if path.parts[1] not in ("bench", "cli", "docs"))


@pytest.mark.parametrize("script", sorted({one.command[1] for one in gpu.parts(ROOT) if "--device" in one.command}))
def test_benchmarks_take_the_arguments_of_their_parts(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    # All of them are right, but for the device that is not there.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for one in (one for one in gpu.parts(Path("new")) if one.command[1] == script):
        options = list(one.command[2:])
        assert options[-1] == str(Path("new") / one.name)
        assert_refused(importlib.import_module(Path(script).stem), options, "there is no device 'cuda' here", capsys)


def test_device_is_chosen_by_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu, "probe", lambda: ABOUT)
    code = "import sys; from pathlib import Path; Path(sys.argv[1], 'ran').touch()"
    monkeypatch.setattr(gpu, "parts", lambda out: [gpu.Part("one", "", (sys.executable, "-c", code, str(out)))])
    assert program.main([]) == 0
    folder = tmp_path / "bench" / "results" / "nvidia-h200"
    assert sorted(path.name for path in folder.iterdir()) == ["gpu.json", "ran"]

    other = {**ABOUT, "device": {"type": "cuda", "name": "NVIDIA H100"}}
    monkeypatch.setattr(gpu, "probe", lambda: other)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert_refused(program, ["--out", str(folder)], "was measured on 'NVIDIA H200'", capsys)


def test_list_of_parts_needs_no_gpu(capsys: Any) -> None:
    assert program.main(["--list", "ops"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ops-wkv", "ops-scan"]


def test_bad_command_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(program, ["ops-none"], "unknown part 'ops-none' (choose from tests-wkv, ", capsys)
    monkeypatch.setattr(gpu, "probe", lambda: None)
    assert_refused(program, ["ops"], "there is no GPU here", capsys)
