"""The reference of the checks on a GPU, float64 on whole tensors, against the definition and its gradients."""

from typing import Any

import pytest
import torch
from correctness import reference

from fastwkv import WKVState
from fastwkv.reference import linear_scan, wkv_loop

OFFSETS = [0, 1, 6, 7, 19]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(found: Any, wanted: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_wkv_and_its_gradients_are_those_of_the_definition(packed: bool, state: bool) -> None:
    B, N = (1, 4) if packed else (2, 2)
    w, u, k, v = normal(3).exp(), normal(3, seed=1), 3 * normal(B, 19, 3, seed=2), normal(B, 19, 3, seed=3)
    mean, weight = normal(N, 3, seed=4), normal(N, 3, seed=5)
    leaves = [t.requires_grad_() for t in ([w, u, k, v, mean, weight] if state else [w, u, k, v])]
    offsets = OFFSETS if packed else None
    initial = reference.State(mean, weight) if state else None
    y, final = reference.wkv(w, u, k, v, initial, offsets)
    given = WKVState(mean * weight.exp(), weight.exp(), torch.zeros_like(weight)) if state else None
    cut = torch.tensor(OFFSETS) if packed else None
    want, (num, den, scale) = wkv_loop(w, u, k, v, given, return_state=True, cu_seqlens=cut)
    assert_equal((y, *final), (want, num / den, scale + den.log()))
    results = (y, final.mean, final.log_weight), (want, num / den, scale + den.log())
    cotangents = normal(*y.shape, seed=6), normal(N, 3, seed=7), normal(N, 3, seed=8)
    assert_equal(*(torch.autograd.grad(outputs, leaves, cotangents) for outputs in results))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_scan_and_its_gradients_are_those_of_the_definition(
    packed: bool, reverse: bool, fixed: bool, dtype: torch.dtype
) -> None:
    B, N = (1, 4) if packed else (2, 2)
    phase = torch.ones(3, dtype=dtype) * (1j if dtype.is_complex else -1)
    a = torch.sigmoid(normal(*((3,) if fixed else (B, 19, 3)))) * phase
    x, first = normal(B, 19, 3, seed=1).to(dtype), normal(N, 3, seed=2).to(dtype)
    leaves = [t.requires_grad_() for t in (a, x, first)]
    found = reference.linear_scan(a, x, first, OFFSETS if packed else None, reverse)
    cut = torch.tensor(OFFSETS) if packed else None
    wanted = linear_scan(a, x, first, reverse=reverse, return_state=True, cu_seqlens=cut)
    assert_equal(found, wanted)
    cotangents = normal(B, 19, 3, seed=3).to(dtype), normal(N, 3, seed=4).to(dtype)
    assert_equal(*(torch.autograd.grad(outputs, leaves, cotangents) for outputs in (found, wanted)))


def test_result_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"y: expected \[2\] torch.float64, got \[3\]"):
        reference.relative_errors({"y": torch.ones(3)}, {"y": torch.ones(2)})


def test_errors_are_those_of_each_result() -> None:
    found = {"a": torch.tensor([1.0, float("nan")]), "b": torch.tensor([1 + 0.5j]), "c": torch.tensor([2.0])}
    wanted = {"c": torch.zeros(1), "b": torch.ones(1, dtype=torch.complex128), "a": torch.ones(2)}
    errors = reference.relative_errors(found, wanted)
    assert errors["a"] != errors["a"]
    assert (errors["b"], errors["c"]) == (0.5, 2.0)
