"""Error against float64 where nothing is forgotten: |a| = 1 over thousands of tokens."""

from dataclasses import replace

import pytest
import torch
from comparison import assert_close, relative_error
from scan_cases import expected, make_case, run

from fastwkv import linear_scan, linear_scan_step

# A plain loop, or one with fused multiply-adds, has 9e-7 at T = 1024 and 2.3e-6 at T = 8192.
EXACT = (2e-7, 6e-7)
SINGLE = (torch.float32, torch.complex64)


def length(implementation, tokens: int, interpreted: int) -> int:
    """Interpreted kernels take milliseconds a token."""
    return interpreted if implementation.interpreted else tokens


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", SINGLE)
def test_nothing_is_lost_where_nothing_is_forgotten(implementation, dtype, fixed):
    for tokens in [256] if implementation.interpreted else [1024, 8192]:
        case = make_case(1, 1, tokens, 16, dtype=dtype, fixed=fixed, radius=(1.0, 1.0))
        assert_close(run(linear_scan, case, implementation.device), expected(case), EXACT)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
def test_nothing_is_lost_where_little_is_forgotten(implementation, decay, fixed):
    # A multiplier that is rounded to float32 is off, in the same direction at every token, by 3e-8 of itself.
    case = make_case(1, 1, length(implementation, 8192, 256), 16, fixed=fixed, log=True)
    case = replace(case, a=-decay * (0.5 + case.a.exp()).float().double())
    case = replace(case, a=case.a.float().double())
    assert_close(run(linear_scan, case, implementation.device), expected(case), EXACT)


@pytest.mark.parametrize("dtype", SINGLE)
def test_sum_of_what_has_one_sign_is_exact(implementation, dtype):
    # Every rounding of a running sum that grows slowly is in the same direction: a plain loop is off by 1e-4.
    tokens = length(implementation, 8192, 256)
    x = torch.full((1, tokens, 3), 0.1, dtype=dtype, device=implementation.device, requires_grad=True)
    initial = torch.zeros_like(x[:, 0]).requires_grad_()
    cut = torch.tensor([0, tokens], device=implementation.device) if dtype.is_complex else None  # packed, or not
    h = linear_scan(torch.ones_like(x[0, 0]).detach(), x, initial, cu_seqlens=cut)
    gx, ginitial = torch.autograd.grad(h, (x, initial), x.detach())  # the same sum, from the last token on
    wanted = torch.arange(1, tokens + 1, dtype=torch.float64)[None, :, None] * x[0, 0, 0].real.item()
    wanted = wanted.expand(h.shape).to(torch.complex128 if dtype.is_complex else torch.float64)
    for result, right in ((h, wanted), (gx, wanted.flip(1)), (ginitial, wanted[:, -1])):
        assert relative_error(result, right) <= 4e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("radius", [(0.9, 0.999), (0.999, 0.9999), (1.0, 1.0)])
def test_steps_equal_sequence_over_thousands_of_tokens(implementation, dtype, radius):
    tokens = length(implementation, 8192, 32)
    case = make_case(4, 1, tokens, 16, dtype=dtype, fixed=True, radius=radius)
    a, x, state, _ = (t if t is None else t.detach() for t in case.arguments(implementation.device))
    h = linear_scan(a, x, state)
    outputs = []
    for t in range(tokens):
        state = linear_scan_step(a, x[:, t], state)
        outputs.append(state)
    # A step rounds its state, where a sequence carries what is cut off.
    assert relative_error(torch.stack(outputs, 1), h) <= 3e-6


def test_double_precision_is_exact(implementation):
    for dtype in (torch.float64, torch.complex128):
        case = make_case(3, 2, length(implementation, 1024, 64), 8, dtype=dtype, radius=(1.0, 1.0))
        assert_close(run(linear_scan, case, implementation.device), expected(case), (1e-12, 1e-12))


def test_steps_of_a_log_multiplier_do_not_drift_where_they_are_differentiated():
    log_a = torch.tensor([-1e-4, -3e-4, -1e-3])
    x = torch.randn(1, 4096, 3, generator=torch.Generator().manual_seed(0))
    wanted = linear_scan(None, x, log_a=log_a)
    outputs, state = [], torch.zeros(1, 3, requires_grad=True)
    for x_t in x.unbind(1):
        state = linear_scan_step(None, x_t, state, log_a=log_a)
        outputs.append(state)
    assert relative_error(torch.stack(outputs, 1), wanted) <= 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_with_gradients_reads_16_bits_as_one_without(dtype):
    log_a, x, state = torch.full((3,), -7e-3, dtype=dtype), torch.ones(2, 3, dtype=dtype), torch.ones(2, 3)
    plain = linear_scan_step(None, x, state, log_a=log_a)
    differentiable = linear_scan_step(None, x, state, log_a=log_a.requires_grad_())
    torch.testing.assert_close(differentiable, plain, rtol=1e-7, atol=0)
    differentiable.sum().backward()
    assert log_a.grad.dtype == dtype
