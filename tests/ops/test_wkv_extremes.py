"""WKV where little is left: absent tokens, empty and poisoned states, rates of any size."""

from dataclasses import replace

import pytest
import torch
from comparison import assert_close, relative_error
from wkv_cases import ORDINARY, assert_states_close, expected, make_case, run, values

from fastwkv import WKVState, wkv, wkv_step


@pytest.mark.parametrize("poisoned", ["k", "v"])
@pytest.mark.parametrize("lengths", [None, [5, 30, 12]])
def test_nan_stays_in_its_channel_and_sequence(implementation, poisoned, lengths):
    case = make_case(0, 3, 47, 5, lengths=lengths)
    clean = run(wkv, case, implementation.device)
    b, t, c = (1, 20, 2) if lengths is None else (0, 20, 2)
    dirty_input = {"k": case.k.clone(), "v": case.v.clone()}[poisoned]
    dirty_input[b, t, c] = torch.nan
    dirty = run(wkv, replace(case, **{poisoned: dirty_input}), implementation.device)
    end = 47 if lengths is None else 35
    reached = torch.zeros(case.k.shape, dtype=torch.bool)
    reached[b, t:end, c] = True
    assert dirty.y.isnan().cpu().equal(reached)
    reached[b, 0 if lengths is None else 5 : end, c] = True
    for name in ("k", "v"):
        assert dirty.gradients[name].cpu()[~reached].equal(clean.gradients[name].cpu()[~reached])
    for name in ("w", "u"):
        others = torch.arange(5) != c
        assert dirty.gradients[name].cpu()[others].equal(clean.gradients[name].cpu()[others])
        assert dirty.gradients[name][c].isnan()


def test_nan_outlasts_an_absent_token(implementation):
    # The state that it leaves has no exponent of its own left, and must not pass for an empty one.
    case = make_case(0, 1, 8, 2)
    k = case.k.clone()
    k[0, 3, 1], k[0, 4, 1] = torch.nan, -torch.inf
    case = replace(case, k=k)
    w, u, k, v, state, _ = (t if t is None or isinstance(t, tuple) else t.detach() for t in case.arguments())
    w, u, k, v = (t.to(implementation.device) for t in (w, u, k, v))
    state = WKVState(*(s.detach().to(implementation.device) for s in state))
    _, split = wkv(w, u, k[:, :5], v[:, :5], state, return_state=True)
    y, _ = wkv(w, u, k[:, 5:], v[:, 5:], split, return_state=True)
    for t in range(5):
        _, state = wkv_step(w, u, k[:, t], v[:, t], state)
    y_t, _ = wkv_step(w, u, k[:, 5], v[:, 5], state)
    for result in (y, y_t, split.num, split.den, state.num, state.den):
        assert result[..., 1].isnan().all()
        assert not result[..., 0].isnan().any()


def test_nan_rate_spoils_its_own_channel_only(implementation):
    case = make_case(0, 2, 20, 3, state=False)
    y, _ = values(replace(case, w=torch.tensor([0.5, torch.nan, 0.5])), implementation)
    assert y[:, 1:, 1].isnan().all()
    assert not y[..., [0, 2]].isnan().any()


@pytest.mark.parametrize("state", [False, True])
def test_absent_tokens_leave_everything_finite(implementation, state):
    case = make_case(0, 2, 37, 4, state=state)
    k = case.k.clone()
    k[0] = -torch.inf
    k[1, :20] = -torch.inf
    case = replace(case, k=k)
    results = run(wkv, case, implementation.device)
    assert_close(results, expected(case), ORDINARY[torch.float32], floor=1.0)
    if not state:
        assert (results.y[0] == 0).all()
        assert (results.gradients["v"][0] == 0).all()


@pytest.mark.parametrize("exponent", [-torch.inf, -1e38, -1e30, -65500.0])
def test_empty_states_of_other_packages_are_empty(implementation, exponent):
    case = make_case(0, 2, 20, 3, state=False)
    zeros = torch.zeros(2, 3, device=implementation.device)
    y, final = values(case, implementation)
    y_given, final_given = values(case, implementation, state=WKVState(zeros, zeros, zeros + exponent))
    torch.testing.assert_close(y_given, y, rtol=0, atol=0)
    assert_states_close(final_given, final, 5e-7)
    w, u, k, v, _, _ = case.arguments(implementation.device)
    y_0, _ = wkv_step(w, u, k[:, 0].detach(), v[:, 0].detach(), WKVState(zeros, zeros, zeros + exponent))
    torch.testing.assert_close(y_0, y[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("rate", [1.0, -3e38])
def test_unused_state_is_empty(implementation, rate):
    case = make_case(0, 2, 6, 3, state=False)
    case = replace(case, w=torch.full_like(case.w, rate), k=torch.full_like(case.k, -torch.inf))
    _, final = values(case, implementation)
    assert (final.num == 0).all()
    assert (final.den == 0).all()
    assert (final.max == -torch.inf).all()


@pytest.mark.parametrize("tokens", [2, 40])
def test_state_keeps_what_its_exponent_has_no_digits_for(implementation, tokens):
    # One key decays to e^-60. There an exponent alone is 2e-6 off, and a product of age and rate as much again.
    case = make_case(0, 1, tokens, 17, state=False)
    case = replace(case, w=torch.linspace(59, 61, 17).double() / (tokens - 1), k=torch.full_like(case.k, -torch.inf))
    case.k[:, 0] = 0
    _, final = values(case, implementation)
    exact = -(tokens - 1) * case.w.float().double()
    assert ((final.max.double() + final.den.double().log()).cpu() - exact).abs().max() <= 2e-7


@pytest.mark.parametrize("absent", [0, 1, 3])
@pytest.mark.parametrize("lengths", [None, [7, 4, 20]])
def test_learnable_state_of_zeros_gets_its_gradient(implementation, absent, lengths):
    # num = den = max = 0 weighs nothing, and yet y changes with num and den.
    case = make_case(1, 2, 31, 4, lengths=lengths)
    k = case.k.clone()
    k[:, :absent] = -torch.inf
    case = replace(case, k=k, initial=torch.zeros_like(case.initial))
    reference = expected(case)
    assert (reference.gradients["num"] != 0).all()
    assert_close(run(wkv, case, implementation.device), reference, ORDINARY[torch.float32], floor=1.0)


@pytest.mark.parametrize("absent", [1, 20])
def test_absent_tokens_after_an_empty_state_leave_every_gradient_finite(implementation, absent):
    # Unlike no state at all, one that is empty is an input, with gradients of its own: they are 0.
    case = make_case(1, 1, 24, 2)
    k = case.k.clone()
    k[:, :absent] = -torch.inf
    initial = torch.zeros_like(case.initial)
    initial[2] = -torch.inf
    case = replace(case, k=k, initial=initial)
    assert_close(run(wkv, case, implementation.device), expected(case), ORDINARY[torch.float32], floor=1.0)


@pytest.mark.parametrize("rate", [0.0, -0.3, -5.0, 1e-12, 200.0, 1e35, -1e35, 3e38, -3e38])
def test_any_finite_rate_is_legal(implementation, rate):
    case = make_case(0, 2, 40, 3, state=False)
    case = replace(case, w=torch.full((3,), rate, dtype=torch.float64))
    results, reference = run(wkv, case, implementation.device), expected(case)
    assert relative_error(results.y, reference.y) <= 5e-7
    for name in "kvu":
        assert relative_error(results.gradients[name], reference.gradients[name], floor=1.0) <= 2e-6, name
    assert results.gradients["w"].isfinite().all()


def test_nan_in_the_initial_state_comes_through(implementation):
    case = make_case(0, 1, 20, 3)
    for field in range(3):
        initial = case.initial.clone()
        initial[field, 0, 1] = torch.nan
        y, _ = values(replace(case, initial=initial), implementation)
        assert y[..., 1].isnan().all()
        assert not y[..., [0, 2]].isnan().any()


def test_steps_bear_large_values_as_the_sequence_does(implementation):
    k, v = torch.full((1, 10, 2), 60.0), torch.full((1, 10, 2), 1e12)
    zeros = torch.zeros(1, 2)
    w, u, k, v, zeros = (t.to(implementation.device) for t in (torch.full((2,), 0.1), torch.zeros(2), k, v, zeros))
    state = WKVState(zeros, zeros, zeros)
    for t in range(10):
        y, state = wkv_step(w, u, k[:, t], v[:, t], state)
        torch.testing.assert_close(y, v[:, t], rtol=1e-5, atol=0)


def test_state_of_no_weight_is_dropped(implementation):
    ones = torch.ones(1, 2, device=implementation.device)
    k = torch.full((1, 3, 2), -torch.inf, device=implementation.device)
    gone = WKVState(ones, ones, -torch.inf * ones)
    y, final = wkv(ones[0], ones[0], k, torch.ones_like(k), gone, return_state=True)
    y_t, final_t = wkv_step(ones[0], ones[0], k[:, 0], torch.ones_like(k[:, 0]), gone)
    for result in (y, y_t, final.num, final.den, final_t.num, final_t.den):
        assert (result == 0).all()
