"""Views, dtypes and what else callers hand to the linear scan, for every implementation."""

from dataclasses import replace

import pytest
import torch
from comparison import relative_error
from scan_cases import DTYPES, ORDINARY, REAL, make_case, run

from fastwkv import linear_scan, linear_scan_step, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("lengths", [None, [3, 20, 1, 17]])
def test_two_runs_give_the_same_bits(implementation, lengths, fixed, dtype):
    case = make_case(0, 3, 41, 7, dtype=dtype, fixed=fixed, lengths=lengths)
    first, second = (run(linear_scan, case, implementation.device) for _ in range(2))
    assert first.y.equal(second.y)
    for name, gradient in first.gradients.items():
        assert gradient.equal(second.gradients[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_views_just_work(implementation, dtype):
    # Strided, and for complex numbers conjugated in name only; the gradient comes back so too.
    case = make_case(0, 2, 12, 6, dtype=dtype)
    wanted = run(linear_scan, case, implementation.device)

    def view(t):
        wide = torch.stack((t.detach().conj().resolve_conj(), torch.full_like(t, torch.nan)), -1).requires_grad_()
        return wide, wide[..., 0].conj()

    given, x, initial, _ = case.arguments(implementation.device)
    (wide_a, a), (wide_x, x), (wide_initial, initial) = view(given), view(x), view(initial)
    outputs = linear_scan(a, x, initial, return_state=True)
    torch.testing.assert_close(outputs[0], wanted.y, rtol=0, atol=0)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=case.exact_dtype).to(o) for o in outputs]
    cotangents = [c.conj().resolve_conj().conj().mT.contiguous().mT for c in cotangents]
    gradients = torch.autograd.grad(outputs, (wide_a, wide_x, wide_initial), cotangents)
    for gradient, name in zip(gradients, ("a", "x", "initial"), strict=True):
        torch.testing.assert_close(gradient[..., 0].conj().resolve_conj(), wanted.gradients[name], rtol=0, atol=0)


def test_real_view_of_a_conjugate_has_its_sign(implementation):
    z = torch.randn(2, 9, 3, dtype=torch.complex64, device=implementation.device).conj()
    x = z.imag  # negative in name only
    assert x.is_neg()
    a = torch.full((3,), 0.5, device=implementation.device)
    torch.testing.assert_close(linear_scan(a, x), linear_scan(a, x.clone().contiguous()), rtol=0, atol=0)


def test_expanded_gradient_of_a_sum_is_accepted(implementation):
    given, x, initial, _ = make_case(0, 2, 12, 6).arguments(implementation.device)
    linear_scan(given, x, initial).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("a_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_multiplier_and_input_may_differ_in_dtype(implementation, a_dtype, x_dtype, fixed):
    case = make_case(0, 2, 20, 4, dtype=torch.bfloat16, fixed=fixed, state=False)
    case = replace(case, x=case.x.to(x_dtype), a=case.a.to(a_dtype))
    a, x = (t.to(implementation.device, copy=True).requires_grad_() for t in (case.a, case.x))
    h, final = linear_scan(a, x, return_state=True)
    dtype = torch.promote_types(a_dtype, x_dtype)
    assert h.dtype == dtype
    assert final.dtype == torch.promote_types(dtype, torch.float32)
    assert [g.dtype for g in torch.autograd.grad(h.abs().sum() + final.abs().sum(), (a, x))] == [a_dtype, x_dtype]
    exact = torch.complex128 if dtype.is_complex else torch.float64
    wanted = reference.linear_scan(case.a.to(exact), case.x.to(exact))
    assert relative_error(h, wanted) <= ORDINARY[dtype][0]


@pytest.mark.parametrize("fixed", [False, True])
def test_real_input_of_a_complex_multiplier_gets_the_real_part(implementation, fixed):
    a = make_case(0, 2, 20, 4, dtype=torch.complex64, fixed=fixed).a
    x = make_case(1, 2, 20, 4).x
    results = []
    for function, real, whole in (
        (linear_scan, torch.float32, torch.complex64),
        (reference.linear_scan, torch.float64, torch.complex128),
    ):
        leaves = a.to(whole).requires_grad_(), x.to(real).requires_grad_()
        leaves = tuple(t.detach().to(implementation.device, copy=True).requires_grad_() for t in leaves)
        h = function(*leaves)
        results.append((h.detach(), *torch.autograd.grad((h * h.conj()).real.sum(), leaves)))
    assert results[0][2].dtype == torch.float32
    for result, wanted in zip(*results, strict=True):
        assert relative_error(result, wanted) <= 6e-7


@pytest.mark.parametrize("x_dtype", REAL)
@pytest.mark.parametrize("a_dtype", [torch.float32, torch.bfloat16])
def test_step_takes_what_the_sequence_takes(implementation, a_dtype, x_dtype):
    a = torch.rand(5, device=implementation.device).to(a_dtype)
    x = torch.randn(3, 5, device=implementation.device).to(x_dtype)
    state = torch.randn(3, 5, device=implementation.device, dtype=torch.promote_types(x_dtype, torch.float32))
    _, wanted = linear_scan(a, x[:, None], state, return_state=True)
    torch.testing.assert_close(linear_scan_step(a, x, state), wanted, rtol=3e-7, atol=1e-7)


def test_no_graph_is_built_without_gradients(implementation):
    given, x, initial, _ = make_case(0, 1, 5, 2).arguments(implementation.device)
    with torch.inference_mode():
        h = linear_scan(given, x, initial)
        h_t = linear_scan_step(given[:, 0], x[:, 0], initial)
    assert not h.requires_grad
    assert not h_t.requires_grad
