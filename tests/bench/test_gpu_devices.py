"""The model of a GPU takes figures from measurements, and goes on assuming the others."""

import argparse
import json
from dataclasses import asdict

import gpu_model
import machine_code.devices
import pytest
from machine_code.costs import Figures
from machine_code.devices import DEVICES, devices_of, measured, source_lines

from fastwkv.kernels.config import Launch

ROWS = [
    {"what": "assumption", "name": name, "value": value, **where}
    for name, value, where in (
        ("multiprocessors", 114, {}),
        ("copy_bandwidth", 2.9e12, {"copied_bytes": 2**30}),
        ("copy_bandwidth", 2.8e12, {"copied_bytes": 2**32}),
        ("latency", 6e-7, {"beside": "nothing"}),
        ("latency", 9e-7, {"beside": "copies"}),
        ("clock", 1.98e9, {"beside": "nothing"}),
        ("clock", 1.6e9, {"beside": "wkv backward"}),
        ("launch", 2e-6, {"where": "stream"}),
        ("launch", 1e-6, {"where": "graph"}),
    )
] + [{"what": "skeleton", "ms": 0.1}]
ALL = {"multiprocessors": 114, "copy_bandwidth": 2.9e12, "latency": 9e-7, "clock": 1.6e9, "launch": 2e-6}
NO_RECORD = "not a record of tune.py on a GPU"


def record(rows=ROWS, name="NVIDIA H100 80GB HBM3", kind="cuda", **settings):
    device = {"type": kind, "name": name}
    return {"benchmark": "tune", "device": device, "settings": settings, "rows": rows}


def devices(path=None, names=("h200",)):
    args = argparse.Namespace(devices=list(names), measured=path)
    return devices_of(args, gpu_model.Parser(prog="gpu_model.py"))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Return a function that writes a result of tune.py into a folder of results."""
    monkeypatch.setattr(machine_code.devices, "RESULTS", tmp_path)

    def write(folder, content):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "tune.json"
        path.write_text(json.dumps(content))
        return path

    return write


def test_figures_under_load_are_taken():
    assert measured(record()) == ALL
    assert measured(record(ROWS[:2])) == {"multiprocessors": 114, "copy_bandwidth": 2.9e12}
    assert measured(record([])) == {}
    for other in (record(kind="cpu"), record(rehearsal=True), record() | {"benchmark": "ops"}, {"rows": []}):
        with pytest.raises(ValueError, match=NO_RECORD):
            measured(other)


def test_results_of_a_device_are_found_and_those_of_others_are_left(results):
    assert devices() == {"h200": (DEVICES["h200"], {})}
    results("nvidia-h100", record(ROWS[:3]))
    results("a-processor", record(kind="cpu"))
    found = devices(names=("h200", "h100"))
    assert found["h200"] == (DEVICES["h200"], {})
    device, figures = found["h100"]
    assert figures == {"multiprocessors": 114, "copy_bandwidth": 2.9e12}
    assert (device.copy_bandwidth, device.latency) == (2.9e12, DEVICES["h100"].latency)
    assumed = {"clock": 1.755e9, "latency": 8e-7}
    assert source_lines({"h200": {}, "h100": figures}, {"h200": assumed, "h100": assumed}) == [
        "h200: assumed clock 1.755e+09, latency 8e-07",
        "h100: measured multiprocessors 114, copy_bandwidth 2.9e+12; assumed clock 1.755e+09, latency 8e-07",
    ]


def test_file_that_is_named_adds_its_device_or_ends_the_program(results, capsys):
    found = devices(results("somewhere", record(name="NVIDIA GH200 480GB")))
    assert list(found) == ["h200", "nvidia-gh200-480gb"]
    assert asdict(found["nvidia-gh200-480gb"][0]) == ALL
    with pytest.raises(SystemExit) as stopped:
        devices(results("elsewhere", record(rehearsal=True)))
    assert stopped.value.code == 2
    assert NO_RECORD in capsys.readouterr().err


def test_model_of_a_measured_device_uses_and_names_its_figures(results, tmp_path, monkeypatch, capsys):
    path = results("somewhere", record())
    kernel = Figures("", "float32", "sm_90", 2, 64, 64, 0, 0, 12.8, 3, {}, {}, 8, 4, 32, 0.1, "issue", 50, 200)
    asked = []

    def compiled(operator, dtype, program):
        asked.append(program)
        names = {name for one in gpu_model.OPERATORS[operator].passes.values() for name in (one.finish, one.summary)}
        return dict.fromkeys(names, kernel)

    monkeypatch.setattr(gpu_model, "compiled", compiled)
    command = ["gpu_model.py", "--devices", "h100", "--ops", "wkv", "--dtypes", "float32", "--program", "64,2,5"]
    monkeypatch.setattr("sys.argv", [*command, "--measured", str(path), "--out", str(tmp_path)])
    gpu_model.main()
    assert asked == [Launch(64, 2, 0, 5)]
    assert "h100: measured multiprocessors 114" in capsys.readouterr().out
    written = json.loads((tmp_path / "gpu_model.json").read_text())
    assert (written["settings"]["measured"], written["settings"]["assumed"]) == ({"h100": ALL}, {"h100": {}})
    assert written["settings"]["program"]["block_c"] == 64
    whole = next(row for row in written["rows"] if (row["B"], row["T"], row["C"]) == (8, 4096, 4096))
    assert whole["seconds"]["launches"] == pytest.approx(2e-6)
    assert whole["seconds"]["memory"] == pytest.approx(12 * 8 * 4096 * 4096 / 2.9e12, rel=1e-3)


def test_program_is_read_from_three_numbers_and_refused_where_no_plan_means_it():
    assert gpu_model.program_of("64,2,5") == Launch(64, 2, 0, 5)
    assert gpu_model.program_of(" 32, 1, 4") == Launch(32, 1, 0, 4)
    for text in ("64,2", "64,1,4", "48,2,4", "32,1,1", "a,b,c", "64,2,4,5"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected channels, warps and tiles such as 64,2,5"):
            gpu_model.program_of(text)
