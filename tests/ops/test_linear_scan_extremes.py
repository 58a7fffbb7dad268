"""Zero, NaN, infinity and the ends of the range, for every implementation of the linear scan."""

from dataclasses import replace

import pytest
import torch
from comparison import relative_error
from scan_cases import DTYPES, make_case, run, values

from fastwkv import linear_scan, linear_scan_step, reference

LENGTHS = [None, [5, 30, 12]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log", [False, True])
def test_multiplier_of_zero_forgets(implementation, dtype, log):
    case = make_case(0, 2, 30, 5, dtype=dtype, log=log)
    a = case.a.clone()
    a[:, 12] = -torch.inf if log else 0
    case = replace(case, a=a)
    h, final = values(linear_scan, case, implementation.device)
    later = replace(case, a=case.a[:, 12:], x=case.x[:, 12:], initial=None)
    h_later, final_later = values(linear_scan, later, implementation.device)
    torch.testing.assert_close(h[:, 12:], h_later, rtol=0, atol=0)
    torch.testing.assert_close(final, final_later, rtol=0, atol=0)
    assert all(
        gradient.isfinite().all() for gradient in run(linear_scan, case, implementation.device).gradients.values()
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("poisoned", ["a", "x"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16])
def test_nan_stays_in_its_channel_and_sequence(implementation, dtype, poisoned, lengths, reverse):
    case = make_case(0, 3, 47, 5, dtype=dtype, lengths=lengths, reverse=reverse)
    clean = run(linear_scan, case, implementation.device)
    b, t, c = (1, 20, 2) if lengths is None else (0, 20, 2)
    dirty_input = {"a": case.a.clone(), "x": case.x.clone()}[poisoned]
    dirty_input[b, t, c] = torch.nan
    dirty = run(linear_scan, replace(case, **{poisoned: dirty_input}), implementation.device)
    first, last = (0, 47) if lengths is None else (5, 35)
    reached = torch.zeros(case.x.shape, dtype=torch.bool)
    reached[b, slice(first, t + 1) if reverse else slice(t, last), c] = True
    assert dirty.y.isnan().cpu().equal(reached)
    reached[b, first:last, c] = True
    for name in ("a", "x"):
        assert dirty.gradients[name].cpu()[~reached].equal(clean.gradients[name].cpu()[~reached])


def test_nan_multiplier_spoils_its_own_channel_only(implementation):
    case = make_case(0, 2, 20, 3, fixed=True)
    h, _ = values(linear_scan, replace(case, a=torch.tensor([0.5, torch.nan, 0.5])), implementation.device)
    assert h[..., 1].isnan().all()
    assert not h[..., [0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_what_roundings_cut_off_does_not_cross_into_another_sequence(implementation, dtype):
    case = make_case(0, 1, 0, 5, dtype=dtype, lengths=[20, 25], radius=(1.0, 1.0), state=False)
    large = torch.where(torch.arange(45) < 20, 1e8, 1)[None, :, None]
    a = case.a.to(dtype)
    for x, gh, part in ((case.x * large, case.x, slice(20, 45)), (case.x, case.x * large.flip(1), slice(0, 25))):
        cut = torch.tensor([0, 20, 45] if part.start else [0, 25, 45])
        leaf = x.to(implementation.device, dtype).requires_grad_()
        h = linear_scan(a.to(implementation.device), leaf, cu_seqlens=cut.to(implementation.device))
        (gx,) = torch.autograd.grad(h, leaf, gh.to(implementation.device, dtype))
        alone = x[:, part].to(dtype).requires_grad_()
        h_alone = linear_scan(a[:, part], alone)
        assert relative_error(h[:, part], h_alone) <= 1e-7
        (gx_alone,) = torch.autograd.grad(h_alone, alone, gh[:, part].to(dtype))
        assert relative_error(gx[:, part], gx_alone) <= 1e-7


@pytest.mark.parametrize("log_a", [88.5, 85.0, 60.0, -80.0, -100.0, -torch.inf, torch.inf, torch.nan])
def test_log_multiplier_may_have_any_size(implementation, log_a):
    x = torch.full((1, 3, 1), 0.1)
    given = torch.full((1,), log_a)
    h = linear_scan(None, x.to(implementation.device), log_a=given.to(implementation.device)).cpu()
    wanted = reference.linear_scan(None, x, log_a=given)
    torch.testing.assert_close(h, wanted, rtol=1e-5, atol=0, equal_nan=True)
    step = linear_scan_step(
        None,
        x[:, 1].to(implementation.device),
        h[:, 0].to(implementation.device),
        log_a=given.to(implementation.device),
    )
    torch.testing.assert_close(step.cpu(), wanted[:, 1], rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fixed", [False, True])
def test_overflow_is_infinite_as_in_a_loop(implementation, dtype, fixed):
    largest = torch.finfo(dtype).max
    x = torch.tensor([0.9, 0.9, -0.5, 1.0], dtype=dtype).mul(largest)[None, :, None].expand(1, 4, 2).clone()
    x[..., 1] = 0.01 * largest
    a = torch.ones(2, dtype=dtype)
    a = (a if fixed else a.expand(1, 4, 2).clone()).to(implementation.device).requires_grad_()
    wanted = reference.linear_scan(a.detach().cpu(), x)
    assert wanted.isinf().any()
    h = linear_scan(a, x.to(implementation.device))
    torch.testing.assert_close(h.cpu(), wanted)
    flipped = x.flip(1).to(implementation.device)
    (gx,) = torch.autograd.grad(linear_scan(a, leaf := torch.zeros_like(flipped).requires_grad_()), leaf, flipped)
    torch.testing.assert_close(gx.flip(1).cpu(), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_multiplier_keeps_its_digits_in_16_bits(implementation, dtype):
    # The nearest 16-bit number to 0.9998 is 1, to its logarithm one that is right to three digits.
    log_a = torch.full((1, 1000, 1), -2e-4).to(dtype)
    x = torch.ones(1, 1000, 1, dtype=dtype)
    wanted = reference.linear_scan(torch.full((1,), -2e-4, dtype=torch.float64).exp(), x.double())
    h = linear_scan(None, x.to(implementation.device), log_a=log_a.to(implementation.device))
    assert relative_error(h, wanted) <= 4e-3
    direct = reference.linear_scan(log_a.double().exp().to(dtype), x)
    assert relative_error(direct, wanted) > 0.05
