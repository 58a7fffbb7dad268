"""The peer that is compiled from sources: how it is called, what it lacks, what it is not asked for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peers import operators, wkv_providers
from peers import wkv_cuda_providers as peer
from throughput import passes

WKV = operators.OPERATORS["wkv"]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


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
    monkeypatch.setattr(peer, "FETCHED", tmp_path)
    assert one.missing(CPU) == "runs on a GPU only"
    assert one.missing(GPU).endswith("does not ship it; give its folder with --rwkv-cuda")
    for name in peer.SOURCES:
        (tmp_path / name).touch()
    assert one.sources() == tmp_path
    monkeypatch.setattr(peer, "FETCHED", tmp_path / "nowhere")
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
