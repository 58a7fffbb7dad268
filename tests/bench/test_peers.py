"""The operators and their providers: inputs, references, how every peer is called, what it lacks and refuses."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peers import linear_scan_inputs, wkv_inputs, wkv_providers
from peers import linear_scan_providers as scan_providers
from peers import wkv_cuda_providers as cuda_peer
from peers.operator import documents, first_tokens, relative_error
from peers.operators import OPERATORS
from throughput import passes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WKV, SCAN = OPERATORS["wkv"], OPERATORS["linear_scan"]
DTYPES = {"wkv": torch.float32, "linear_scan": torch.complex64, "linear_scan_fixed": torch.float32}


def errors(operator, provider, inputs, which="forward+backward"):
    results, _ = passes.task(provider, which, inputs, CPU).run()
    wanted = operator.expected_step(inputs) if which == "step" else operator.expected(inputs, state=False)
    return passes.errors(operator, provider, which, inputs, results, wanted)


def test_inputs_of_wkv_are_what_the_tables_say():
    ordinary, adversarial = (WKV.draw(kind, (1, 400, 64), torch.bfloat16, 0) for kind in ("ordinary", "adversarial"))
    for inputs in (ordinary, adversarial):
        assert {t.dtype for t in (inputs.k, inputs.v, inputs.gy)} == {torch.bfloat16}
        assert {t.dtype for t in (inputs.w, inputs.u, *inputs.state)} == {torch.float32}
    assert ordinary.k.float().std() == pytest.approx(1, abs=0.05)
    assert 59 < adversarial.k.abs().max() <= 60
    assert 1e-6 <= adversarial.w.min() < 1e-5
    assert 10 < adversarial.w.max() < 20


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16], ids=str)
def test_inputs_of_the_scan_are_what_the_tables_say(dtype, fixed):
    ordinary, adversarial = (
        draw(2, 300, 40, dtype, fixed=fixed) for draw in (linear_scan_inputs.ordinary, linear_scan_inputs.adversarial)
    )
    for inputs in (ordinary, adversarial):
        assert inputs.a.shape == ((40,) if fixed else (2, 300, 40))
        assert {t.dtype for t in (inputs.a, inputs.x, inputs.gh)} == {dtype}
        assert inputs.h0.dtype == torch.promote_types(dtype, torch.float32)
        assert inputs.part(7, slice(None, None, 3)).shape == (2, 7, 14)
    if dtype.is_complex:
        assert 0.9 - 1e-6 <= ordinary.a.abs().min() < 0.92
        assert 0.98 < ordinary.a.abs().max() <= 0.999 + 1e-6
        assert {tuple(t.sign().unique().tolist()) for t in (ordinary.a.real, ordinary.a.imag)} == {(-1.0, 1.0)}
        assert (adversarial.a.abs() - 1).abs().max() < 2e-7
        assert adversarial.a.angle().abs().max() > 3
    else:
        assert 0 < ordinary.a.min() < 0.9 < ordinary.a.max() <= 1
        assert (adversarial.a == 1).all()
        assert (adversarial.x >= 0).all()


def test_documents_fill_the_tokens_with_lengths_of_all_sizes():
    cu_seqlens = documents(10**6, seed=3)
    lengths = cu_seqlens.diff()
    assert (cu_seqlens[0], cu_seqlens[-1]) == (0, 10**6)
    assert lengths[:-1].min() >= 16
    assert lengths.max() <= 8192
    assert math.exp(lengths.double().log().mean()) == pytest.approx(math.sqrt(16 * 8192), rel=0.2)
    assert documents(5, seed=0).tolist() == [0, 5]
    assert first_tokens(torch.tensor([0, 3, 7, 9]), 7).tolist() == [0, 3, 7]
    assert first_tokens(torch.tensor([0, 3, 7, 9]), 5).tolist() == [0, 3, 5]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", OPERATORS)
def test_own_float64_path_agrees_with_the_loop(op, packed):
    inputs = OPERATORS[op].draw("ordinary", (1 if packed else 2, 70, 5), DTYPES[op], 0)
    inputs = inputs.packed(torch.tensor([0, 1, 30, 70])) if packed else inputs
    loop, own = (OPERATORS[op].expected(inputs, state=False, own=own) for own in (False, True))
    assert loop.keys() == own.keys()
    assert all(relative_error(own[name], loop[name]) < 1e-12 for name in loop)


@pytest.mark.parametrize("op", OPERATORS)
def test_packed_documents_are_told_from_one_sequence(op):
    operator = OPERATORS[op]
    inputs = operator.draw("ordinary", (1, 40, 5), DTYPES[op], 0).packed(torch.tensor([0, 7, 8, 40]))

    class Ignoring(type(operator.providers["fastwkv"])):
        def forward(self, leaves, initial, cu_seqlens=None):
            return super().forward(leaves, initial, None)

    assert max(errors(operator, operator.providers["fastwkv"], inputs).values()) < 1e-6
    assert max(errors(operator, Ignoring(), inputs).values()) > 1e-2
    for provider in operator.all_providers().values():
        assert provider.packs or provider.refuses("forward", inputs), provider.name


@pytest.mark.parametrize("name", ["fastwkv", "accelerated-scan-ref"])
def test_copies_of_the_inputs_share_no_memory(name):
    inputs = SCAN.draw("ordinary", (2, 9, 5), torch.float32, 0)
    made = [passes.arguments(SCAN.providers[name], "backward", inputs, CPU) for _ in range(2)]
    tensors = [tensor for one in made for tensor in (*one.leaves, one.gradient)]
    assert len({tensor.data_ptr() for tensor in (*tensors, inputs.a, inputs.x, inputs.gh)}) == 9
    assert not any(one.gradient.requires_grad for one in made)


def test_little_is_kept_for_the_backward_pass():
    B, T, C = 2, 1024, 48
    inputs = WKV.draw("ordinary", (B, T, C), torch.bfloat16, 0)
    ours, loop = (passes.saved_bytes(WKV.providers[name], "backward", inputs, CPU) for name in ("fastwkv", "loop"))
    assert 0 < ours <= 1.2 * B * T * C
    assert loop > 4 * 4 * B * T * C
    for op in ("linear_scan", "linear_scan_fixed"):
        inputs = OPERATORS[op].draw("ordinary", (2, 64, 6), torch.complex64, 0)
        assert passes.saved_bytes(OPERATORS[op].providers["fastwkv"], "backward", inputs, CPU) == 0
        assert passes.saved_bytes(OPERATORS[op].providers["fastwkv"], "forward", inputs, CPU) is None


@pytest.mark.parametrize("name", ["hf", "loop", "reference"])
def test_loops_get_no_long_sequences_on_a_gpu(name):
    one = WKV.providers[name]
    assert one.too_long(GPU, "forward", 4096) is one.too_long(GPU, "step", 16384) is None
    assert one.too_long(GPU, "forward", 16384) == "a loop in Python, asked for 4096 tokens at most"
    assert one.too_long(CPU, "forward", 16384) is None
    assert (one.too_long(GPU, "forward+backward", 4096) is None) == (name != "hf")
    scan = SCAN.providers["associative_scan"]
    assert scan.too_long(GPU, "forward", 8192) == "compiled anew for every shape, asked for 4096 tokens at most"
    assert WKV.providers["fla"].too_long(GPU, "forward", 10**6) is None


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


def test_providers_say_what_they_cannot_do():
    for name, dtype, T, fixed, reason in REFUSALS:
        inputs = linear_scan_inputs.ordinary(1, T, 3, dtype, fixed=fixed)
        assert scan_providers.PROVIDERS[name].refuses("forward", inputs) == reason, name


@pytest.mark.parametrize("name", ["accelerated-scan", "accelerated-scan-warp", "accelerated-scan-ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_accelerated_scan_gets_its_layout(name, dtype, monkeypatch):
    # Its kernels need a GPU. Its reference, which has the layout of all of them, does not.
    pytest.importorskip("accelerated_scan.ref")
    provider = SCAN.providers[name]
    monkeypatch.setattr(type(provider), "module", lambda self, dtype: "accelerated_scan.ref")
    found = errors(SCAN, provider, linear_scan_inputs.ordinary(2, 32, 5, dtype))
    assert found.keys() == {"h", "ga", "gx"}
    assert max(found.values()) < 1e-6


@pytest.mark.parametrize("name", ["fla-recurrent", "fla-chunk"])
def test_fla_gets_the_logarithm_of_gates_and_packed_documents(name, monkeypatch):
    given = []

    def hgrn(x, g, initial_state=None, output_final_state=False, cu_seqlens=None):
        given.append(cu_seqlens)
        h = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
        outputs = []
        for g_t, x_t in zip(g.unbind(1), x.unbind(1), strict=True):
            h = g_t.exp() * h + x_t
            outputs.append(h)
        return torch.stack(outputs, 1), h if output_final_state else None

    monkeypatch.setattr(scan_providers, "_hgrn", lambda: SimpleNamespace(fused_recurrent_hgrn=hgrn, chunk_hgrn=hgrn))
    inputs, provider = linear_scan_inputs.ordinary(1, 9, 5, torch.float32), SCAN.providers[name]
    assert max(errors(SCAN, provider, inputs).values()) < 1e-6
    if name == "fla-recurrent":
        assert max(errors(SCAN, provider, inputs, "step").values()) < 1e-6
        passes.task(provider, "forward", inputs.packed(torch.tensor([0, 4, 9])), CPU).run()
        assert given[-1].tolist() == [0, 4, 9]


class Kernels:
    """The extension that the original program compiles, in PyTorch: log w as -e^{log w}, sums over time, gw times w."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        self.calls.append(name)
        return self._forward if name.startswith("forward") else self._backward

    def _forward(self, w, u, k, v, y):
        assert (w.dtype, u.dtype) == (torch.float32, k.dtype)
        y.copy_(wkv_providers.Reference().wkv(-w, u, k, v, None))

    def _backward(self, w, u, k, v, y, gy, gw, gu, gk, gv):
        assert gw.shape == gu.shape == (k.shape[0], k.shape[2])  # the kernel writes so many
        for b in range(k.shape[0]):
            leaves = [t.detach().requires_grad_() for t in (-w, u, k[b : b + 1], v[b : b + 1])]
            with torch.enable_grad():
                result = wkv_providers.Reference().wkv(*leaves, None)
            found = torch.autograd.grad(result, leaves, gy[b : b + 1])
            targets = gw[b], gu[b], gk[b : b + 1], gv[b : b + 1]
            for target, value in zip(targets, (-found[0] * w, *found[1:]), strict=True):
                target.copy_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_original_kernel_is_called_as_in_the_original_program(dtype, monkeypatch):
    kernels, asked = Kernels(), []
    monkeypatch.setattr(cuda_peer, "compiled", lambda folder, tokens: asked.append(tokens) or kernels)
    monkeypatch.setattr(cuda_peer, "longest", lambda device: 20000)
    one = cuda_peer.RwkvCuda()
    one.lengths, one.sources = (8, 20, 65536), Path
    inputs = WKV.draw("ordinary", (3, 20, 32), dtype, 0)
    assert max(errors(WKV, one, inputs).values()) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert kernels.calls == [name + "_bf16" * (dtype == torch.bfloat16) for name in ("forward", "backward")]
    assert asked == [20]
    one.lengths = (8,)  # its memory would not do
    with pytest.raises(ValueError, match="compiled for 8 tokens at most, got 20"):
        passes.task(one, "forward+backward", inputs, CPU).run()


def test_original_kernel_says_what_it_lacks(monkeypatch, tmp_path):
    one = cuda_peer.RwkvCuda()
    monkeypatch.setattr(cuda_peer, "FETCHED", tmp_path)
    assert one.missing(CPU) == "runs on a GPU only"
    assert one.missing(GPU).endswith("does not ship it; give its folder with --rwkv-cuda")
    for name in cuda_peer.SOURCES:
        (tmp_path / name).touch()
    monkeypatch.setattr(cuda_peer.cpp_extension, "CUDA_HOME", None)
    assert one.missing(GPU) == "needs the CUDA compiler"
    monkeypatch.setattr(cuda_peer.cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setattr(cuda_peer.cpp_extension, "is_ninja_available", lambda: True)
    assert one.missing(GPU) is None

    about = SimpleNamespace(multi_processor_count=132, max_threads_per_multi_processor=2048, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    assert one.too_long(GPU, "backward", 16384) is one.too_long(GPU, "forward", 65536) is None
    assert "too many" in one.too_long(GPU, "backward", 65536)
    for channels, dtype, refused in ((33, torch.float32, True), (32, torch.float16, True), (32, torch.float32, False)):
        assert bool(one.refuses("forward", wkv_inputs.ordinary(1, 4, channels, dtype))) == refused


def test_extension_that_does_not_compile_is_tried_once(monkeypatch, tmp_path):
    tries = []

    def fail(name, sources, extra_cuda_cflags):
        tries.append(extra_cuda_cflags[-1])
        raise RuntimeError("error: no such header\nand more")

    monkeypatch.setattr(cuda_peer.cpp_extension, "load", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^does not compile: error: no such header$"):
            cuda_peer.compiled(tmp_path, 4096)
    assert tries == ["-DTmax=4096"]
