"""log a beside numbers that are wider than it: made wider before it is exponentiated, wherever that is done."""

import pytest
import torch
from comparison import relative_error
from scan_cases import LOGARITHMIC, REAL
from torch.autograd import forward_ad

from fastwkv import linear_scan, linear_scan_step, reference

WIDER = [
    (log_a, x)
    for log_a in (*REAL, torch.complex64)
    for x in (torch.float32, torch.float64, torch.complex64, torch.complex128)
    if torch.promote_types(log_a, x) != log_a
]
SLOW = -1e-3  # of which 16 bits make exp(0) = 1


def inputs(log_dtype, dtype, device, fixed, T=16):
    generator = torch.Generator().manual_seed(0)
    shape = (3,) if fixed else (1, T, 3)
    log_a = SLOW * (1 + torch.rand(shape, generator=generator)).to(device, log_dtype)
    return log_a, torch.rand(1, T, 3, generator=generator).to(device, dtype)


def exactly(*tensors):
    wide = torch.complex128 if any(t.is_complex() for t in tensors) else torch.float64
    return [t.detach().cpu().to(wide) for t in tensors]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("log_dtype", "dtype"), WIDER)
def test_values_gradients_and_tangents_are_those_of_the_exact_multiplier(implementation, log_dtype, dtype, fixed):
    log_a, x = (t.requires_grad_() for t in inputs(log_dtype, dtype, implementation.device, fixed))
    state = torch.promote_types(torch.promote_types(log_dtype, dtype), torch.float32)
    bounds = LOGARITHMIC[state]
    exact = [t.requires_grad_() for t in exactly(log_a, x)]
    wanted = linear_scan(exact[0].exp().to(exact[1].dtype), exact[1])
    h = linear_scan(None, x, log_a=log_a)
    assert relative_error(h, wanted) <= bounds[0]
    assert relative_error(reference.linear_scan(None, *exactly(x), log_a=exact[0]), wanted) <= 1e-13
    assert relative_error(reference.linear_scan(None, x, log_a=log_a), wanted) <= 10 * bounds[0]  # a plain loop

    def loss(h):
        return (h * h.conj()).real.mean()

    wanted_gradient = torch.autograd.grad(loss(wanted), exact[0])[0].to(log_a.dtype)
    rounding = max(bounds[1], torch.finfo(log_dtype).eps)  # the gradient has the dtype of log a
    for again in (False, True):
        gradient = torch.autograd.grad(loss(linear_scan(None, x, log_a=log_a)), log_a, create_graph=again)[0]
        assert relative_error(gradient, wanted_gradient) <= rounding
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), x.detach())
        tangent = forward_ad.unpack_dual(linear_scan(None, dual, log_a=log_a.detach())).tangent
    assert relative_error(tangent, wanted) <= bounds[1]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("log_dtype", "dtype"), [*WIDER, (torch.complex64, torch.complex64)])
def test_step_is_the_same_with_gradients_and_without_and_exact(log_dtype, dtype, fixed):
    log_a, x = inputs(log_dtype, dtype, "cpu", fixed, T=1)
    log_a, x = log_a if fixed else log_a[:, 0], x[:, 0]
    state = 100 * torch.rand(x.shape).to(torch.promote_types(torch.promote_types(log_dtype, dtype), torch.float32))
    plain = linear_scan_step(None, x, state, log_a=log_a)
    followed = linear_scan_step(None, x, state.clone().requires_grad_(), log_a=log_a)
    assert torch.equal(plain, followed)
    exact_log, exact_x, exact_state = exactly(log_a, x, state)
    wanted = exact_log.exp() * exact_state + exact_x
    assert relative_error(plain, wanted) <= torch.finfo(state.dtype).eps
    step = reference.linear_scan_step(None, x, state, log_a=log_a)
    assert relative_error(step, wanted) <= 4 * torch.finfo(state.dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_slow_decay_is_none_of_zero(dtype):
    log_a, x = torch.full((2,), SLOW, dtype=dtype), torch.ones(1, 1024, 2, dtype=torch.complex64)
    h = linear_scan(None, x, log_a=log_a)[0, -1]
    rate = log_a.double()
    wanted = torch.expm1(1024 * rate) / torch.expm1(rate)
    torch.testing.assert_close(h.real.double(), wanted, rtol=2e-5, atol=0)  # a is rounded to complex64, 1024 times so
