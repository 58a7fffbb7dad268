"""The program that all benchmarks are: what it refuses, keeps, says and returns."""

import gc
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_scripts import ROOT, assert_refused, interrupt
from common import program, result_file
from common.command_line import positive

FIGURE = "sample.png"


class Sample(program.Program):
    """A program whose rows, and whatever happens between them, are given."""

    name = "sample"
    events = ()

    @classmethod
    def options(cls, parser):
        parser.add_argument("--number", type=positive, default=5)

    def settings(self):
        return {"number": self.args.number}

    def run(self):
        for event in self.events:
            event() if callable(event) else self.add(event)

    @classmethod
    def table(cls, record):
        return result_file.markdown(["what", "ms"], [[r["what"], result_file.cell(r["ms"])] for r in record["rows"]])

    @classmethod
    def draw(cls, record, folder):
        (folder / FIGURE).write_text("a figure")
        return [folder / FIGURE]

    @classmethod
    def complaint(cls, row):
        return "wrong, far too large" if row["ms"] == 1e9 else None


main = Sample.main
ROWS = ({"what": "a", "ms": 1 / 3}, {"what": "b", "ms": None, "other_cores": 1.5})


def ran(events, folder):
    Sample.events = events
    status = main(["--device", "cpu", "--out", str(folder)])
    return status, json.loads((folder / f"{Sample.name}.json").read_text())


def test_record_says_what_was_measured_where_with_which_settings(tmp_path, capsys):
    status, record = ran(ROWS, tmp_path / "new")
    assert status == 0
    assert list(record) == ["benchmark", "device", "versions", "system", "commit", "started", "settings", "rows"]
    assert record["settings"] == {"number": 5}
    assert record["device"].keys() == {"type", "name", "threads"}
    assert {"python", "fastwkv", "torch"} <= record["versions"].keys()
    assert record["rows"] == [{"what": "a", "ms": 0.33333}, ROWS[1]]
    for name in (os.uname().nodename, str(ROOT), str(tmp_path), str(Path.home())):
        assert name not in json.dumps(record) or len(name) < 2
    printed = capsys.readouterr()
    assert "\n| what |    ms |\n|------|------:|\n| a    | 0.333 |\n| b    |       |\n" in printed.out
    assert f"wrote {tmp_path / 'new' / Sample.name}.json, {tmp_path / 'new' / FIGURE}\n" in printed.out
    assert printed.err == f"{Sample.name}.py: other processes kept up to 1.5 cores busy: these times say little\n"
    assert ran(ROWS[:1], tmp_path / "new")[1]["rows"] == record["rows"][:1]  # its own file it may replace
    assert "busy" not in capsys.readouterr().err


def test_every_row_is_on_disk_before_the_next_is_measured(tmp_path):
    path = tmp_path / f"{Sample.name}.json"
    seen = []
    ran((ROWS[0], lambda: seen.append(path.read_text()), ROWS[1]), tmp_path)
    assert [len(json.loads(text)["rows"]) for text in seen] == [1]


@pytest.mark.parametrize("stop", [interrupt, lambda: os.kill(os.getpid(), signal.SIGTERM)], ids=["SIGINT", "SIGTERM"])
def test_interrupt_keeps_what_was_measured(stop, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    status, record = ran((ROWS[0], stop, ROWS[1]), tmp_path)
    assert status == 130
    assert [row["what"] for row in record["rows"]] == ["a"]
    assert (tmp_path / FIGURE).exists()
    assert capsys.readouterr().err == "\ninterrupted: writing what was measured\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_error_is_not_hidden_but_what_was_measured_is_saved(tmp_path):
    with pytest.raises(ZeroDivisionError):
        ran((ROWS[0], lambda: 1 // 0), tmp_path)
    assert len(json.loads((tmp_path / f"{Sample.name}.json").read_text())["rows"]) == 1


def test_mistake_gives_status_1(tmp_path, capsys):
    assert ran((ROWS[0], {"what": "c", "ms": 1e9}), tmp_path)[0] == 1
    assert capsys.readouterr().err == f"{Sample.name}.py: wrong, far too large\n"


def test_results_are_shown_again_without_measuring(tmp_path, capsys):
    ran(ROWS, tmp_path)
    (tmp_path / FIGURE).unlink()
    Sample.events = (pytest.fail,)
    path = tmp_path / f"{Sample.name}.json"
    before = path.read_bytes()
    for arguments, folder in (([], tmp_path), (["--out", str(tmp_path / "new")], tmp_path / "new")):
        capsys.readouterr()
        assert main(["--redraw", str(path), *arguments]) == 0
        assert (folder / FIGURE).exists()
        printed = capsys.readouterr().out
        assert "| a    | 0.333 |" in printed
        assert printed.endswith(f"wrote {folder / FIGURE}\n")
    assert path.read_bytes() == before
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / FIGURE]


def test_bad_arguments_give_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own, other = f"{Sample.name}.json", "is not a result of this program; choose another folder with --out"
    files = {"foreign": "[]", "broken": "{", "other": json.dumps({"device": {"name": "another machine"}})}
    for name, text in files.items():
        Path(name).mkdir()
        Path(name, own).write_text(text)
    Path("file").touch()
    Path("ops.json").write_text(json.dumps({"benchmark": "ops", "device": {}, "rows": []}))
    for message, arguments in {
        "unrecognized arguments: --fast": ["--fast"],
        "argument --number: expected a whole number of at least 1, got '0'": ["--number", "0"],
        "cannot write into 'file/results': Not a directory": ["--out", "file/results"],
        "unknown device 'abacus' (choose from cpu, cuda, cuda:N)": ["--device", "abacus"],
        "unknown device 'meta'": ["--device", "meta"],
        "there is no device 'cuda:99' here": ["--device", "cuda:99"],
        f"'foreign/{own}' {other}": ["--out", "foreign"],
        f"'broken/{own}' {other}": ["--out", "broken"],
        f"'other/{own}' was measured on 'another machine'; choose another folder with --out": ["--out", "other"],
        "'nowhere' is not a result of a benchmark": ["--redraw", "nowhere"],
        f"'foreign/{own}' is not a result of a benchmark": ["--redraw", f"foreign/{own}"],
        "'ops.json' is a result of ops.py": ["--redraw", "ops.json"],
    }.items():
        assert_refused(SimpleNamespace(__name__=Sample.name, main=main), arguments, message, capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_gives_status_2(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path)])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("cores", "device", "complains"),
    [([None, 0.1], "cpu", False), ([], "cpu", False), ([1.5], "cuda", False), ([None, 0.3, 1.5], "cpu", True)],
)
def test_busy_cores_are_complained_about_on_a_cpu(cores, device, complains, capsys):
    program.complain_of_other_work("some.py", [{"other_cores": number} for number in cores], torch.device(device))
    assert ("kept up to 1.5 cores busy" in capsys.readouterr().err) == complains


def test_garbage_collector_waits_and_is_left_as_it_was():
    def work():
        with program.no_garbage_collection():
            assert not gc.isenabled()
            interrupt()

    before = gc.isenabled()
    try:
        for switch, collects in ((gc.enable, True), (gc.disable, False)):
            switch()
            with pytest.raises(KeyboardInterrupt):
                work()
            assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result"
    result_file.replace(path, lambda part: part.write_text("first"))

    def failing(part):
        part.write_text("half")
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        result_file.replace(path, failing)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_rows_that_are_not_ok_are_told_with_their_reasons():
    rows = [{"provider": name, "status": "unavailable", "reason": "not installed"} for name in "ab"]
    rows += [{"provider": "c", "status": "failed", "reason": "no luck"}, {"provider": "d", "status": "ok"}]
    assert result_file.not_ok(rows, lambda row: row["provider"] + ", forward") == [
        "c, forward: failed, no luck",
        "a, b: not available, not installed",
    ]
