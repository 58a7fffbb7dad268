"""Properties of fastwkv.wkv and fastwkv.wkv_step that hold for every implementation."""

from dataclasses import replace

import pytest
import torch
from comparison import assert_close, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from wkv_cases import (
    ORDINARY,
    assert_states_close,
    cases,
    expected,
    make_case,
    run,
    state_invariants,
    term_sizes,
    values,
)

from fastwkv import WKVState, wkv, wkv_step

EXAMPLES = settings(max_examples=20)
WIDE = (torch.float32, torch.float64)


@EXAMPLES
@given(case=cases())
def test_equals_reference_in_values_and_gradients(implementation, case):
    results = run(wkv, case, implementation.device)
    wanted, sizes = expected(case), term_sizes(case)
    wide = dict.fromkeys(("num", "den", "max", "mean", "log_weight"), ORDINARY[case.acc][1])
    assert results.y.dtype == case.dtype
    assert_close(results, wanted, ORDINARY[case.dtype], floor=1.0, w=torch.inf, u=torch.inf, **wide)
    for name, size in sizes.items():  # sums that may cancel
        error = (results.gradients[name].cpu() - wanted.gradients[name]).norm()
        assert error <= ORDINARY[case.acc][1] * (size.norm() + size.numel() ** 0.5)


@EXAMPLES
@given(case=cases(packed=False), data=st.data())
def test_whole_equals_any_split_with_carried_state(implementation, case, data):
    T = case.k.shape[1]
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, T - 1)), max_size=4)))
    y, final = values(case, implementation)
    pieces, state = [], case.arguments(implementation.device)[4]
    for begin, end in zip([0, *cuts], [*cuts, T], strict=True):
        if begin < end:
            piece = replace(case, k=case.k[:, begin:end], v=case.v[:, begin:end])
            y_piece, state = values(piece, implementation, state=state)
            pieces.append(y_piece)
    assert relative_error(torch.cat(pieces, 1), y, floor=1.0) <= ORDINARY[case.dtype][0]
    assert_states_close(state, final, ORDINARY[case.acc][0])


@EXAMPLES
@given(case=cases(packed=True))
def test_packed_equals_loop_over_sequences(implementation, case):
    y, final = values(case, implementation)
    for n, (begin, end) in enumerate(zip(case.bounds, case.bounds[1:], strict=False)):
        if begin == end:
            continue  # test_empty_sequences.py
        initial = None if case.initial is None else case.initial[:, n : n + 1]
        single = replace(case, k=case.k[:, begin:end], v=case.v[:, begin:end], initial=initial, cu_seqlens=None)
        y_single, final_single = values(single, implementation)
        assert relative_error(y[:, begin:end], y_single, floor=1.0) <= ORDINARY[case.dtype][0]
        assert_states_close(WKVState(*(s[n : n + 1] for s in final)), final_single, ORDINARY[case.acc][0])


@EXAMPLES
@given(case=cases(packed=False))
def test_steps_equal_sequence(implementation, case):
    y, final = values(case, implementation)
    w, u, k, v, state, _ = case.arguments(implementation.device)
    empty = torch.zeros(case.rows, case.k.shape[2], dtype=case.acc, device=implementation.device)
    state = state or WKVState(empty, empty, torch.full_like(empty, -torch.inf))
    outputs = []
    with torch.no_grad():
        for k_t, v_t in zip(k.unbind(1), v.unbind(1), strict=True):
            y_t, state = wkv_step(w, u, k_t, v_t, state)
            outputs.append(y_t)
    assert relative_error(torch.stack(outputs, 1), y, floor=1.0) <= ORDINARY[case.dtype][0]
    assert_states_close(state, final, ORDINARY[case.acc][0])


@EXAMPLES
@given(case=cases(dtypes=(torch.float32,)), shift=st.integers(-40, 40))
def test_constant_added_to_keys_changes_nothing(implementation, case, shift):
    k = (case.k * 256).round() / 256  # so that adding the integer is exact
    case = replace(case, k=k, initial=None)
    y, _ = values(case, implementation)
    y_shifted, _ = values(replace(case, k=k + shift), implementation)
    assert relative_error(y_shifted, y, floor=1.0) <= 5e-7


@EXAMPLES
@given(case=cases(dtypes=WIDE, packed=False))
def test_output_stays_within_range_of_past_values(implementation, case):
    y, _ = values(replace(case, initial=None), implementation)
    present = case.k > -torch.inf
    low = torch.where(present, case.v, torch.inf).cummin(1).values
    high = torch.where(present, case.v, -torch.inf).cummax(1).values
    y, some = y.double().cpu(), present.cummax(1).values
    slack = 4 * torch.finfo(case.dtype).eps * case.v.abs().max()
    assert ((y >= low - slack) & (y <= high + slack))[some].all()
    assert (y[~some] == 0).all()


@EXAMPLES
@given(case=cases(), seed=st.integers(0, 99))
def test_permuted_channels_permute_result(implementation, case, seed):
    order = torch.randperm(case.k.shape[2], generator=torch.Generator().manual_seed(seed))
    initial = None if case.initial is None else case.initial[..., order]
    y, final = values(case, implementation)
    permuted = replace(
        case, w=case.w[order], u=case.u[order], k=case.k[..., order], v=case.v[..., order], initial=initial
    )
    y_permuted, final_permuted = values(permuted, implementation)
    torch.testing.assert_close(y_permuted, y[..., order], rtol=0, atol=0)
    torch.testing.assert_close(final_permuted.den, final.den[:, order], rtol=0, atol=0)


@EXAMPLES
@given(case=cases(packed=False))
def test_permuted_batch_permutes_result(implementation, case):
    initial = None if case.initial is None else case.initial.flip(1)
    y, final = values(case, implementation)
    y_flipped, final_flipped = values(
        replace(case, k=case.k.flip(0), v=case.v.flip(0), initial=initial), implementation
    )
    torch.testing.assert_close(y_flipped, y.flip(0), rtol=0, atol=0)
    torch.testing.assert_close(final_flipped.num, final.num.flip(0), rtol=0, atol=0)


@EXAMPLES
@given(case=cases(packed=False), data=st.data())
def test_output_does_not_depend_on_the_future(implementation, case, data):
    T = case.k.shape[1]
    t = data.draw(st.integers(1, T))
    y, _ = values(case, implementation)
    y_start, _ = values(replace(case, k=case.k[:, :t], v=case.v[:, :t]), implementation)
    torch.testing.assert_close(y[:, :t], y_start, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_loss_on_final_state_alone_reaches_every_input(implementation, dtype):
    case = make_case(0, 2, 21, 3, dtype=dtype)
    w, u, k, v, state, _ = case.arguments(implementation.device)
    _, final = wkv(w, u, k, v, state, return_state=True)
    gradients = torch.autograd.grad(final.num.sum() + final.den.sum(), (w, k, v, *state))
    assert all(g.isfinite().all() and (g != 0).any() for g in gradients)


@pytest.mark.parametrize("which", ["w", "u", "k", "v", "num", "den", "max"])
def test_gradient_of_one_input_equals_that_among_all(implementation, which):
    case = make_case(0, 2, 21, 3)
    wanted = run(wkv, case, implementation.device).gradients[which]
    w, u, k, v, state, _ = case.arguments(implementation.device)
    leaves = {"w": w, "u": u, "k": k, "v": v, "num": state.num, "den": state.den, "max": state.max}
    only = {name: t if name == which else t.detach() for name, t in leaves.items()}

    def partial(w, u, k, v, state, **options):
        return wkv(only["w"], only["u"], only["k"], only["v"], WKVState(*list(only.values())[4:]), **options)

    y, final = partial(w, u, k, v, state, return_state=True)
    generator = torch.Generator().manual_seed(0)
    results = [y, *state_invariants(final).values()]
    loss = sum((r * torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r)).sum() for r in results)
    torch.testing.assert_close(torch.autograd.grad(loss, only[which])[0], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", [None, [3, 20, 1, 17]])
def test_two_runs_give_the_same_bits(implementation, lengths):
    case = make_case(0, 3, 41, 7, lengths=lengths)
    first, second = (run(wkv, case, implementation.device) for _ in range(2))
    assert first.y.equal(second.y)
    for name, gradient in first.gradients.items():
        assert gradient.equal(second.gradients[name]), name


def test_noncontiguous_inputs_just_work(implementation):
    case = make_case(0, 2, 12, 6)
    w, u, k, v, state, _ = case.arguments(implementation.device)
    y, final = wkv(w, u, k, v, state, return_state=True)
    gy = torch.randn_like(y)
    wanted = torch.autograd.grad((y * gy).sum() + final.num.sum(), (w, u, k, v))

    def strided(t):
        t = t.detach()
        wide = torch.stack((t, torch.full_like(t, torch.nan)), -1)
        return wide[..., 0].requires_grad_()

    w, u, k, v = (strided(t) for t in (w, u, k.mT, v))
    state = WKVState(*(strided(s.mT).mT for s in state))
    y_strided, final = wkv(w, u, k.mT, v, state, return_state=True)
    torch.testing.assert_close(y_strided, y, rtol=0, atol=0)
    gradients = torch.autograd.grad((y_strided * gy.mT.contiguous().mT).sum() + final.num.sum(), (w, u, k, v))
    for gradient, other in zip(gradients, (*wanted[:2], wanted[2].mT, wanted[3]), strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=0)


def test_expanded_gradient_of_a_sum_is_accepted(implementation):
    case = make_case(0, 2, 12, 6, state=False)
    w, u, k, v, _, _ = case.arguments(implementation.device)
    wkv(w, u, k, v).sum().backward()
    assert k.grad.isfinite().all()


@pytest.mark.parametrize("rates", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16, torch.float64])
def test_rates_and_streams_may_differ_in_dtype(implementation, rates, stream):
    case = make_case(0, 1, 20, 4, dtype=torch.bfloat16, state=False)
    device = implementation.device
    w, u = (t.to(device, rates).requires_grad_() for t in (case.w, case.u))
    k, v = (t.to(device, stream).requires_grad_() for t in (case.k, case.v))
    y, final = wkv(w, u, k, v, return_state=True)
    y.sum().backward()
    assert y.dtype == stream
    assert final.num.dtype == (torch.float64 if torch.float64 in (rates, stream) else torch.float32)
    assert [t.grad.dtype for t in (w, u, k, v)] == [rates, rates, stream, stream]


def test_step_is_differentiable(implementation):
    case = make_case(0, 2, 6, 3)
    w, u, k, v, state, _ = case.arguments(implementation.device)
    y, final = wkv(w, u, k, v, state, return_state=True)
    wanted = torch.autograd.grad(y.sum() + final.num.sum() + final.den.sum(), (w, u, k, v, *state))
    outputs, carried = [], state
    for t in range(6):
        y_t, carried = wkv_step(w, u, k[:, t], v[:, t], carried)
        outputs.append(y_t)
    # The scale of a state is free: compare sums at the scale of the other one.
    scale = torch.exp(carried.max - final.max).detach()
    loss = torch.stack(outputs).sum() + (scale * (carried.num + carried.den)).sum()
    for gradient, other in zip(torch.autograd.grad(loss, (w, u, k, v, *state)), wanted, strict=True):
        assert relative_error(gradient, other, floor=1.0) <= 2e-6


def test_second_derivative_raises(implementation):
    case = make_case(0, 1, 5, 2, state=False)
    w, u, k, v, _, _ = case.arguments(implementation.device)
    (gk,) = torch.autograd.grad(wkv(w, u, k, v).square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gk.sum().backward()


def test_second_derivative_among_others_raises(implementation):
    case = make_case(0, 1, 5, 2, state=False)
    w, u, k, v, _, _ = (t if t is None else t.detach() for t in case.arguments(implementation.device))
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.functional.hvp(lambda u: wkv(w, u, k, v).square().sum(), u, u)


def test_first_derivative_by_torch_func_is_the_same(implementation):
    case = make_case(0, 1, 5, 2, state=False)
    w, u, k, v, _, _ = case.arguments(implementation.device)
    (wanted,) = torch.autograd.grad(wkv(w, u, k, v).square().sum(), k)
    gradient = torch.func.grad(lambda k: wkv(w.detach(), u.detach(), k, v.detach()).square().sum())(k.detach())
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0)


def test_forward_mode_raises(implementation):
    case = make_case(0, 1, 5, 2, state=False)
    w, u, k, v, _, _ = (t if t is None else t.detach() for t in case.arguments(implementation.device))
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda k: wkv(w, u, k, v), (k,), (k,))


def test_no_graph_is_built_without_gradients(implementation):
    case = make_case(0, 1, 5, 2)
    w, u, k, v, state, _ = case.arguments(implementation.device)
    with torch.inference_mode():
        y, _ = wkv(w, u, k, v, state, return_state=True)
        y_t, _ = wkv_step(w, u, k[:, 0], v[:, 0], state)
    assert not y.requires_grad
    assert not y_t.requires_grad
