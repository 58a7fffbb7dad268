"""Complex numbers as pairs of real ones, which may have 16 bits, beside a complex multiplier."""

from dataclasses import replace

import pytest
import torch
from comparison import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import ORDINARY, cases, make_case

from fastwkv import linear_scan, linear_scan_step, reference

EXAMPLES = settings(max_examples=12)
HALF = (torch.bfloat16, torch.float16)
OF_PAIRS = st.sampled_from((*HALF, torch.float32))
LENGTHS = [5, 30, 12]


def complex_cases(**options):
    return cases(dtypes=(torch.complex64,), **options)


def pairs_of(t, dtype):
    return torch.view_as_real(t).to(dtype)


def numbers(t):
    return torch.view_as_complex(t.detach().cpu().double())


def run(case, dtype, device, function=linear_scan, *, wide=None):
    """h, final state and gradients with x and the gradient of h rounded to ``dtype``, and computed as ``wide``."""
    a, x, initial, cut = case.arguments(device, exact=wide is not None)
    x = pairs_of(x.detach(), dtype).to(wide or dtype).requires_grad_()
    options = case.options(a)
    h, final = function(None if case.log else a, x, initial, return_state=True, cu_seqlens=cut, **options)
    generator = torch.Generator().manual_seed(0)
    gh = torch.randn(h.shape, generator=generator).to(dtype).to(h)
    gfinal = torch.randn(final.shape, dtype=torch.complex64, generator=generator).to(final)
    leaves = [a, x] + ([] if initial is None else [initial])
    return h, final, *torch.autograd.grad((h, final), leaves, (gh, gfinal))


@settings(max_examples=24)
@given(case=complex_cases(), dtype=OF_PAIRS)
def test_equals_reference_in_values_and_gradients(implementation, case, dtype):
    h, final, ga, gx, *ginitial = run(case, dtype, implementation.device)
    assert h.dtype == gx.dtype == dtype
    assert final.dtype == ga.dtype == torch.complex64
    wanted = run(case, dtype, "cpu", reference.linear_scan, wide=torch.float64)
    allowed, wide = ORDINARY[dtype], case.allowed[torch.complex64]
    assert relative_error(numbers(h), numbers(wanted[0]), floor=1.0) <= max(allowed[0], wide[0])
    assert relative_error(final, wanted[1], floor=1.0) <= wide[0]
    assert relative_error(numbers(gx), numbers(wanted[3]), floor=1.0) <= max(allowed[1], wide[1])
    for result, right in zip(ginitial, wanted[4:], strict=True):
        assert relative_error(result, right, floor=1.0) <= wide[1]
    if case.a.dim() == 3:  # the gradient of a reads h as it was rounded
        assert relative_error(ga, wanted[2], floor=1.0) <= max(allowed[1], wide[1])


@pytest.mark.parametrize("dtype", HALF)
def test_gradient_of_a_fixed_multiplier_is_that_of_complex64(implementation, dtype):
    case = make_case(0, 2, 200, 5, dtype=torch.complex64, fixed=True, radius=(0.9, 0.999))
    ga = run(case, dtype, implementation.device)[2]
    wanted = run(case, dtype, "cpu", reference.linear_scan, wide=torch.float64)[2]
    assert relative_error(ga, wanted) <= ORDINARY[dtype][1]


@EXAMPLES
@given(case=complex_cases(packed=True), dtype=st.sampled_from(HALF))
def test_packed_equals_loop_over_sequences(implementation, case, dtype):
    a, x, initial, cut = (None if t is None else t.detach() for t in case.arguments(implementation.device))
    x, options = pairs_of(x, dtype), {"return_state": True, "reverse": case.reverse}

    def scan(a, *inputs, **more):
        log = {"log_a": a} if case.log else {}
        return linear_scan(None if case.log else a, *inputs, **log, **options, **more)

    h, final = scan(a, x, initial, cu_seqlens=cut)
    for n, (begin, end) in enumerate(zip(case.bounds, case.bounds[1:], strict=False)):
        if begin == end:
            assert torch.equal(final[n], torch.zeros_like(final[n]) if initial is None else initial[n])
            continue
        gate = a if a.dim() == 1 else a[:, begin:end]
        alone, state = scan(gate, x[:, begin:end], None if initial is None else initial[n : n + 1])
        assert relative_error(numbers(h[:, begin:end]), numbers(alone), floor=1.0) <= ORDINARY[dtype][0]
        assert relative_error(final[n : n + 1], state, floor=1.0) <= case.allowed[torch.complex64][0]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_steps_equal_sequence(implementation, dtype):
    case = make_case(0, 2, 40, 5, dtype=torch.complex64, fixed=True)
    a, x, state, _ = (None if t is None else t.detach().to(implementation.device) for t in case.arguments())
    x = pairs_of(x, dtype)
    h, final = linear_scan(a, x, state, return_state=True)
    for t in range(x.shape[1]):
        state = linear_scan_step(a, x[:, t], state)
        assert relative_error(state, numbers(h[:, t])) <= max(1e-6, 2 * ORDINARY[dtype][0])
    assert state.dtype == torch.complex64
    assert relative_error(state, final) <= 1e-6


@pytest.mark.parametrize("dtype", HALF)
def test_sums_in_32_bits_whatever_the_pairs_have(implementation, dtype):
    # In 16 bits 2048 + 1 is 2048.
    x = torch.ones(1, 20, 3, 2, dtype=dtype, device=implementation.device)
    a = torch.ones(3, dtype=torch.complex64, device=implementation.device)
    _, final = linear_scan(a, x, torch.full_like(a, 2048 * (1 + 1j))[None], return_state=True)
    assert (final == 2068 * (1 + 1j)).all()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_step_is_differentiable(implementation, dtype, log):
    case = make_case(0, 2, 4, 3, dtype=torch.complex64, log=log)
    wanted = run(case, dtype, "cpu", reference.linear_scan, wide=torch.float64)[2:]
    a, x, initial, _ = case.arguments(implementation.device)
    x, state, outputs = pairs_of(x.detach(), dtype).requires_grad_(), initial, []
    for t in range(4):
        gate = {"log_a": a[:, t]} if log else {}
        state = linear_scan_step(None if log else a[:, t], x[:, t], state, **gate)
        outputs.append(torch.view_as_real(state).to(dtype))
    generator = torch.Generator().manual_seed(0)  # as in run
    cotangents = [torch.randn(2, 4, 3, 2, generator=generator).to(x)]
    cotangents.append(torch.randn(2, 3, dtype=torch.complex64, generator=generator).to(state))
    gradients = torch.autograd.grad((torch.stack(outputs, 1), state), (a, x, initial), cotangents)
    assert gradients[1].dtype == dtype
    for gradient, want in zip(gradients, wanted, strict=True):
        gradient, want = (t if t.is_complex() else numbers(t) for t in (gradient, want))
        assert relative_error(gradient, want, floor=1.0) <= (ORDINARY[dtype][1] if gradient.dim() == 3 else 1e-6)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_a_multiplier_of_double_precision_makes_sums_so_and_no_pairs(implementation, dtype):
    case = make_case(0, 2, 20, 3, dtype=torch.complex128)
    h, final, ga, gx, ginitial = run(case, dtype, implementation.device)
    assert h.dtype == gx.dtype == dtype
    assert final.dtype == ga.dtype == ginitial.dtype == torch.complex128
    wanted = run(case, dtype, "cpu", reference.linear_scan, wide=torch.float64)
    unit = torch.finfo(dtype).eps / 2
    for result, right, allowed in zip((h, final, ga, gx, ginitial), wanted, (unit, 0, 0, unit, 0), strict=True):
        result, right = (t if t.is_complex() else numbers(t) for t in (result, right))
        assert relative_error(result, right) <= allowed + 1e-14
    a, x, state, _ = (None if t is None else t.detach() for t in case.arguments(implementation.device))
    step = linear_scan_step(a[:, 0], pairs_of(x, dtype)[:, 0], state)
    assert relative_error(step, a[:, 0] * state + numbers(pairs_of(x, dtype)[:, 0]).to(state.device)) <= 1e-15


def test_overflow_of_float16_stays_in_its_channel_and_out_of_the_state(implementation):
    case = make_case(0, 2, 37, 3, dtype=torch.complex64, radius=(0.9, 0.99))
    far = replace(case, x=case.x.clone())
    far.x[1, 19, 2] = far.x[1, 20, 2] = 60_000  # h is infinite for some tokens from the second on, then finite
    far.a[1, 20, 2] = 1
    (h, final, ga, gx, ginitial), near = (run(c, torch.float16, implementation.device) for c in (far, case))
    exact = run(far, torch.float16, "cpu", reference.linear_scan, wide=torch.float64)
    infinite = h.isinf().any(-1)
    assert infinite.cpu().equal((exact[0].abs() > 65519).any(-1))  # what is rounded to more than the largest, 65504
    assert 1 <= infinite.sum() < 17
    assert relative_error(final, exact[1]) <= 1e-6
    torch.testing.assert_close(gx, near[3], rtol=0, atol=0)
    torch.testing.assert_close(ginitial, near[4], rtol=0, atol=0)
    # The gradient of a reads h as it was written, of the token before.
    assert ga.isfinite()[:, 1:].logical_not().equal(infinite[:, :-1])


@pytest.mark.parametrize("dtype", HALF)
def test_backward_keeps_half_of_what_complex64_keeps(dtype):
    case = make_case(0, 2, 64, 32, dtype=torch.complex64, fixed=True, state=False)
    kept = []
    a, x, *_ = case.arguments()
    for held in (x, pairs_of(x.detach(), dtype).requires_grad_()):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            linear_scan(a, held)
        kept.append(sum(sizes) - a.nbytes)
    assert kept == [8 * x.numel(), 4 * x.numel()]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_second_derivatives_equal_those_of_complex_numbers(lengths):
    case = make_case(0, 2, 9, 3, dtype=torch.complex64, lengths=lengths)

    def second(dtype):
        a, x, initial, cut = case.arguments()
        x = pairs_of(x.detach(), torch.bfloat16).to(dtype).requires_grad_()
        h = linear_scan(a, x, initial, cu_seqlens=cut)
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(h.shape, generator=generator).bfloat16().to(dtype)
        gradients = torch.autograd.grad(h, [a, x, initial], cotangent, create_graph=True)
        loss = sum(
            torch.view_as_real(g).square().sum() if g.is_complex() else g.float().square().sum() for g in gradients
        )
        return torch.autograd.grad(loss, [a, x, initial])

    for result, wanted in zip(second(torch.bfloat16), second(torch.float32), strict=True):
        result, wanted = (t if t.is_complex() else numbers(t) for t in (result, wanted))
        assert relative_error(result, wanted) <= 1e-2  # the first gradients were rounded, and are squared here


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tangents_equal_those_of_complex_numbers(dtype):
    case = make_case(0, 2, 9, 3, dtype=torch.complex64, fixed=True)
    a, x, initial, _ = (None if t is None else t.detach() for t in case.arguments())
    x = pairs_of(x, torch.bfloat16)
    tangents = [torch.randn_like(a), torch.randn_like(x), torch.randn_like(initial)]

    def tangent(dtype, state):
        inputs, along = [a, x.to(dtype), initial.to(state)], [tangents[0], tangents[1].to(dtype), tangents[2].to(state)]
        return torch.func.jvp(lambda *t: linear_scan(*t), tuple(inputs), tuple(along))[1]

    result = tangent(dtype, torch.complex128 if dtype == torch.float64 else torch.complex64)
    assert result.dtype == dtype
    assert (
        relative_error(numbers(result), numbers(tangent(torch.float32, torch.complex64))) <= ORDINARY[dtype][1] + 1e-6
    )


@pytest.mark.unpoisoned  # inductor fails to compile custom operators in deterministic mode
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_opcheck_and_compilation_pass(implementation, lengths):
    torch.compiler.reset()
    case = make_case(0, 2, 19, 3, dtype=torch.complex64, fixed=True, lengths=lengths)
    a, x, initial, cut = (None if t is None else t.detach() for t in case.arguments(implementation.device))
    x = pairs_of(x, torch.bfloat16)
    torch.library.opcheck(torch.ops.fastwkv.linear_scan_fwd.default, (a, x, initial, cut, False, False))
    h, final = torch.ops.fastwkv.linear_scan_fwd(a, x, initial, cut, False, False)
    backward = (a, h, initial, cut, False, False, torch.randn_like(h), torch.randn_like(final), h.dtype)
    torch.library.opcheck(torch.ops.fastwkv.linear_scan_bwd.default, backward)
    torch.library.opcheck(torch.ops.fastwkv.linear_scan_bwd_.default, backward[:-1])
    step = (a, x[:, 0].contiguous(), torch.randn_like(initial[: x.shape[0]]), False)
    torch.library.opcheck(torch.ops.fastwkv.linear_scan_step.default, step)
    compiled = torch.compile(linear_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, x, initial, cu_seqlens=cut), h, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pairs_that_are_views_just_work(implementation, dtype):
    case = make_case(0, 2, 19, 6, dtype=torch.complex64, fixed=True)
    a, x, *_ = (None if t is None else t.detach() for t in case.arguments(implementation.device))
    x = pairs_of(x, dtype)
    wanted = linear_scan(a[::2].contiguous(), x[:, :, ::2].contiguous())
    torch.testing.assert_close(linear_scan(a[::2], x[:, :, ::2]), wanted, rtol=0, atol=0)
    halves = torch.stack((x[..., 0], x[..., 1])).movedim(0, -1)  # parts far from each other
    wanted = linear_scan(a, x)
    torch.testing.assert_close(linear_scan(a, halves), wanted, rtol=0, atol=0)
    h = linear_scan(a, leaf := x.clone().requires_grad_())
    (gx,), (gx_halves,) = (torch.autograd.grad(h, leaf, g, retain_graph=True) for g in (x, halves))
    torch.testing.assert_close(gx_halves, gx, rtol=0, atol=0)
    first = linear_scan_step(a, halves[:, 0], torch.zeros_like(a).expand(2, -1))
    torch.testing.assert_close(torch.view_as_real(first).to(dtype), wanted[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("a", "shape", "message"),
    [
        (torch.ones(4), (2, 6, 4, 2), r"x must be \[B, T, C\], got shape \[2, 6, 4, 2\]"),
        (
            torch.ones(4) + 0j,
            (2, 6, 4, 3),
            r"x must be \[B, T, C\], or real pairs \[B, T, C, 2\] beside a complex",
        ),
        (torch.ones(5) + 0j, (2, 6, 4, 2), r"a must be \[C\] = \[4\], got shape \[5\]"),
    ],
)
def test_what_cannot_be_pairs_is_named(a, shape, message):
    with pytest.raises(ValueError, match=message):
        linear_scan(a, torch.zeros(shape))


def test_complex_pairs_are_refused():
    with pytest.raises(ValueError, match="or real pairs"):
        linear_scan(torch.ones(4) + 0j, torch.zeros(2, 6, 4, 2) + 0j)
    with pytest.raises(ValueError, match=r"x_t must be \[B, C\], or real pairs \[B, C, 2\] beside a complex a_t"):
        linear_scan_step(torch.ones(4) + 0j, torch.zeros(2, 4, 3), torch.zeros(2, 4) + 0j)
