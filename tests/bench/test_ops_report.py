"""The operator benchmark before and after it measures: its cases, its figures and tables, its targets."""

import math
import pickle
from argparse import Namespace

import pytest
import torch

for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package)

from throughput import figure, passes, plan, precompile, table

OPERATORS = plan.OPERATORS
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GPU_SHAPES = [(8, 1024, 768), (8, 4096, 2048), (8, 4096, 4096), (32, 1024, 1024)]
GPU_SHAPES += [(1, 16384, 1024), (1, 65536, 1024), (1, 131072, 2560), (1, 65536, 1024)]
DEVICES = {"cpu": {"type": "cpu", "name": "a processor", "threads": 2}, "cuda": {"type": "cuda", "name": "a GPU"}}


def cases(**given):
    defaults = {"ops": list(OPERATORS), "dtypes": None, "shapes": None, "passes": None, "providers": None}
    return plan.cases(Namespace(**defaults | {"device": GPU, "quick": False} | given), None)


def test_cases_by_default_on_a_gpu():
    found = cases()
    assert {case.providers[0] for case in found} == {"fastwkv"}
    kinds = dict.fromkeys((case.operator.name, case.dtype) for case in found)
    scans = [
        (op, dtype) for op in ("linear_scan", "linear_scan_fixed") for dtype in ("bfloat16", "float32", "complex64")
    ]
    assert list(kinds) == [("wkv", "bfloat16"), ("wkv", "float32"), *scans]
    for kind in kinds:
        here = [case for case in found if (case.operator.name, case.dtype) == kind]
        assert [case.shape for case in here] == GPU_SHAPES
        assert [case.layout.packed for case in here] == [False] * 7 + [True]
        assert all(set(passes.PASSES) - {"step"} <= set(case.passes) for case in here)
        # One token of (1, T, 1024) is the same for both T.
        stepped = [(case.shape[0], case.shape[2]) for case in here if "step" in case.passes]
        assert stepped == [(8, 768), (8, 2048), (8, 4096), (32, 1024), (1, 1024), (1, 2560)]


def test_cases_by_default_on_a_cpu():
    found = [(case.operator.name, case.dtype, case.shape) for case in cases(device=CPU)]
    shapes = [(4, 4096, 256), (1, 1024, 256), (8, 784, 128), (32, 64, 128)]
    wkv = [("wkv", "float32", shape) for shape in ((1, 1024, 768), (4, 1024, 768))]
    scans = [("linear_scan", "complex64", shape) for shape in shapes]
    assert found == [*wkv, *scans, ("linear_scan_fixed", "complex64", shapes[0])]


def test_operators_leave_out_dtypes_and_providers_that_they_have_not():
    options = {"device": CPU, "shapes": plan.layouts("1x2x3")}
    found = {(case.operator.name, case.dtype) for case in cases(dtypes=["complex64", "float32"], **options)}
    scans = {(op, dtype) for op in ("linear_scan", "linear_scan_fixed") for dtype in ("complex64", "float32")}
    assert found == {("wkv", "float32")} | scans
    named = cases(providers=["loop", "rwkv-cuda", "fastwkv", "hf"], **options)
    assert [case.providers for case in named[:2]] == [("fastwkv", "hf", "loop", "rwkv-cuda"), ("fastwkv", "loop")]
    assert {case.operator.name for case in cases(providers=["hf"], **options)} == {"wkv"}


def test_kernels_are_compiled_on_the_same_channels_with_fewer_tokens():
    found = {precompile.shortened(case) for case in cases(ops=["wkv"])}
    assert all(math.prod(case.shape) <= precompile.ELEMENTS for case in found)
    assert {case.shape[2] for case in found} == {768, 1024, 2048, 2560, 4096}
    assert {case.layout.packed for case in found} == {False, True}
    case = cases(device=CPU, ops=["wkv"], shapes=plan.layouts("1x9x5p"))[0]
    precompile.run_once(pickle.loads(pickle.dumps(case)), CPU)  # as another process gets it


def row(provider, ms, which="forward", **other):
    one = {"op": "wkv", "pass": which, "dtype": "bfloat16", "B": 8, "T": 4096, "C": 2048, "packed": None}
    one |= {"provider": provider, "status": "ok", "reason": None, "ms": ms, "ms_min": ms, "ms_host": 0.02, "gbps": 9.0}
    return one | {"quantiles": {"0.1": ms, "0.9": ms}, "repeats": 9, "error": 1e-3, "fraction": 0.8 / (ms or 1)} | other


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_figure_is_drawn_for_every_operator_that_has_times(device, tmp_path):
    rows = [row("fastwkv", 1.0), row("fla", 400.0), row("newcomer", 7.0), row("fastwkv", 2.0, "backward")]
    rows += [row("fastwkv", 1.0, dtype="float32"), row("fastwkv", 1.0, packed=57)]
    rows += [row("fla", 1.0, op="linear_scan"), row("fastwkv", None, op="linear_scan_fixed", status="failed")]
    drawn = figure.draw({"device": DEVICES[device], "copy_gbps": 1234.5, "rows": rows}, tmp_path)
    assert [path.name for path in drawn] == ["ops_wkv.png", "ops_linear_scan.png"]
    assert sorted(drawn) == sorted(tmp_path.iterdir())


def test_figure_has_a_panel_for_what_was_measured_and_none_that_is_empty():
    def panels(*found):
        return figure.panels([{"dtype": dtype, "pass": which} for dtype, which in found])

    a, b = "float32", "bfloat16"
    assert panels((a, "forward"), (a, "forward+backward"), (a, "step")) == [(a, "forward"), (a, "forward+backward")]
    both = [(a, "forward"), (a, "forward+backward"), (a, "backward"), (b, "forward+backward")]
    assert panels(*both) == [(a, "forward"), (a, "backward"), (b, "forward+backward")]


def test_short_table_names_the_best_peer():
    rows = [row("fastwkv", 0.5, "backward"), row("fla", 400.0, "backward"), row("fastwkv", 1.0)]
    rows += [row("fla", 3.0), row("rwkv-cuda", 2.0), row("reference", 1.5)]  # the reference is ours
    rows += [row("fla", None, status="failed"), row("fastwkv", 4.0, packed=57), row("fastwkv", 1.0, dtype="float32")]
    text = table.in_short(rows)
    assert [cells(line) for line in text.splitlines() if "(" in line] == [
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


def test_goals_on_a_gpu():
    for which, dtype, shape, fraction, ratio in GOALS:
        where = dict(zip("BTC", shape, strict=True)) | {"dtype": dtype}
        assert table.target(row("fastwkv", 1.0, which, **where), "cuda") == fraction
        assert table.target(row("fla", 1.0, which, **where), "cuda") == ratio
        assert table.target(row("fla", 1.0, which, **where, packed=57), "cuda") is None
        assert table.target(row("fastwkv", 1.0, which, **where), "cpu") is None


@pytest.mark.parametrize(
    ("fraction", "ms", "ours", "peer"), [(0.86, 3.1, "reached", "reached"), (0.84, 2.9, *2 * ["MISSED"])]
)
def test_table_on_a_gpu_says_which_goals_were_reached(fraction, ms, ours, peer):
    rows = [row("fastwkv", 1.0, fraction=fraction), row("fla", ms), row("fastwkv", 1.0, packed=57)]
    *_, first, second, third = table.tables(rows, "cuda").splitlines()
    assert " 8, 4096, 2048 packed " in third
    assert f"0.85, {ours}" in first
    assert f"3, {peer}" in second


def test_table_says_whether_a_target_on_a_cpu_was_reached():
    scan = {"op": "linear_scan", "dtype": "complex64", "B": 4, "T": 4096, "C": 256}
    wkv = {"op": "wkv", "dtype": "float32", "B": 1, "T": 1024, "C": 768}
    for where, peer, aim in ((wkv, "hf", 60), (scan, "loop", 10)):
        for ms, verdict in ((1.1 * aim, "reached"), (0.9 * aim, "MISSED")):
            rows = [row("fastwkv", 1.0, **where), row(peer, ms, **where)]
            title, _, head, _, ours, theirs = table.tables(rows, "cpu").splitlines()
            assert title == where["op"]
            assert len({len(head), len(ours), len(theirs)}) == 1
            assert f"{aim}, {verdict}" in theirs
            assert "reached" not in ours
            for other in ({"dtype": "bfloat16"}, {"T": 7}):
                assert f"{aim}, " not in table.tables([one | other for one in rows], "cpu")


def test_table_says_whether_a_step_in_a_graph_is_short_enough():
    for ms, channels, wanted in (
        (0.0029, 8192, "0.003 ms in a graph, reached"),
        (0.0031, 8192, "0.003 ms in a graph, MISSED"),
        (0.0031, 8193, ""),
        (None, 8192, ""),
    ):
        rows = [row("fastwkv", 1.0, "step", T=1, C=channels, ms_graph=ms)]
        found = cells(table.tables(rows, "cuda").splitlines()[-1])
        assert found[table.HEAD.index("ms in a graph")] == ("" if ms is None else f"{ms:g}")
        assert found[-1] == wanted
