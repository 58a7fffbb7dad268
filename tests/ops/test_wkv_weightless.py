"""States of little weight: den = 0 is an empty past whatever max is, and a small den one that hides no token."""

import pytest
import torch
from comparison import relative_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, Implementation

from fastwkv import WKVState, reference, wkv, wkv_step

FAR_EXPONENTS = 2e-6  # of y where exponents are 60 apart: the rounding of their difference
EXPONENTS = (0.0, 5.0, 60.0, -60.0, 700.0, -65500.0, -1e30, -1e38, 1e30, -torch.inf)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with Implementation(request.param) as context:
        yield context


def inputs(seed, T, C, level, dtype=torch.float32, rate=1.0):
    generator = torch.Generator().manual_seed(seed)
    w, u, v = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((C,), (C,), (1, T, C)))
    k = torch.randn(1, T, C, generator=generator, dtype=dtype) + level
    # Exponents are exact, whatever they are compared with: only weights are rounded.
    return *((t * 64).round() / 64 for t in (w.abs() * rate, u, k)), v


@settings(max_examples=60)
@given(
    exponent=st.sampled_from(EXPONENTS),
    level=st.sampled_from((0.0, -100.0, -700.0, -70000.0, 90.0)),
    absent=st.integers(0, 3),
    bonus=st.sampled_from((0.0, -100.0, 100.0)),
    rate=st.sampled_from((1.0, 200.0, -200.0)),
    packed=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_no_weight_is_an_empty_past(implementation, exponent, level, absent, bonus, rate, packed, dtype):
    device, T, C = implementation.device, 6, 5
    w, u, k, v = (t.to(device) for t in inputs(1, T, C, level, dtype, rate))
    u = u + bonus
    k[:, :absent] = -torch.inf
    none = torch.zeros(1, C, dtype=dtype, device=device)
    state = WKVState(none, none, torch.full_like(none, exponent))
    cut = torch.tensor([0, T], device=device) if packed else None
    y, final = wkv(w, u, k, v, state, return_state=True, cu_seqlens=cut)
    wanted, final_wanted = wkv(w, u, k, v, return_state=True, cu_seqlens=cut)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        final.num / final.den, final_wanted.num / final_wanted.den, rtol=tolerance, atol=tolerance
    )
    size = 1 + final_wanted.max.abs().max()
    weights = [one.max + one.den.log() for one in (final, final_wanted)]
    torch.testing.assert_close(*weights, rtol=tolerance, atol=tolerance * size.item())

    y_t, after = wkv_step(w, u, k[:, absent], v[:, absent], state)
    torch.testing.assert_close(y_t, v[:, absent], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(after.num / after.den, v[:, absent], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(after.max + after.den.log(), k[:, absent], rtol=tolerance, atol=tolerance)


@settings(max_examples=40)
@given(
    exponent=st.sampled_from((0.0, 3.0, -20.0, 40.0)),
    level=st.sampled_from((0.0, -10.0, -50.0, -80.0)),
    absent=st.sampled_from((0, 1, 3, 20, 40)),
    packed=st.booleans(),
)
def test_gradient_of_a_state_that_begins_as_zeros(implementation, exponent, level, absent, packed):
    # d y / d num is e^max beside the weight of the first tokens; float32 does not hold all that it can be.
    assume(exponent - level < 75)
    device, T, C = implementation.device, absent + 4, 3
    w, u, k, v = inputs(2, T, C, level, rate=0.05)
    k[:, :absent] = -torch.inf
    gradients = []
    for function, place, dtype in ((wkv, device, torch.float32), (reference.wkv_loop, "cpu", torch.float64)):
        given = [t.to(place, dtype) for t in (w, u, k, v)]
        fields = [torch.zeros(1, C, dtype=dtype, device=place), torch.zeros(1, C, dtype=dtype, device=place)]
        fields.append(torch.full((1, C), exponent, dtype=dtype, device=place))
        state = WKVState(*(field.requires_grad_() for field in fields))
        cut = torch.tensor([0, T], device=place) if packed else None
        y, final = function(*given, state, return_state=True, cu_seqlens=cut)
        # The reference's own final state has the scale of whatever is in it; means are of no scale.
        loss = (y.double() * v.to(place).sin()).sum() + (final.num / final.den).double().sum()
        gradients.append(torch.autograd.grad(loss, (state.num, state.den)))
    for ours, wanted in zip(*gradients, strict=True):
        assert wanted.abs().max() > 0
        assert relative_error(ours, wanted) <= 1e-5


@settings(max_examples=60)
@given(
    den=st.sampled_from((1e-20, 1e-30, 2e-36, 1.2e-38, 1e-40, 1e-44)),
    mean=st.sampled_from((1.0, 3.0)),  # of the sign of v: nothing cancels
    gap=st.floats(-5, 5),
    exponent=st.sampled_from((50.0, 0.0, -300.0)),
    packed=st.booleans(),
)
def test_small_den_hides_no_token(implementation, den, mean, gap, exponent, packed):
    # The token weighs e^gap times what the state does.
    device, C = implementation.device, 5
    one = torch.ones(1, C, device=device)
    num, den = (torch.full((1, C), x, device=device) for x in (mean * den, den))
    state = WKVState(num, den, one * exponent)
    k = (exponent + den.double().log() + gap).float()[:, None].expand(1, 3, C)
    v = torch.tensor([0.25, 0.5, 0.75], device=device)[None, :, None].expand(1, 3, C)
    w, u = torch.full((C,), 0.5, device=device), torch.zeros(C, device=device)
    cut = torch.tensor([0, 3], device=device) if packed else None
    exact = WKVState(*(field.double() for field in state))
    wanted, final_wanted = reference.wkv_loop(*(t.double() for t in (w, u, k, v)), exact, return_state=True)
    y, final = wkv(w, u, k, v, state, return_state=True, cu_seqlens=cut)
    assert relative_error(y, wanted) <= FAR_EXPONENTS
    assert relative_error(final.num / final.den, final_wanted.num / final_wanted.den) <= FAR_EXPONENTS
    weights = [one.max.double() + one.den.double().log() for one in (final, final_wanted)]
    torch.testing.assert_close(*weights, rtol=1e-6, atol=2e-6)
    y_t, _ = wkv_step(w, u, k[:, 0], v[:, 0], state)
    assert relative_error(y_t, wanted[:, 0]) <= FAR_EXPONENTS


def test_gradients_beside_a_small_den(implementation):
    device, C = implementation.device, 4
    w, u, k, v = inputs(3, 5, C, -38.0)
    results = []
    for function, place, dtype in ((wkv, device, torch.float32), (reference.wkv_loop, "cpu", torch.float64)):
        leaves = [t.to(place, dtype, copy=True).requires_grad_() for t in (w, u, k, v)]
        state = [
            torch.full((1, C), x, dtype=torch.float32).to(place, dtype).requires_grad_() for x in (1e-36, 2e-36, 50.0)
        ]
        y = function(*leaves, WKVState(*state))
        gradients = torch.autograd.grad((y * v.to(place).cos()).sum(), (*leaves, *state))
        results.append((y, *gradients))
    for ours, wanted in zip(*results, strict=True):
        assert relative_error(ours, wanted) <= 5e-6


@pytest.mark.parametrize(
    ("exponent", "level", "absent"),
    [(0.0, -95.0, 0), (100.0, 0.0, 0), (0.0, -1000.0, 20), (1e4, 0.0, 0), (1e4, 0.0, 20), (1e38, -3.0, 20)],
)
def test_gradient_beyond_the_largest_number_is_infinite_and_no_nan(implementation, exponent, level, absent):
    w, u, k, v = (t.to(implementation.device) for t in inputs(4, absent + 2, 3, level))
    k[:, :absent] = -torch.inf
    fields = [torch.full((1, 3), x, device=implementation.device, requires_grad=True) for x in (0.0, 0.0, exponent)]
    y = wkv(w, u, k, v, WKVState(*fields))
    gnum, gden, gmax = torch.autograd.grad(y.sum(), fields)
    assert gnum.isinf().all()
    assert gden.isinf().all()
    assert not gmax.any()
