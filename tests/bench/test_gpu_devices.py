"""What the model of a GPU takes from measurements, and what it goes on assuming."""

import argparse
import json

import gpu_model
import machine_code.devices
import pytest
from machine_code.costs import Figures
from machine_code.devices import DEVICES, devices_of, source_lines

from fastwkv.kernels.config import Launch

ROWS = [
    {"what": "assumption", "name": "multiprocessors", "value": 114},
    {"what": "assumption", "name": "copy_bandwidth", "value": 2.9e12, "copied_bytes": 2**30},
    {"what": "assumption", "name": "copy_bandwidth", "value": 2.8e12, "copied_bytes": 2**32},
    {"what": "assumption", "name": "latency", "value": 6e-7, "beside": "nothing"},
    {"what": "assumption", "name": "latency", "value": 9e-7, "beside": "copies"},
    {"what": "assumption", "name": "clock", "value": 1.98e9, "beside": "nothing"},
    {"what": "assumption", "name": "clock", "value": 1.6e9, "beside": "wkv backward"},
    {"what": "assumption", "name": "launch", "value": 2e-6, "where": "stream"},
    {"what": "assumption", "name": "launch", "value": 1e-6, "where": "graph"},
    {"what": "skeleton", "ms": 0.1},
]
ALL = {"multiprocessors": 114, "copy_bandwidth": 2.9e12, "latency": 9e-7, "clock": 1.6e9, "launch": 2e-6}


def record(rows=ROWS, name="NVIDIA H100 80GB HBM3", kind="cuda", **settings):
    device = {"type": kind, "name": name}
    return {"benchmark": "tune", "device": device, "settings": settings, "rows": rows}


def parser():
    return gpu_model.Parser(prog="gpu_model.py")


def devices(path=None, names=("h200",)):
    return devices_of(argparse.Namespace(devices=list(names), measured=path), parser())


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code.devices, "RESULTS", tmp_path)

    def write(folder, content):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "tune.json"
        path.write_text(json.dumps(content))
        return path

    return write


def test_figures_under_load_are_taken():
    assert devices.measured(record()) == ALL
    assert devices.measured(record(ROWS[:2])) == {"multiprocessors": 114, "copy_bandwidth": 2.9e12}
    assert devices.measured(record([])) == {}


@pytest.mark.parametrize(
    "other", [record(kind="cpu"), record(rehearsal=True), record() | {"benchmark": "ops"}, {"rows": [], "device": {}}]
)
def test_what_was_not_measured_on_a_gpu_is_refused(other):
    with pytest.raises(ValueError, match=r"not a record of tune\.py on a GPU"):
        devices.measured(other)


def test_without_a_file_all_is_assumed(results):
    assert devices() == {"h200": (DEVICES["h200"], {})}
    assert source_lines(devices()) == [
        "h200: assumed multiprocessors 132, clock 1.755e+09, copy_bandwidth 4.3e+12, latency 8e-07, launch 3e-06"
    ]


def test_results_of_a_device_are_found_and_those_of_others_are_left(results):
    results("nvidia-h100", record(ROWS[:3]))
    results("a-processor", record(kind="cpu"))
    found = devices(names=("h200", "h100"))
    assert found["h200"] == (DEVICES["h200"], {})
    device, known = found["h100"]
    assert known == {"multiprocessors": 114, "copy_bandwidth": 2.9e12}
    assert (device.copy_bandwidth, device.latency) == (2.9e12, DEVICES["h100"].latency)
    (line,) = source_lines({"h100": found["h100"]})
    measured, assumed = line.split("; ")
    assert measured == "h100: measured multiprocessors 114, copy_bandwidth 2.9e+12"
    assert assumed == "assumed clock 1.755e+09, latency 8e-07, launch 3e-06"


def test_file_that_is_named_adds_its_device(results):
    path = results("somewhere", record(name="NVIDIA GH200 480GB"))
    found = devices(path)
    assert list(found) == ["h200", "nvidia-gh200-480gb"]
    assert devices.asdict(found["nvidia-gh200-480gb"][0]) == ALL


def test_file_that_is_named_and_is_none_ends_the_program(results, capsys):
    path = results("somewhere", record(rehearsal=True))
    with pytest.raises(SystemExit) as stopped:
        devices(path)
    assert stopped.value.code == 2
    assert "not a record of tune.py on a GPU" in capsys.readouterr().err


def test_model_of_a_measured_device_uses_and_names_its_figures(results, tmp_path, monkeypatch, capsys):
    path = results("somewhere", record())
    kernel = Figures(
        kernel="", dtype="float32", target="sm_90", num_warps=2, block_c=64, registers=64, spilled_bytes=0,
        shared_bytes=0, instructions=12.8, special=3, loads={}, stores={}, loaded=8, stored=4, warps=32,
        clocks=0.1, unit="issue", cycles=50, waiting=200,
    )  # fmt: skip
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
    assert written["settings"]["measured"] == {"h100": ALL}
    assert written["settings"]["assumed"] == {"h100": {}}
    assert written["settings"]["program"]["block_c"] == 64
    whole = next(row for row in written["rows"] if (row["B"], row["T"], row["C"]) == (8, 4096, 4096))
    assert whole["seconds"]["launches"] == pytest.approx(2e-6)
    assert whole["seconds"]["memory"] == pytest.approx(12 * 8 * 4096 * 4096 / 2.9e12, rel=1e-3)


@pytest.mark.parametrize(("text", "program"), [("64,2,5", Launch(64, 2, 0, 5)), (" 32, 1, 4", Launch(32, 1, 0, 4))])
def test_program_is_read_from_three_numbers(text, program):
    assert gpu_model.program_of(text) == program


@pytest.mark.parametrize("text", ["64,2", "64,1,4", "48,2,4", "32,1,1", "a,b,c", "64,2,4,5"])
def test_program_that_no_plan_means_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected channels, warps and tiles such as 64,2,5"):
        gpu_model.program_of(text)
