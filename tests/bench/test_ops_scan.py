"""The operator benchmark on the linear scan: its rows and bytes, and whether every peer is called as it expects."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tqdm")

import ops
from peers import linear_scan_inputs as scan_inputs
from peers import linear_scan_providers as scan_providers
from throughput import passes, table
from timing import by_turns as timing

OPERATORS, PROVIDERS = ops.OPERATORS, scan_providers.PROVIDERS
GPU_ONLY = {"fla-recurrent", "fla-chunk", "accelerated-scan", "accelerated-scan-warp"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "QUICK", timing.Effort(repeats=2, seconds=0.0, turn=0.0))
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(ops, "draw_all", lambda record, folder: [])


def run(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    tiny = ["--device", "cpu", "--quick", "--shapes", "2x9x5", "--passes", ",".join(passes.PASSES)]
    status = ops.main([*tiny, "--out", str(folder), *arguments])
    return status, json.loads((folder / "ops.json").read_text())["rows"]


# Bytes a token and channel: with e the size of a number, 3e, 5e, 8e, and 2e with a state read and written.
BYTES = {
    ("linear_scan", "complex64"): {"forward": 24, "backward": 40, "forward+backward": 64, "step": 32},
    ("linear_scan", "bfloat16"): {"forward": 6, "backward": 10, "forward+backward": 16, "step": 12},
    ("linear_scan_fixed", "complex64"): {"forward": 16, "backward": 24, "forward+backward": 40, "step": 24},
    ("linear_scan_fixed", "float64"): {"forward": 16, "backward": 24, "forward+backward": 40, "step": 24},
}


@pytest.mark.parametrize(("op", "dtype"), BYTES)
def test_rows_of_every_pass(op: str, dtype: str, tmp_path: Path) -> None:
    status, rows = run(tmp_path, "--ops", op, "--dtypes", dtype)
    assert status == 0
    assert len(rows) == 4 * len(PROVIDERS)
    for row in rows:
        assert (row["op"], row["dtype"], row["B"], row["C"]) == (op, dtype, 2, 5)
        assert row["T"] == (1 if row["pass"] == "step" else 9)
        if row["provider"] in GPU_ONLY:
            assert (row["status"], row["reason"]) == ("unavailable", "runs on a GPU only")
        elif row["status"] == "unavailable":
            assert row["provider"] in ("associative_scan", "accelerated-scan-ref")
            reasons = {"has no step", "not installed", "takes a multiplier of every token only"}
            assert row["reason"] in reasons
        else:
            assert row["status"] == "ok", row
            size = BYTES[op, dtype][row["pass"]] * 2 * row["T"] * 5
            assert row["gbps"] == pytest.approx(size / row["ms"] / 1e6, rel=1e-3)
            results = {"forward": ("h",), "backward": ("ga", "gx"), "step": ("h",)}
            assert tuple(row["errors"]) == results.get(row["pass"], ("h", "ga", "gx"))
    measured = {(row["pass"], row["provider"]) for row in rows if row["status"] == "ok"}
    assert {(which, name) for which in passes.PASSES for name in ("fastwkv", "loop", "reference")} <= measured
    assert {(which, "associative_scan") for which in passes.PASSES if which != "step"} <= measured


def planned(*arguments: str) -> list[tuple[str, str, tuple[int, int, int]]]:
    cases = ops.parse(["--device", "cpu", *arguments]).cases
    return [(case.operator.name, case.dtype, case.shape) for case in cases]


def test_what_is_measured_by_default(tmp_path: Path) -> None:
    shapes = [(4, 4096, 256), (1, 1024, 256), (8, 784, 128), (32, 64, 128)]
    scans = [("linear_scan", "complex64", shape) for shape in shapes]
    wkv = [("wkv", "float32", shape) for shape in ((1, 1024, 768), (4, 1024, 768))]
    fixed = [("linear_scan_fixed", "complex64", shapes[0])]
    assert planned("--out", str(tmp_path)) == wkv + scans + fixed


def test_operators_leave_out_dtypes_and_providers_that_they_have_not(tmp_path: Path) -> None:
    options = ["--shapes", "1x2x3", "--out", str(tmp_path)]
    found = planned("--dtypes", "complex64,float32", *options)
    assert [case[:2] for case in found] == [
        ("wkv", "float32"),
        *((op, dtype) for op in ("linear_scan", "linear_scan_fixed") for dtype in ("complex64", "float32")),
    ]
    assert {op for op, _, _ in planned("--providers", "hf,associative_scan", *options)} == set(OPERATORS)
    assert {op for op, _, _ in planned("--providers", "hf", *options)} == {"wkv"}


@pytest.mark.parametrize(("ms", "verdict"), [(10.5, "10, reached"), (9.0, "10, MISSED")])
def test_target_holds_in_complex64_for_a_multiplier_of_every_token(ms: float, verdict: str) -> None:
    row = {"op": "linear_scan", "pass": "forward", "dtype": "complex64", "B": 4, "T": 4096, "C": 256, "status": "ok"}
    row |= {"ms_min": 1.0, "quantiles": {"0.1": 1.0, "0.9": 1.0}, "gbps": 1.0, "error": 1e-7, "repeats": 3}
    row |= {"ms_host": None, "fraction": 0.5}
    rows = [{**row, "provider": "fastwkv", "ms": 1.0}, {**row, "provider": "loop", "ms": ms}]
    assert verdict in table.tables(rows, "cpu")
    for other in ({"op": "linear_scan_fixed"}, {"dtype": "float32"}):
        assert "10, " not in table.tables([one | other for one in rows], "cpu")


def test_gradient_of_the_conjugate_is_reported_as_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unconjugated(scan_providers.Loop):
        def scan(self, a: Tensor, x: Tensor, h0: Tensor | None) -> Tensor:
            turned = torch.complex(a.real, 2 * a.imag.detach() - a.imag)
            return super().scan(turned, x, h0)

    monkeypatch.setitem(PROVIDERS, "loop", Unconjugated())
    status, rows = run(tmp_path, "--ops", "linear_scan", "--providers", "loop")
    assert status == 0
    outcome = {row["pass"]: (row["status"], (row["reason"] or "")[:11]) for row in rows}
    wrong, right = ("wrong", "error of ga"), ("ok", "")
    assert outcome == {"forward": right, "backward": wrong, "forward+backward": wrong, "step": right}


def errors(name: str, inputs: Any, op: str = "linear_scan") -> dict[str, float]:
    """Return the errors of a provider here, forward, backward and of a step if it has one."""
    operator, provider = OPERATORS[op], PROVIDERS[name]
    task = passes.task(provider, "forward+backward", inputs, CPU)
    wanted = operator.expected(inputs, state=False)
    found = passes.errors(operator, provider, "forward+backward", inputs, task.run()[0], wanted)
    if provider.refuses("step", inputs):
        return found
    task = passes.task(provider, "step", inputs, CPU)
    return found | {
        "step": passes.errors(operator, provider, "step", inputs, task.run()[0], operator.expected_step(inputs))["h"]
    }


@pytest.mark.parametrize("name", ["accelerated-scan", "accelerated-scan-warp", "accelerated-scan-ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_accelerated_scan_gets_its_layout(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its kernels need a GPU. Its reference, which has the layout of all of them, does not.
    pytest.importorskip("accelerated_scan.ref")
    monkeypatch.setattr(type(PROVIDERS[name]), "module", lambda self, dtype: "accelerated_scan.ref")
    found = errors(name, scan_inputs.ordinary(2, 32, 5, dtype))
    assert found.keys() == {"h", "ga", "gx"}
    assert max(found.values()) < 1e-6


@pytest.mark.parametrize("name", ["fla-recurrent", "fla-chunk"])
def test_fla_gets_the_logarithm_of_gates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hgrn(x: Tensor, g: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False, **_):
        h = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
        outputs = []
        for g_t, x_t in zip(g.unbind(1), x.unbind(1), strict=True):
            h = g_t.exp() * h + x_t
            outputs.append(h)
        return torch.stack(outputs, 1), h if output_final_state else None

    module = SimpleNamespace(fused_recurrent_hgrn=hgrn, chunk_hgrn=hgrn)
    monkeypatch.setattr(scan_providers, "_hgrn", lambda: module)
    found = errors(name, scan_inputs.ordinary(2, 9, 5, torch.float32))
    assert max(found.values()) < 1e-6
    assert ("step" in found) == (name == "fla-recurrent")


REFUSALS = [
    ("fla-recurrent", torch.complex64, 32, False, "takes real numbers only"),
    ("fla-chunk", torch.float32, 32, True, "takes a multiplier of every token only"),
    ("accelerated-scan", torch.complex64, 9, False, None),
    ("accelerated-scan", torch.complex128, 9, False, "takes complex64 only"),
    ("accelerated-scan", torch.float32, 9, True, "takes a multiplier of every token only"),
    ("accelerated-scan-warp", torch.float32, 33, False, "takes powers of two from 32 to 65536 for T only"),
    ("accelerated-scan-warp", torch.complex64, 32, False, "takes real numbers only"),
    ("accelerated-scan-warp", torch.float64, 32, False, "does not take float64"),
    ("accelerated-scan-warp", torch.bfloat16, 32, False, None),
    ("associative_scan", torch.complex64, 9, True, None),
]


@pytest.mark.parametrize(("name", "dtype", "T", "fixed", "reason"), REFUSALS)
def test_providers_say_what_they_cannot_do(
    name: str, dtype: torch.dtype, T: int, fixed: bool, reason: str | None
) -> None:
    inputs = scan_inputs.ordinary(1, T, 3, dtype, fixed=fixed)
    assert PROVIDERS[name].refuses("forward", inputs) == reason
