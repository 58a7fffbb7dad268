"""A run on a GPU, put on the CPU: limits of time, failures, lost devices; the peer that is compiled from sources."""

import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_scripts import load

pytest.importorskip("tqdm")

ops, run_module, timing, passes = map(load, ("ops", "ops_run", "ops_timing", "ops_passes"))
operators, wkv_providers, peer = map(load, ("operators", "wkv_providers", "wkv_cuda_providers"))
WKV = operators.OPERATORS["wkv"]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
Rows = dict[tuple[str, str], dict[str, Any]]


class Event:
    def __init__(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.time - self.time)


class Immediate:
    """The CPU in the place of ops_cuda.Cuda: without a queue, so that the host is never ahead."""

    device, cache = CPU, 1000
    now, mark = staticmethod(time.perf_counter), staticmethod(Event)

    def synchronize(self) -> None: ...

    def sleep(self, seconds: float) -> None: ...

    def evict(self) -> None: ...

    def begin_peak(self) -> int:
        return 100

    def peak(self) -> int:
        return 142


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(ops, "draw_all", lambda record, folder: [])
    monkeypatch.setattr(run_module, "compile_ours", lambda cases, device: None)
    monkeypatch.setattr(run_module, "gc", SimpleNamespace(freeze=lambda: None, collect=lambda: 0))  # takes long
    start = run_module.Run.__init__

    def on_a_gpu(self: Any, args: Any) -> None:
        start(self, args)
        self.cuda, self.effort = Immediate(), timing.GPU_QUICK

    monkeypatch.setattr(run_module.Run, "__init__", on_a_gpu)


def run(folder: Path, *arguments: str) -> tuple[int, Rows]:
    tiny = ["--ops", "wkv", "--device", "cpu", "--shapes", "2x8x5", "--out", str(folder), *arguments]
    status = ops.main(tiny)
    rows = json.loads((folder / "ops.json").read_text())["rows"]
    return status, {(row["pass"], row["provider"]): row for row in rows}


def test_rows_tell_device_time_host_time_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run(tmp_path, "--passes", "forward,backward,forward+backward,step")
    assert status == 0
    assert " s  wkv [2, 8, 5] float32\n" in capsys.readouterr().err  # where no bar is shown
    measured = [row for row in rows.values() if row["status"] == "ok"]
    assert {row["provider"] for row in measured} == {"fastwkv", "hf", "loop", "reference"}
    for row in measured:
        assert row["ms"] > 0
        assert row["ms_host"] >= 0
        assert row["peak_bytes"] == 42
        assert row["head_start"] is False
    settings = json.loads((tmp_path / "ops.json").read_text())["settings"]
    assert list(settings["reference"]) == ["T <= 8192", "T > 8192"]


def test_what_is_not_measured_in_time_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([False] * 2 + [True] * 99)  # at the case and at the first provider
    monkeypatch.setattr(run_module.Run, "_late", lambda self: next(looks))
    status, rows = run(tmp_path, "--passes", "forward,step", "--providers", "loop,fastwkv", "--minutes", "1")
    assert status == 0
    late = ("unavailable", "out of time")
    assert {key: (row["status"], row["reason"]) for key, row in rows.items()} == {
        ("forward", "fastwkv"): ("ok", None),
        ("forward", "loop"): late,
        ("step", "fastwkv"): late,
        ("step", "loop"): late,
    }


def test_cases_after_the_deadline_have_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0, 61)
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    _, rows = run(tmp_path, "--minutes", "1")
    assert {row["reason"] for row in rows.values()} == {"out of time"}
    assert len(rows) == 3 * 6


def test_peer_whose_first_calls_take_long_is_not_asked_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "PATIENCE", 0.0)
    _, rows = run(tmp_path, "--passes", "forward,step")
    assert {rows["forward", name]["status"] for name in ("fastwkv", "loop")} == {"ok"}
    assert rows["step", "fastwkv"]["status"] == "ok"
    assert rows["step", "loop"]["reason"].startswith("its first calls took")
    _, rows = run(tmp_path, "--passes", "forward,step", "--providers", "fastwkv,loop")
    assert {row["status"] for row in rows.values()} == {"ok"}


def test_first_calls_that_fail_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "PATIENCE", 0.0)
    monkeypatch.setitem(WKV.providers, "loop", Breaking())
    _, rows = run(tmp_path, "--passes", "forward,backward")
    assert rows["forward", "loop"]["status"] == "failed"
    assert rows["backward", "loop"]["reason"].startswith("its first calls took")


class Breaking(wkv_providers.Loop):
    def wkv(self, *arguments: Any) -> Any:
        raise torch.OutOfMemoryError("of 80 GiB\nnone is left")


def test_peer_without_enough_memory_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WKV.providers, "loop", Breaking())
    status, rows = run(tmp_path, "--passes", "forward,step", "--providers", "fastwkv,loop,reference")
    assert status == 0
    outcome = rows["forward", "loop"]
    assert (outcome["status"], outcome["reason"]) == ("failed", "OutOfMemoryError: of 80 GiB")
    assert {row["status"] for key, row in rows.items() if key != ("forward", "loop")} == {"ok"}


def test_failure_while_it_is_timed_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, effort: Any) -> None:
        raise RuntimeError("too late")

    monkeypatch.setattr(run_module.ops_cuda.CudaTask, "take_turn", fail)
    status, rows = run(tmp_path, "--passes", "forward", "--providers", "fastwkv,loop")
    assert status == 1
    assert [(row["status"], row["reason"], row["ms"]) for row in rows.values()] == [
        ("failed", "RuntimeError: too late", None)
    ] * 2


def test_lost_device_ends_the_run_with_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Losing(wkv_providers.Reference):
        name = "loop"

        def step(self, *arguments: Any) -> Any:
            def lost(self: Any) -> None:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

            monkeypatch.setattr(Immediate, "synchronize", lost)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(WKV.providers, "loop", Losing())
    status, rows = run(tmp_path, "--passes", "forward,step", "--providers", "fastwkv,loop,reference")
    assert status == 1
    assert {key for key, row in rows.items() if row["status"] == "ok"} == {
        ("forward", name) for name in ("fastwkv", "loop", "reference")
    }
    assert rows["step", "loop"]["status"] == "failed"
    assert ("step", "reference") not in rows
    error = capsys.readouterr().err
    assert "ops.py: the device is lost: loop, wkv, step: RuntimeError: CUDA error: an illegal memory access" in error


def test_inputs_that_do_not_fit_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, seed: int, device: torch.device) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(run_module.Case, "draw", fail)
    status, rows = run(tmp_path, "--passes", "forward,step", "--providers", "fastwkv,loop")
    assert status == 1
    assert [row["reason"] for row in rows.values()] == ["OutOfMemoryError: too large"] * 4


def test_reference_that_fails_is_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *arguments: Any, **options: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(type(WKV), "expected", fail)
    status, rows = run(tmp_path, "--passes", "forward", "--providers", "fastwkv,loop")
    assert status == 1
    assert {row["reason"] for row in rows.values()} == {"RuntimeError: no compiler"}


def test_beyond_the_longest_loop_the_reference_is_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    expected = type(WKV).expected

    def noted(self: Any, inputs: Any, *, state: bool, own: bool = False) -> Any:
        asked.append(own)
        return expected(self, inputs, state=state, own=own)

    monkeypatch.setattr(type(WKV), "expected", noted)
    for longest, own in ((8, False), (7, True)):
        monkeypatch.setattr(run_module, "LONGEST_LOOP", longest)
        _, rows = run(tmp_path, "--passes", "forward", "--providers", "loop")
        assert rows["forward", "loop"]["status"] == "ok"
        assert asked.pop() is own


@pytest.mark.parametrize("name", ["hf", "loop", "reference"])
def test_loops_get_no_long_sequences_on_a_gpu(name: str) -> None:
    one = WKV.providers[name]
    assert one.too_long(GPU, "forward", 4096) is None
    assert one.too_long(GPU, "forward", 16384) == "a loop in Python, asked for 4096 tokens at most"
    assert one.too_long(CPU, "forward", 16384) is None
    assert one.too_long(GPU, "step", 16384) is None
    assert (one.too_long(GPU, "forward+backward", 4096) is None) == (name != "hf")
    scan = operators.OPERATORS["linear_scan"].providers["associative_scan"]
    assert scan.too_long(GPU, "forward", 8192) == "compiled anew for every shape, asked for 4096 tokens at most"
    assert WKV.providers["fla"].too_long(GPU, "forward", 10**6) is None


class Kernels:
    """What the compiled extension has, in PyTorch: log w as -e^{log w}, sums over time alone, gw times w."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return self._forward if name.startswith("forward") else self._backward

    def _forward(self, w: Any, u: Any, k: Any, v: Any, y: Any) -> None:
        assert (w.dtype, u.dtype) == (torch.float32, k.dtype)
        y.copy_(wkv_providers.Reference().wkv(-w, u, k, v, None))

    def _backward(self, w: Any, u: Any, k: Any, v: Any, y: Any, gy: Any, gw: Any, gu: Any, gk: Any, gv: Any) -> None:
        assert gw.shape == gu.shape == (k.shape[0], k.shape[2])  # the kernel writes so many
        for b in range(k.shape[0]):
            leaves = [t.detach().requires_grad_() for t in (-w, u, k[b : b + 1], v[b : b + 1])]
            with torch.enable_grad():
                result = wkv_providers.Reference().wkv(*leaves, None)
            found = torch.autograd.grad(result, leaves, gy[b : b + 1])
            for target, value in zip(
                (gw[b], gu[b], gk[b : b + 1], gv[b : b + 1]), (-found[0] * w, *found[1:]), strict=True
            ):
                target.copy_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_original_kernel_is_called_as_in_the_original_program(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Kernels()
    asked: list[int] = []
    monkeypatch.setattr(peer, "compiled", lambda folder, tokens: asked.append(tokens) or kernels)
    monkeypatch.setattr(peer.RWKV_CUDA, "lengths", (8, 20, 65536))
    monkeypatch.setattr(peer, "longest", lambda device: 20000)
    monkeypatch.setattr(peer.RwkvCuda, "sources", lambda self: Path())
    inputs = WKV.draw("ordinary", (3, 20, 32), dtype, 0)
    results, _ = passes.task(peer.RWKV_CUDA, "forward+backward", inputs, CPU).run()
    wanted = WKV.expected(inputs, state=False)
    found = passes.errors(WKV, peer.RWKV_CUDA, "forward+backward", inputs, results, wanted)
    assert max(found.values()) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert kernels.calls == [name + "_bf16" * (dtype == torch.bfloat16) for name in ("forward", "backward")]

    assert asked == [20]

    monkeypatch.setattr(peer.RWKV_CUDA, "lengths", (8,))  # its memory would not do
    with pytest.raises(ValueError, match="compiled for 8 tokens at most, got 20"):
        passes.task(peer.RWKV_CUDA, "forward+backward", inputs, CPU).run()


def test_original_kernel_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = peer.RwkvCuda()
    assert one.missing(CPU) == "runs on a GPU only"
    assert one.missing(GPU).endswith("does not ship it; give its folder with --rwkv-cuda")
    for name in peer.SOURCES:
        (tmp_path / name).touch()
    one.folder = tmp_path
    monkeypatch.setattr(peer.cpp_extension, "CUDA_HOME", None)
    assert one.missing(GPU) == "needs the CUDA compiler"
    monkeypatch.setattr(peer.cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setattr(peer.cpp_extension, "is_ninja_available", lambda: True)
    assert one.missing(GPU) is None

    about = SimpleNamespace(multi_processor_count=132, max_threads_per_multi_processor=2048, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    assert one.too_long(GPU, "backward", 16384) is None
    assert "too many" in one.too_long(GPU, "backward", 65536)
    assert one.too_long(GPU, "forward", 65536) is None
    assert one.refuses("forward", WKV.draw("ordinary", (1, 4, 33), torch.float32, 0)) is not None
    assert one.refuses("forward", WKV.draw("ordinary", (1, 4, 32), torch.float16, 0)) is not None
    assert one.refuses("forward", WKV.draw("ordinary", (1, 4, 32), torch.float32, 0)) is None


def test_what_does_not_compile_is_tried_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tries: list[str] = []

    def fail(name: str, sources: list[str], extra_cuda_cflags: list[str]) -> None:
        tries.append(extra_cuda_cflags[-1])
        raise RuntimeError("error: no such header\nand more")

    monkeypatch.setattr(peer.cpp_extension, "load", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^does not compile: error: no such header$"):
            peer.compiled(tmp_path, 4096)
    assert tries == ["-DTmax=4096"]
