"""What the operator benchmark makes of its rows: figures, the README's tables, what was aimed at on a GPU."""

from pathlib import Path
from typing import Any

import pytest
from bench_scripts import ROOT, assert_refused

for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package)

from throughput import figure, table

DEVICES = {"cpu": {"type": "cpu", "name": "a processor", "threads": 2}, "cuda": {"type": "cuda", "name": "a GPU"}}


def row(provider: str, ms: float | None, which: str = "forward", **other: Any) -> dict[str, Any]:
    one = {"op": "wkv", "pass": which, "dtype": "bfloat16", "B": 8, "T": 4096, "C": 2048, "packed": None}
    one |= {"provider": provider, "status": "ok", "reason": None, "ms": ms, "ms_min": ms, "ms_host": 0.02, "gbps": 9.0}
    return one | {"quantiles": {"0.1": ms, "0.9": ms}, "repeats": 9, "error": 1e-3, "fraction": 0.8 / (ms or 1)} | other


def record(rows: list[dict[str, Any]], device: str = "cuda") -> dict[str, Any]:
    return {"device": DEVICES[device], "copy_gbps": 1234.5, "rows": rows}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_figure_has_an_image_for_every_operator(device: str, tmp_path: Path) -> None:
    rows = [row("fastwkv", 1.0), row("fla", 400.0), row("newcomer", 7.0), row("fastwkv", 2.0, "backward")]
    rows += [row("fastwkv", 1.0, dtype="float32"), row("fastwkv", 1.0, packed=57)]
    rows += [row("fastwkv", 1.0, op="linear_scan"), row("fastwkv", None, op="linear_scan_fixed", status="failed")]
    drawn = figure.draw_all(record(rows, device), tmp_path)
    assert [path.name for path in drawn] == ["ops_wkv.png", "ops_linear_scan.png"]
    assert sorted(drawn) == sorted(tmp_path.iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_dtype_without_the_passes_that_are_drawn_is_an_empty_panel(tmp_path: Path) -> None:
    rows = [row("fastwkv", 1.0, "backward"), row("fastwkv", 1.0, "forward+backward", dtype="float32")]
    assert len(figure.draw_all(record(rows), tmp_path)) == 1


@pytest.mark.parametrize("script", [table, figure], ids=["table", "figure"])
def test_bad_command_lines_are_refused(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("[1]")
    assert_refused(script, [], "the following arguments are required: ops.json", capsys)
    for name in ("absent.json", "other.json"):
        assert_refused(script, [name], f"'{name}' is not a result of a benchmark", capsys)


def test_figure_shows_backward_or_what_has_it_in_it() -> None:
    def passes(*found: str) -> list[str]:
        return figure.columns([{"pass": which} for which in found])

    assert passes("forward", "forward+backward", "step") == ["forward", "forward+backward"]
    assert passes("forward", "forward+backward", "backward") == ["forward", "backward"]
    assert passes("backward") == ["backward"]


def test_committed_results_can_be_drawn_again(tmp_path: Path) -> None:
    results = ROOT / "bench" / "results" / "cpu-2-cores" / "ops.json"
    assert figure.main([str(results), str(tmp_path)]) == 0
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == ["ops_linear_scan.png", "ops_linear_scan_fixed.png", "ops_wkv.png"]


def test_readme_table_names_the_best_peer() -> None:
    rows = [row("fastwkv", 0.5, "backward"), row("fla", 400.0, "backward"), row("fastwkv", 1.0)]
    rows += [row("fla", 3.0), row("rwkv-cuda", 2.0), row("reference", 1.5)]  # the reference is ours
    rows += [row("fla", None, status="failed"), row("fastwkv", 4.0, packed=57), row("fastwkv", 1.0, dtype="float32")]
    text = table.readme(record(rows))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "(" in line]
    assert cells == [
        ["forward, (8, 4096, 2048)", "1", "80 %", "2", "rwkv-cuda", "2×"],
        ["forward, (8, 4096, 2048), 57 documents", "4", "20 %", "", "", ""],
        ["backward, (8, 4096, 2048)", "0.5", "160 %", "400", "fla", "800×"],
        ["forward, (8, 4096, 2048)", "1", "80 %", "", "", ""],
    ]
    assert "| milliseconds, float32 " in text


GOALS = [  # pass, dtype, shape, fraction, ratio
    ("forward", "bfloat16", (8, 4096, 2048), 0.85, 3),
    ("forward", "float32", (32, 1024, 1024), 0.90, 3),
    ("backward", "bfloat16", (8, 4096, 4096), 0.75, 3),
    ("backward", "float32", (8, 4096, 4096), 0.85, 3),
    ("forward", "bfloat16", (8, 1024, 768), None, 3),
    ("backward", "bfloat16", (1, 16384, 1024), None, 1),
    ("forward", "float32", (1, 65536, 1024), 0.60, 10),
    ("backward", "bfloat16", (1, 131072, 2560), 0.50, 10),
    ("forward+backward", "bfloat16", (8, 4096, 2048), None, 3),
    ("step", "bfloat16", (8, 1, 2048), None, 1),
]


@pytest.mark.parametrize(("which", "dtype", "shape", "fraction", "ratio"), GOALS)
def test_goals_on_a_gpu(
    which: str, dtype: str, shape: tuple[int, int, int], fraction: float | None, ratio: float
) -> None:
    where = dict(zip("BTC", shape, strict=True)) | {"dtype": dtype}
    assert table.target(row("fastwkv", 1.0, which, **where), "cuda") == fraction
    assert table.target(row("fla", 1.0, which, **where), "cuda") == ratio
    assert table.target(row("fla", 1.0, which, **where, packed=57), "cuda") is None
    assert table.target(row("fastwkv", 1.0, which, **where), "cpu") is None


@pytest.mark.parametrize(
    ("fraction", "ms", "ours", "peer"), [(0.86, 3.1, "reached", "reached"), (0.84, 2.9, *2 * ["MISSED"])]
)
def test_table_on_a_gpu_says_what_was_reached(fraction: float, ms: float, ours: str, peer: str) -> None:
    rows = [row("fastwkv", 1.0, fraction=fraction), row("fla", ms), row("fastwkv", 1.0, packed=57)]
    *_, first, second, third = table.tables(rows, "cuda").splitlines()
    assert " 8, 4096, 2048 packed " in third
    assert f"0.85, {ours}" in first
    assert f"3, {peer}" in second


@pytest.mark.parametrize(
    ("ms", "channels", "wanted"),
    [
        (0.0029, 8192, "0.003 ms in a graph, reached"),
        (0.0031, 8192, "0.003 ms in a graph, MISSED"),
        (0.0031, 8193, ""),
        (None, 8192, ""),
    ],
)
def test_table_says_whether_a_step_in_a_graph_is_short_enough(ms: float | None, channels: int, wanted: str) -> None:
    line = table.tables([row("fastwkv", 1.0, "step", T=1, C=channels, ms_graph=ms)], "cuda").splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[table.HEAD.index("ms in a graph")] == ("" if ms is None else f"{ms:g}")
    assert cells[-1] == wanted
