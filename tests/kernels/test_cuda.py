"""What only a GPU can show: nothing waits for it, its graphs can hold every call, no length is compiled for."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastwkv import WKVState, linear_scan, linear_scan_step, wkv, wkv_step

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.unpoisoned,  # as in use
]
C = 96
SHORT, LONG = 100, 1024  # of one chunk, and of several
PACKINGS = {  # of LONG tokens
    "plain": None,
    "packed": [0, 5, 300, 301, LONG],
}


@dataclass
class Call:
    """An operator and its inputs, forward and backward."""

    function: object
    leaves: list[Tensor]
    cotangents: list[Tensor]
    cu_seqlens: Tensor | None

    def __call__(self) -> list[Tensor]:
        """Return outputs and gradients."""
        outputs = self.function(*self.leaves, self.cu_seqlens)
        return [*outputs, *torch.autograd.grad(outputs, self.leaves, self.cotangents)]


def whole_wkv(w, u, k, v, num, den, cu_seqlens):
    y, state = wkv(w, u, k, v, WKVState(num, den, torch.zeros_like(num)), return_state=True, cu_seqlens=cu_seqlens)
    return y, state.num, state.den


def whole_scan(a, x, initial, cu_seqlens):
    return linear_scan(a, x, initial, return_state=True, cu_seqlens=cu_seqlens)


def call(name: str, T: int, offsets: list[int] | None = None, seed: int = 0, device: str = "cuda") -> Call:
    generator = torch.Generator(device).manual_seed(seed)
    rows = 1 if offsets is None else len(offsets) - 1

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    if name == "wkv":
        leaves = [random(C).exp(), random(C), random(1, T, C), random(1, T, C), random(rows, C), random(rows, C).exp()]
        cotangents = [random(1, T, C), random(rows, C), random(rows, C)]
    else:
        dtype = torch.complex64 if name == "complex scan" else torch.float32
        a = random(1, T, C, dtype=dtype)
        leaves = [a / a.abs().clamp(min=1.0), random(1, T, C, dtype=dtype), random(rows, C, dtype=dtype)]
        cotangents = [random(1, T, C, dtype=dtype), random(rows, C, dtype=dtype)]
    cut = None if offsets is None else torch.tensor(offsets, device=device)
    function = whole_wkv if name == "wkv" else whole_scan
    return Call(function, [leaf.requires_grad_() for leaf in leaves], cotangents, cut)


operators = pytest.mark.parametrize("name", ["wkv", "scan", "complex scan"])
packings = pytest.mark.parametrize("packing", PACKINGS)


@pytest.fixture
def _no_waiting():
    yield
    torch.cuda.set_sync_debug_mode("default")


@operators
@packings
@pytest.mark.usefixtures("_no_waiting")
def test_nothing_waits_for_the_device(name, packing):
    for T in (LONG,) if packing == "packed" else (SHORT, LONG):
        both = call(name, T, PACKINGS[packing])
        both()  # compiled
        torch.cuda.set_sync_debug_mode("error")
        both()
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_no_waiting")
def test_no_step_waits_for_the_device():
    k, v, den = torch.rand(3, 4, C, device="cuda")
    w, a = torch.rand(2, C, device="cuda")
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        wkv_step(w, w, k, v, WKVState(v, den, k))
        linear_scan_step(a, k, v)
        linear_scan_step(None, k, v, log_a=-a)


@operators
@packings
def test_captured_graph_gives_for_new_inputs_what_a_call_gives(name, packing):
    both = call(name, LONG, PACKINGS[packing])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()  # compiled, and the allocator is warm
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    # Other lengths, too: nothing that the host does depends on them.
    new = call(name, LONG, None if packing == "plain" else [0, 16, 17, 900, LONG], seed=1)
    with torch.no_grad():
        for old, fresh in zip((*both.leaves, *both.cotangents), (*new.leaves, *new.cotangents), strict=True):
            old.copy_(fresh)
        if both.cu_seqlens is not None:
            both.cu_seqlens.copy_(new.cu_seqlens)
    graph.replay()
    for result, wanted in zip(captured, new(), strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


def compiled() -> int:
    """How many kernels have been compiled or loaded."""
    files = ("wkv", "wkv_bwd", "wkv_step", "linear_scan", "linear_scan_bwd", "linear_scan_step")
    modules = [importlib.import_module(f"fastwkv.kernels.{file}") for file in files]
    kernels = {id(k): k for m in modules for name, k in vars(m).items() if name.endswith("_kernel")}
    return sum(len(caches[0]) for kernel in kernels.values() for caches in kernel.device_caches.values())


@operators
def test_no_length_is_compiled_for(name):
    for T in (20, SHORT, LONG):  # some of a single chunk, some of several
        call(name, T)()
    before = compiled()
    assert before
    for T in (1, 2, 15, 16, 17, 127, 128, 333, 1000, 2048, 5001):
        call(name, T)()
    assert compiled() == before


@operators
@packings
def test_compiled_call_gives_the_same(name, packing):
    torch.compiler.reset()
    both = call(name, LONG, PACKINGS[packing])
    wanted = both()
    both.function = torch.compile(both.function, fullgraph=True)
    for result, want in zip(both(), wanted, strict=True):
        torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-5)


@operators
def test_calls_follow_the_current_stream(name):
    wanted = call(name, LONG, seed=1)()
    both, new = call(name, LONG), call(name, LONG, seed=1)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        torch.cuda._sleep(100_000_000)  # cycles: the inputs come late
        for old, fresh in zip((*both.leaves, *both.cotangents), (*new.leaves, *new.cotangents), strict=True):
            old.copy_(fresh)
        with torch.enable_grad():
            results = both()
        torch.cuda.current_stream().synchronize()
    for result, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, want, rtol=0, atol=0)


@operators
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_calls_run_where_their_tensors_are(name):
    for result, wanted in zip(call(name, LONG, device="cuda:1")(), call(name, LONG)(), strict=True):
        assert result.device == torch.device("cuda", 1)
        torch.testing.assert_close(result.cpu(), wanted.cpu(), rtol=0, atol=0)
