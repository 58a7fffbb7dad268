"""Runs steps within a budget: what they find is kept, whatever becomes of them. Steps here are a line of Python."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_scripts import ROOT
from gpu_minutes import commands, journal, plan, runner

IGNORES = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(\'{"what": "up"}\', flush=True); '


def step(name: str, *codes: str, seconds: float = 60.0, least: float = 0.1, importance: int = 1, **options: Any) -> Any:
    made = tuple(plan.Command(f"{name}{n or ''}", ("-c", code)) for n, code in enumerate(codes))
    return plan.Step(name, f"does {name}", seconds, least, importance, made, **options)


def prints(**row: Any) -> str:
    return f"print({json.dumps(row)!r})"


def run(folder: Path, *steps: Any, budget: float = 120.0) -> tuple[int, list[dict[str, Any]]]:
    written = journal.Journal(folder, time.monotonic())
    status = runner.Run("first", steps, budget, written).run()
    return status, journal.read(folder)


def of(rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["what"] == what]


def test_rows_are_kept_with_their_step_and_the_rest_is_in_the_log(tmp_path: Path) -> None:
    code = f"import sys; {prints(what='figure', ms=1.25)}; print('{{no row'); print('beside', file=sys.stderr)"
    status, rows = run(tmp_path, step("one", code), step("two", "pass"))
    assert status == 0
    assert [(row["step"], row["ms"]) for row in of(rows, "figure")] == [("one", 1.25)]
    assert [row["status"] for row in of(rows, "command")] == ["passed", "passed"]
    assert sorted((tmp_path / "log.txt").read_text().splitlines()) == ["one: beside", "one: {no row"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "rows.jsonl", "table.txt"]


def test_failures_do_not_keep_others_from_running(tmp_path: Path) -> None:
    died = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    status, rows = run(tmp_path, step("bad", "raise SystemExit('why')"), step("dead", died), step("none", "exit(77)"))
    assert status == 1
    found = {row["name"]: (row["status"], row.get("said")) for row in of(rows, "command")}
    assert found == {"bad": ("failed", "why"), "dead": ("killed by SIGKILL", ""), "none": ("not available", "")}
    table = (tmp_path / "table.txt").read_text()
    assert "bad bad: failed after" in table
    assert "dead dead: killed by SIGKILL" in table


def test_commands_of_a_step_run_at_once(tmp_path: Path) -> None:
    meet = (
        "import pathlib, time; f = pathlib.Path({!r}); (f / '{}').touch(); "
        "[time.sleep(0.02) for _ in range(3000) if not (f / '{}').exists()]; assert (f / '{}').exists()"
    )
    (tmp_path / "meeting").mkdir()
    folder = str(tmp_path / "meeting")
    status, _ = run(
        tmp_path / "out", step("both", meet.format(folder, "a", "b", "b"), meet.format(folder, "b", "a", "a"))
    )
    assert status == 0


def test_step_that_never_returns_is_ended_and_what_it_printed_is_kept(tmp_path: Path) -> None:
    began = time.monotonic()
    hanging = step("hangs", IGNORES + "time.sleep(999)", seconds=4.0)
    status, rows = run(tmp_path, hanging, step("after", prints(what="figure"), seconds=8.0), budget=16.0)
    assert time.monotonic() - began < 60
    assert status == 1
    assert [row["status"] for row in of(rows, "command")] == ["out of time", "passed"]
    assert of(rows, "up")
    assert of(rows, "figure")


def test_steps_that_do_not_fit_are_left_out_the_least_important_first(tmp_path: Path) -> None:
    steps = [
        step(name, "pass", least=least, importance=n) for name, least, n in (("a", 9, 3), ("b", 9, 1), ("c", 3, 2))
    ]
    kept, left_out = plan.chosen(steps, 12 + plan.CLOSING)
    assert [one.name for one in kept] == ["a", "c"]
    assert [one.name for one in left_out] == ["b"]
    _, rows = run(tmp_path, *steps, budget=12 + plan.CLOSING)
    (row,) = of(rows, "skipped")
    assert row["step"] == "b"
    assert "skipped: b, a budget of 16 s has no room for it" in (tmp_path / "table.txt").read_text()


def test_what_is_left_over_passes_on() -> None:
    steps = [step(name, "pass", seconds=seconds, least=10) for name, seconds in (("a", 20), ("b", 30), ("c", 50))]
    assert plan.share(steps, 100) == 20
    assert plan.share(steps[1:], 160) == 60  # of what "a" has left over, its part
    assert plan.share(steps[2:], 100) == 100
    assert plan.share(steps, 65) == 15
    assert sum(plan.share(steps[n:], 65 - 15 * n) for n in (0,)) < 65


@pytest.mark.parametrize("kind", ["first", "second"])
def test_plans_fit_into_their_budgets(kind: str) -> None:
    steps = plan.PLANS[kind]()
    assert sum(one.seconds for one in steps) <= commands.BUDGETS[kind] - plan.CLOSING
    assert all(one.least <= one.seconds for one in steps)
    assert len({one.importance for one in steps}) == len(steps)


def test_groups_that_fail_go_on_under_the_sanitizer_and_those_out_of_time_do_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        plan, "memcheck", lambda names, seconds: step("memcheck", *(prints(what="seen", group=name) for name in names))
    )
    checked = step("correctness", "import time; time.sleep(999)", "exit(1)", "pass", "exit(1)", followed=True)
    hanging = replace(checked, commands=(replace(checked.commands[0], most=3.0), *checked.commands[1:]))
    _, rows = run(tmp_path, hanging)
    assert {row["group"] for row in of(rows, "seen")} == {"correctness1", "correctness3"}


def test_background_step_runs_beside_the_others_and_ends_with_them(tmp_path: Path) -> None:
    beside = step(
        "beside",
        f"{prints(what='beside')}; import sys, time; sys.stdout.flush(); time.sleep(999)",
        background=True,
        seconds=0,
        least=0,
    )
    seen = f"'beside\"}}' in pathlib.Path({str(tmp_path / 'rows.jsonl')!r}).read_text()"
    code = f"import time, pathlib; [time.sleep(0.05) for _ in range(1000) if not {seen}]; assert {seen}"
    status, rows = run(tmp_path, beside, step("one", code))
    assert status == 0
    assert {row["name"]: row["status"] for row in of(rows, "command")} == {
        "one": "passed",
        "beside": "ended with the others",
    }


def start(folder: Path) -> subprocess.Popen[str]:
    """Start a run in a process of its own: a step with a figure, then one that hangs; wait until it does."""
    steps = [step("one", prints(what="figure")), step("hangs", IGNORES + "time.sleep(999)")]
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT / "bench")!r})
from gpu_minutes import journal, runner
from gpu_minutes.plan import Command, Step
written = journal.Journal(Path({str(folder)!r}), time.monotonic())
inf = float("inf")
sys.exit(runner.Run("first", {steps!r}, 300.0, written).run())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, cwd=ROOT, text=True)
    for _ in range(3000):
        time.sleep(0.05)
        if (folder / "rows.jsonl").exists() and '"up"' in (folder / "rows.jsonl").read_text():
            return process
        assert process.poll() is None
    raise AssertionError("it does not begin")


def children(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(number) for number in found.stdout.split()]


def gone(number: int) -> bool:
    for _ in range(600):
        try:
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_run_leaves_its_rows_and_no_process(tmp_path: Path) -> None:
    process = start(tmp_path)
    hanging = children(process.pid)
    assert hanging
    process.kill()
    process.wait()
    rows = journal.read(tmp_path)
    assert of(rows, "figure")
    assert of(rows, "up")
    assert all(gone(number) for number in hanging)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_run_that_is_asked_to_end_writes_its_table(tmp_path: Path) -> None:
    process = start(tmp_path)
    hanging = children(process.pid)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 130
    table = (tmp_path / "table.txt").read_text()
    assert "INTERRUPTED" in table
    assert "hangs hangs: interrupted" in table
    assert all(gone(number) for number in hanging)


def test_line_that_was_cut_off_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"what": "figure"}\n{"what": "fig')
    assert journal.read(tmp_path) == [{"what": "figure"}]


def test_files_stay_below_what_may_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LARGEST", 2000)
    _, rows = run(
        tmp_path,
        step(
            "loud",
            f"import sys\nfor n in range(99): {prints(what='n', text='x' * 99)}; print('y' * 99, file=sys.stderr)",
        ),
    )
    assert 0 < len(of(rows, "n")) < 99
    assert (tmp_path / "rows.jsonl").stat().st_size <= 2000
    assert (tmp_path / "log.txt").read_text().endswith("the log is full\n")


def test_patient_step_gets_more_than_is_planned_for_it(tmp_path: Path) -> None:
    slow = step("slow", "import time; time.sleep(3); " + prints(what="figure"), seconds=1.0, patience=60.0)
    status, rows = run(tmp_path, slow, step("rest", "pass", seconds=115.0))
    assert status == 0
    assert of(rows, "figure")
