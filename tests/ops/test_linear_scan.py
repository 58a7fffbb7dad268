"""Properties of fastwkv.linear_scan and fastwkv.linear_scan_step that hold for every implementation."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from comparison import assert_close, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import COMPLEX, DTYPES, ORDINARY, cases, expected, make_case, run, values

from fastwkv import linear_scan, linear_scan_step, reference

EXAMPLES = settings(max_examples=12)
LENGTHS = [None, [5, 30, 12]]
# A state that is rounded at every token drifts from one that is not: over 40 tokens by as much as 5e-7 at |a| = 1.
STEPS = dict.fromkeys((torch.float32, torch.complex64), 1e-6) | dict.fromkeys((torch.float64, torch.complex128), 1e-14)
RADII = st.sampled_from(((0.3, 1.0), (0.9, 0.999), (1.0, 1.0)))


def bound(case) -> float:
    return case.allowed[case.dtype][0]


@settings(max_examples=30)
@given(case=cases())
def test_equals_reference_in_values_and_gradients(implementation, case):
    results = run(linear_scan, case, implementation.device)
    assert results.y.dtype == case.dtype
    assert results.state["final"].dtype == case.state_dtype
    wide = dict.fromkeys(("final", "initial"), case.allowed[case.state_dtype][1])
    if case.a.dim() == 1:  # a sum that may cancel: the next property measures it on the scale of its terms
        wide["a"] = torch.inf
    assert_close(results, expected(case), case.allowed[case.dtype], floor=1.0, **wide)


@EXAMPLES
@given(case=cases(dtypes=DTYPES, fixed=True))
def test_fixed_multiplier_equals_the_same_expanded(implementation, case):
    fixed = run(linear_scan, case, implementation.device)
    expanded = run(linear_scan, replace(case, a=case.a.expand(case.x.shape)), implementation.device)
    torch.testing.assert_close(fixed.y, expanded.y, rtol=0, atol=0)
    torch.testing.assert_close(fixed.gradients["x"], expanded.gradients["x"], rtol=0, atol=0)
    terms = expected(replace(case, a=case.a.expand(case.x.shape))).gradients["a"]
    error = (fixed.gradients["a"].to("cpu", terms.dtype) - terms.sum((0, 1))).norm()
    assert error <= case.allowed[case.dtype][1] * (terms.norm() + terms.sum((0, 1)).norm())


@EXAMPLES
@given(case=cases(packed=False), data=st.data())
def test_whole_equals_any_split_with_carried_state(implementation, case, data):
    T = case.x.shape[1]
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, max(1, T - 1)), max_size=4)) - {T}), T]
    h, final = values(linear_scan, case, implementation.device)
    pieces, state = {}, case.initial
    spans = list(pairwise(cuts))
    for begin, end in reversed(spans) if case.reverse else spans:
        a = case.a if case.a.dim() == 1 else case.a[:, begin:end]
        piece = replace(case, a=a, x=case.x[:, begin:end], initial=state)
        pieces[begin], state = values(linear_scan, piece, implementation.device)
    assert relative_error(torch.cat([pieces[begin] for begin, _ in spans], 1), h, floor=1.0) <= bound(case)
    assert relative_error(state, final, floor=1.0) <= case.allowed[case.state_dtype][0]


@EXAMPLES
@given(case=cases(packed=True))
def test_packed_equals_loop_over_sequences(implementation, case):
    h, final = values(linear_scan, case, implementation.device)
    for n, (begin, end) in enumerate(pairwise(case.bounds)):
        if begin == end:
            continue  # test_empty_sequences.py
        initial = None if case.initial is None else case.initial[n : n + 1]
        a = case.a if case.a.dim() == 1 else case.a[:, begin:end]
        single = replace(case, a=a, x=case.x[:, begin:end], initial=initial, cu_seqlens=None)
        h_single, final_single = values(linear_scan, single, implementation.device)
        assert relative_error(h[:, begin:end], h_single, floor=1.0) <= bound(case)
        assert relative_error(final[n : n + 1], final_single, floor=1.0) <= case.allowed[case.state_dtype][0]


@EXAMPLES
@given(case=RADII.flatmap(lambda radius: cases(packed=False, reverse=False, radius=radius)))
def test_steps_equal_sequence(implementation, case):
    h, final = values(linear_scan, case, implementation.device)
    a, x, state, _ = case.arguments(implementation.device)
    state = torch.zeros_like(final) if state is None else state
    outputs = []
    with torch.no_grad():
        for t in range(x.shape[1]):
            state = step(case, a if a.dim() == 1 else a[:, t], x[:, t], state)
            outputs.append(state)
    assert state.dtype == case.state_dtype
    assert relative_error(torch.stack(outputs, 1), h, floor=1.0) <= max(bound(case), STEPS[case.state_dtype])
    assert relative_error(state, final, floor=1.0) <= max(case.allowed[case.state_dtype][0], STEPS[case.state_dtype])


@EXAMPLES
@given(case=cases(packed=False, reverse=False, state=True))
def test_step_rounds_each_number_about_once(implementation, case):
    a, x, state, _ = (None if t is None else t.detach() for t in case.arguments(implementation.device))
    exact_a, exact_x, exact_state, _ = (None if t is None else t.detach() for t in case.arguments(exact=True))
    a, exact_a = (t if t.dim() == 1 else t[:, 0] for t in (a, exact_a))
    product = (exact_a.exp() if case.log else exact_a) * exact_state
    error = (step(case, a, x[:, 0], state).to("cpu", case.exact_dtype) - product - exact_x[:, 0]).abs()
    unit = torch.finfo(case.state_dtype).eps / 2
    if case.log and case.dtype.is_complex:  # e^{log a} is rounded: its phase and size each to a few units
        unit *= 3
    assert (error <= 3 * unit * (product.abs() + exact_x[:, 0].abs())).all()


def step(case, a, x, state):
    return linear_scan_step(None if case.log else a, x, state, log_a=a if case.log else None)


@EXAMPLES
@given(case=cases(packed=False))
def test_reverse_is_flip_scan_flip(implementation, case):
    a = case.a if case.a.dim() == 1 else case.a.flip(1)
    h, final = values(linear_scan, case, implementation.device)
    flipped = replace(case, a=a, x=case.x.flip(1), reverse=not case.reverse)
    h_flipped, final_flipped = values(linear_scan, flipped, implementation.device)
    torch.testing.assert_close(h_flipped.flip(1), h, rtol=0, atol=0)
    torch.testing.assert_close(final_flipped, final, rtol=0, atol=0)


@EXAMPLES
@given(case=cases(dtypes=(torch.float32, torch.complex64)), factor=st.sampled_from((-3.0, 0.7)))
def test_linear_in_x_and_state(implementation, case, factor):
    other = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1)).to(case.x)
    scale = 1 + case.x.abs().amax() + other.abs().amax()
    none = replace(case, x=other, initial=None)
    h, final = values(linear_scan, case, implementation.device)
    h_other, final_other = values(linear_scan, none, implementation.device)
    h_sum, final_sum = values(linear_scan, replace(case, x=case.x + factor * other), implementation.device)
    for result, first, second in ((h_sum, h, h_other), (final_sum, final, final_other)):
        assert relative_error(result, first + factor * second, floor=scale.item()) <= 5e-7


@EXAMPLES
@given(case=cases(dtypes=COMPLEX, log=False))
def test_conjugate_commutes(implementation, case):
    h, final = values(linear_scan, case, implementation.device)
    initial = None if case.initial is None else case.initial.conj()
    conjugated = replace(case, a=case.a.conj(), x=case.x.conj(), initial=initial)
    h_conjugated, final_conjugated = values(linear_scan, conjugated, implementation.device)
    torch.testing.assert_close(h_conjugated, h.conj(), rtol=0, atol=0)
    torch.testing.assert_close(final_conjugated, final.conj(), rtol=0, atol=0)


@EXAMPLES
@given(case=cases(dtypes=(torch.float32, torch.float64), log=False))
def test_complex_with_real_numbers_is_real(implementation, case):
    h, _ = values(linear_scan, case, implementation.device)
    wide = {torch.float32: torch.complex64, torch.float64: torch.complex128}[case.dtype]
    h_complex, _ = values(linear_scan, replace(case, dtype=wide), implementation.device)
    torch.testing.assert_close(h_complex.real, h, rtol=0, atol=0)
    assert (h_complex.imag == 0).all()


@EXAMPLES
@given(case=cases(dtypes=(torch.float32, torch.float64, *COMPLEX), log=True))
def test_log_multiplier_equals_its_exponential(implementation, case):
    logged, plain = (
        values(linear_scan, case, implementation.device),
        values(linear_scan, replace(case, a=case.a.exp(), log=False), implementation.device),
    )
    # At |a| = 1 a relative error of a, half a unit in its last place, counts as often as h remembers.
    allowed = 40 * torch.finfo(case.dtype).eps
    for result, wanted in zip(logged, plain, strict=True):
        assert relative_error(result, wanted, floor=1.0) <= allowed


@EXAMPLES
@given(case=cases(), seed=st.integers(0, 99))
def test_permuted_channels_permute_result(implementation, case, seed):
    order = torch.randperm(case.x.shape[2], generator=torch.Generator().manual_seed(seed))
    h, final = values(linear_scan, case, implementation.device)
    initial = None if case.initial is None else case.initial[:, order]
    permuted = replace(case, a=case.a[..., order], x=case.x[..., order], initial=initial)
    h_permuted, final_permuted = values(linear_scan, permuted, implementation.device)
    torch.testing.assert_close(h_permuted, h[..., order], rtol=0, atol=0)
    torch.testing.assert_close(final_permuted, final[:, order], rtol=0, atol=0)


@EXAMPLES
@given(case=cases(packed=False), data=st.data())
def test_output_does_not_depend_on_the_future(implementation, case, data):
    case = replace(case, reverse=False)
    t = data.draw(st.integers(1, case.x.shape[1]))
    h, _ = values(linear_scan, case, implementation.device)
    a = case.a if case.a.dim() == 1 else case.a[:, :t]
    h_start, _ = values(linear_scan, replace(case, a=a, x=case.x[:, :t]), implementation.device)
    torch.testing.assert_close(h[:, :t], h_start, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_loss_on_final_state_alone_reaches_every_input(implementation, dtype, lengths):
    case = make_case(0, 2, 47, 3, dtype=dtype, lengths=lengths, radius=(0.9, 1.0))
    given, x, initial, cut = case.arguments(implementation.device)
    _, final = linear_scan(given, x, initial, return_state=True, cu_seqlens=cut)
    gradients = torch.autograd.grad(final.abs().sum(), (given, x, initial))
    given, x, initial, cut = case.arguments(exact=True)
    _, final = reference.linear_scan(given, x, initial, return_state=True, cu_seqlens=cut)
    for gradient, wanted in zip(gradients, torch.autograd.grad(final.abs().sum(), (given, x, initial)), strict=True):
        assert relative_error(gradient, wanted, floor=0.1) <= max(ORDINARY[dtype][1], 1e-13)


@pytest.mark.parametrize("which", ["a", "x", "initial"])
@pytest.mark.parametrize("fixed", [False, True])
def test_gradient_of_one_input_equals_that_among_all(implementation, which, fixed):
    case = make_case(0, 2, 21, 3, dtype=torch.complex64, fixed=fixed)
    wanted = run(linear_scan, case, implementation.device).gradients[which]

    def partial(a, x, initial, **options):
        leaves = {"a": a, "x": x, "initial": initial}
        return linear_scan(*(t if name == which else t.detach() for name, t in leaves.items()), **options)

    given, x, initial, _ = case.arguments(implementation.device)
    outputs = partial(given, x, initial, return_state=True)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.complex128).to(o) for o in outputs]
    leaf = {"a": given, "x": x, "initial": initial}[which]
    torch.testing.assert_close(torch.autograd.grad(outputs, leaf, cotangents)[0], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_step_is_differentiable(implementation, dtype, log):
    case = make_case(0, 2, 6, 3, dtype=dtype, log=log)
    wanted = run(linear_scan, case, implementation.device)
    given, x, initial, _ = case.arguments(implementation.device)
    outputs, state = [], initial
    for t in range(6):
        gate = given[:, t]
        state = linear_scan_step(None if log else gate, x[:, t], state, log_a=gate if log else None)
        outputs.append(state)
    outputs = torch.stack(outputs, 1), state
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=case.exact_dtype).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, (given, x, initial), cotangents)
    for gradient, name in zip(gradients, ("a", "x", "initial"), strict=True):
        assert relative_error(gradient, wanted.gradients[name], floor=1.0) <= 6e-7


def test_first_derivative_by_torch_func_is_the_same(implementation):
    given, x, initial, _ = make_case(0, 1, 5, 2).arguments(implementation.device)
    (wanted,) = torch.autograd.grad(linear_scan(given, x, initial).square().sum(), x)
    a, x, initial = given.detach(), x.detach(), initial.detach()
    gradient = torch.func.grad(lambda x: linear_scan(a, x, initial).square().sum())(x)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0)


def test_hessian_vector_product_is_that_of_the_reference(implementation):
    a, x, initial, _ = (t if t is None else t.detach() for t in make_case(0, 1, 7, 2).arguments(exact=True))
    v = torch.randn(a.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = []
    for function in (linear_scan, reference.linear_scan):
        place = implementation.device if function is linear_scan else torch.device("cpu")
        x_there, initial_there = x.to(place), initial.to(place)
        loss = lambda a: function(a, x_there, initial_there).pow(3).sum()  # noqa: B023, E731
        products.append(torch.autograd.functional.hvp(loss, a.to(place), v.to(place))[1].cpu())
    torch.testing.assert_close(*products, rtol=1e-10, atol=1e-10)
