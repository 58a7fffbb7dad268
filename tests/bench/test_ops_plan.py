"""What the operator benchmark measures by default, packed documents, its reference and what a graph keeps."""

import math
import pickle
from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tqdm")

from peers import linear_scan_providers as scan_providers
from peers import operator as base
from peers import wkv_providers
from throughput import passes, plan
from throughput import precompile as warm
from timing import saved_bytes as saved

OPERATORS = plan.OPERATORS
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPES = [(8, 1024, 768), (8, 4096, 2048), (8, 4096, 4096), (32, 1024, 1024)]
SHAPES += [(1, 16384, 1024), (1, 65536, 1024), (1, 131072, 2560)]


def cases(**given: Any) -> list[Any]:
    defaults = {"ops": list(OPERATORS), "dtypes": None, "shapes": None, "passes": None, "providers": None}
    return plan.cases(Namespace(**defaults | {"device": GPU, "quick": False} | given), None)


def test_what_is_measured_by_default_on_a_gpu() -> None:
    found = cases()
    dtypes = {op: tuple(dict.fromkeys(case.dtype for case in found if case.operator.name == op)) for op in OPERATORS}
    scan = ("bfloat16", "float32", "complex64")
    assert dtypes == {"wkv": ("bfloat16", "float32"), "linear_scan": scan, "linear_scan_fixed": scan}
    for op in OPERATORS:
        for dtype in dtypes[op]:
            here = [case for case in found if (case.operator.name, case.dtype) == (op, dtype)]
            assert [case.shape for case in here] == [*SHAPES, (1, 65536, 1024)]
            assert [case.layout.packed for case in here] == [False] * 7 + [True]
            assert all(set(passes.PASSES) - {"step"} <= set(case.passes) for case in here)
            # One token of (1, T, 1024) is the same for both T.
            stepped = [(case.shape[0], case.shape[2]) for case in here if "step" in case.passes]
            assert stepped == [(8, 768), (8, 2048), (8, 4096), (32, 1024), (1, 1024), (1, 2560)]
    assert {case.providers[0] for case in found} == {"fastwkv"}


def test_this_package_comes_first_whatever_the_order_that_was_asked_for() -> None:
    assert cases(providers=["loop", "rwkv-cuda", "fastwkv"], ops=["wkv"])[0].providers == (
        "fastwkv",
        "loop",
        "rwkv-cuda",
    )


def test_documents_fill_the_tokens_with_lengths_of_all_sizes() -> None:
    cu_seqlens = base.documents(10**6, seed=3)
    lengths = cu_seqlens.diff()
    assert (cu_seqlens[0], cu_seqlens[-1]) == (0, 10**6)
    assert lengths[:-1].min() >= 16
    assert lengths.max() <= 8192
    assert math.exp(lengths.double().log().mean()) == pytest.approx(math.sqrt(16 * 8192), rel=0.2)
    assert torch.equal(cu_seqlens, base.documents(10**6, seed=3))
    assert base.documents(5, seed=0).tolist() == [0, 5]
    assert base.first_tokens(torch.tensor([0, 3, 7, 9]), 7).tolist() == [0, 3, 7]
    assert base.first_tokens(torch.tensor([0, 3, 7, 9]), 5).tolist() == [0, 3, 5]


DTYPES = {"wkv": torch.float32, "linear_scan": torch.complex64, "linear_scan_fixed": torch.float32}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", OPERATORS)
def test_own_float64_path_agrees_with_the_loop(op: str, packed: bool) -> None:
    inputs = OPERATORS[op].draw("ordinary", (1 if packed else 2, 70, 5), DTYPES[op], 0)
    if packed:
        inputs = inputs.packed(torch.tensor([0, 1, 30, 70]))
    loop, own = (OPERATORS[op].expected(inputs, state=False, own=own) for own in (False, True))
    assert loop.keys() == own.keys()
    assert all(base.relative_error(own[name], loop[name]) < 1e-12 for name in loop)


def errors(op: str, provider: Any, inputs: Any) -> dict[str, float]:
    operator = OPERATORS[op]
    results, _ = passes.task(provider, "forward+backward", inputs, CPU).run()
    return passes.errors(
        operator, provider, "forward+backward", inputs, results, operator.expected(inputs, state=False)
    )


@pytest.mark.parametrize("op", OPERATORS)
def test_packed_documents_are_told_from_one_text(op: str) -> None:
    inputs = OPERATORS[op].draw("ordinary", (1, 40, 5), DTYPES[op], 0).packed(torch.tensor([0, 7, 8, 40]))
    kind = {"wkv": wkv_providers.FastWKV}.get(op, scan_providers.FastWKV)

    class Ignoring(kind):
        def forward(self, leaves: Any, initial: Any, cu_seqlens: Tensor | None = None) -> Tensor:
            return super().forward(leaves, initial, None)

    assert max(errors(op, OPERATORS[op].providers["fastwkv"], inputs).values()) < 1e-6
    assert max(errors(op, Ignoring(), inputs).values()) > 1e-2
    for provider in OPERATORS[op].all_providers().values():
        reason = provider.refuses("forward", inputs)
        assert provider.packs or reason, provider.name
    assert OPERATORS[op].providers["loop"].refuses("forward", inputs) == "takes no packed sequences"


def test_fla_gets_the_packed_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    class Module:
        @staticmethod
        def fused_recurrent_hgrn(x: Tensor, g: Tensor, **options: Any) -> tuple[Tensor]:
            given.update(options)
            return (x * g,)

    monkeypatch.setattr(scan_providers, "_hgrn", lambda: Module)
    inputs = OPERATORS["linear_scan"].draw("ordinary", (1, 9, 5), torch.float32, 0).packed(torch.tensor([0, 4, 9]))
    passes.task(scan_providers.PROVIDERS["fla-recurrent"], "forward", inputs, CPU).run()
    assert given["cu_seqlens"].tolist() == [0, 4, 9]


@pytest.mark.parametrize("which", ["backward", "forward+backward"])
def test_wkv_keeps_little_for_its_backward_pass(which: str) -> None:
    B, T, C = 2, 1024, 48
    inputs = OPERATORS["wkv"].draw("ordinary", (B, T, C), torch.bfloat16, 0)
    ours, loop = (
        passes.saved_bytes(OPERATORS["wkv"].providers[name], which, inputs, CPU) for name in ("fastwkv", "loop")
    )
    assert 0 < ours <= 1.2 * B * T * C
    assert loop > 4 * 4 * B * T * C


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("op", ["linear_scan", "linear_scan_fixed"])
def test_scan_keeps_nothing_but_inputs_and_output(op: str, dtype: torch.dtype) -> None:
    inputs = OPERATORS[op].draw("ordinary", (2, 64, 6), dtype, 0)
    assert passes.saved_bytes(OPERATORS[op].providers["fastwkv"], "backward", inputs, CPU) == 0
    assert passes.saved_bytes(OPERATORS[op].providers["fastwkv"], "forward", inputs, CPU) is None


class _KeepsOnContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = (x.double(),)
        ctx.save_for_backward(x, x.half())
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gx: Tensor) -> Tensor:
        return gx


def test_what_a_graph_keeps_is_counted_once() -> None:
    x = torch.randn(100, requires_grad=True)
    exponential = x.exp()
    assert saved.kept_bytes((exponential * exponential).sin(), [x]) == 2 * 400  # e^x, twice used, and its square
    assert saved.kept_bytes(x.sin(), [x]) == 0
    assert saved.kept_bytes(x.exp(), [x]) == 0
    assert saved.kept_bytes(_KeepsOnContext.apply(x), [x]) == 800 + 200


def test_kernels_are_compiled_on_the_same_channels_with_fewer_tokens() -> None:
    found = {warm.shortened(case) for case in cases(ops=["wkv"])}
    assert all(math.prod(case.shape) <= warm.ELEMENTS for case in found)
    assert {case.shape[2] for case in found} == {768, 1024, 2048, 2560, 4096}
    assert {case.layout.packed for case in found} == {False, True}
    case = cases(device=CPU, ops=["wkv"], shapes=plan.layouts("1x9x5p"))[0]
    warm.run_once(pickle.loads(pickle.dumps(case)), CPU)  # as another process gets it


@pytest.mark.parametrize("name", ["fastwkv", "accelerated-scan-ref"])
def test_copies_of_the_inputs_share_no_memory(name: str) -> None:
    inputs = OPERATORS["linear_scan"].draw("ordinary", (2, 9, 5), torch.float32, 0)
    provider = OPERATORS["linear_scan"].providers[name]
    made = [passes.arguments(provider, "backward", inputs, CPU) for _ in range(2)]
    tensors = [tensor for one in made for tensor in (*one.leaves, one.gradient)]
    assert len({tensor.data_ptr() for tensor in (*tensors, inputs.a, inputs.x, inputs.gh)}) == 9
    assert not any(one.gradient.requires_grad for one in made)
