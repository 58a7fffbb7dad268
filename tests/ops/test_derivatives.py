"""What the operators' way into autograd leaves out, and what it keeps."""

import inspect

import pytest
import torch

from fastwkv import linear_scan, wkv
from fastwkv.ops.derivatives import apply
from fastwkv.ops.linear_scan_autograd import LinearScan


def inputs(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(*shape, dtype=torch.float64, generator=generator).requires_grad_()


CALLS = {
    "wkv": lambda k: wkv(*torch.ones(2, 3, device=k.device), k, k),
    "linear_scan": lambda x: linear_scan(torch.full((3,), 0.5, device=x.device), x),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_call_reads_a_signature(call, implementation, monkeypatch):
    x = inputs(1, 5, 3).to(implementation.device)
    torch.autograd.grad(call(x).sum(), x)  # what is prepared once may read what it wants

    def refuse(*_, **__):
        raise AssertionError("a signature was read")

    if not implementation.interpreted:  # Triton's interpreter binds arguments so
        monkeypatch.setattr(inspect, "signature", refuse)
    torch.autograd.grad(call(x).sum(), x)
    with torch.no_grad():
        call(x)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_tensor_that_a_transform_has_left_behind_counts_as_itself(call):
    x, left = inputs(1, 5, 3), []
    torch.func.grad(lambda t: (left.append(t), t.sum())[1])(x)
    assert torch._C._functorch.unwrap_if_dead(left[0]) is not left[0]
    assert torch.equal(call(left[0]), call(x))
    (expected,) = torch.autograd.grad(call(x).sum(), x)
    assert torch.equal(torch.autograd.grad(call(left[0]).sum(), x)[0], expected)


def test_transform_of_a_function_finds_the_operators_own_rules():
    a, x = inputs(3), inputs(1, 5, 3)
    found = torch.func.grad(lambda a: apply(LinearScan, a, x, None, None, False, False, None)[0].sum())(a)
    (expected,) = torch.autograd.grad(linear_scan(a, x).sum(), a)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
