"""Sequences without tokens, which padded offsets have: they pass on what they come with, and nobody else sees them."""

from dataclasses import replace

import pytest
import scan_cases
import torch
import wkv_cases
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, Implementation

from fastwkv import WKVState, linear_scan, reference, wkv

EXAMPLES = settings(max_examples=20)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with Implementation(request.param) as context:
        yield context


def without_empty(cut):
    """Return the offsets of the sequences that have tokens, and which those are."""
    kept = cut.diff() > 0
    return torch.cat((cut[:1], cut[1:][kept])), kept


def wkv_results(function, case, device, cotangents):
    w, u, k, v, state, cut = case.arguments(device)
    y, final = function(w, u, k, v, state, return_state=True, cu_seqlens=cut)
    gy, *gfinal = (t.to(device) for t in cotangents)
    # A sum over products, where 0 times the -inf of an empty state would be NaN: max has no part in it.
    loss = (y.double() * gy).sum() + sum((field * g).sum() for field, g in zip(final[:2], gfinal, strict=True))
    grads = torch.autograd.grad(loss, (w, u, k, v, *(state or ())))
    return y, final, grads[:4], grads[4:]


@EXAMPLES
@given(case=wkv_cases.cases(packed=True), padding=st.integers(0, 3), data=st.data())
def test_wkv_as_though_they_were_not_there(implementation, case, padding, data):
    cut = torch.cat((case.cu_seqlens, case.cu_seqlens[-1:].expand(padding)))
    more = None if case.initial is None else torch.cat((case.initial, case.initial[:, :1].expand(-1, padding, -1)), 1)
    case = replace(case, cu_seqlens=cut, initial=more)
    cut, kept = without_empty(cut)
    assume(not kept.all())
    fewer = replace(case, cu_seqlens=cut, initial=None if more is None else more[:, kept])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    gy, *gfinal = (torch.randn(t, generator=generator) for t in (case.k.shape, *[(case.rows, case.k.shape[2])] * 2))
    device = implementation.device

    y, final, gradients, ginitial = wkv_results(wkv, case, device, (gy, *gfinal))
    wanted = wkv_results(wkv, fewer, device, (gy, *(g[kept] for g in gfinal)))
    torch.testing.assert_close((y, *gradients), (wanted[0], *wanted[2]), rtol=0, atol=0)
    torch.testing.assert_close([f[kept] for f in final], list(wanted[1]), rtol=0, atol=0)
    torch.testing.assert_close([g[kept] for g in ginitial], list(wanted[3]), rtol=0, atol=0)

    empty = ~kept
    if more is None:
        assert not final.num[empty].any()
        assert not final.den[empty].any()
        assert (final.max[empty] == -torch.inf).all()
    else:
        torch.testing.assert_close(torch.stack(final)[:, empty].cpu().double(), more[:, empty], rtol=0, atol=0)
        gnum, gden, gmax = (g[empty].cpu().double() for g in ginitial)
        num, den, _ = more[:, empty]
        torch.testing.assert_close(gnum, gfinal[0][empty].double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gden, gfinal[1][empty].double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gmax, gnum * num + gden * den, rtol=1e-5, atol=1e-6)


def scan_results(case, device, gh, gfinal):
    given, x, initial, cut = case.arguments(device)
    options = case.options(given)
    first = None if case.log else given
    h, final = linear_scan(first, x, initial, return_state=True, cu_seqlens=cut, **options)
    inputs = (given, x) if initial is None else (given, x, initial)
    return h, final, *torch.autograd.grad((h, final), inputs, (gh.to(h), gfinal.to(final)))


@EXAMPLES
@given(case=scan_cases.cases(packed=True), padding=st.integers(0, 3), seed=st.integers(0, 99))
def test_linear_scan_as_though_they_were_not_there(implementation, case, padding, seed):
    cut = torch.cat((case.cu_seqlens, case.cu_seqlens[-1:].expand(padding)))
    more = None if case.initial is None else torch.cat((case.initial, case.initial[:1].expand(padding, -1)))
    case = replace(case, cu_seqlens=cut, initial=more)
    cut, kept = without_empty(cut)
    assume(not kept.all())
    fewer = replace(case, cu_seqlens=cut, initial=None if more is None else more[kept])
    generator = torch.Generator().manual_seed(seed)
    gh = torch.randn(case.x.shape, generator=generator, dtype=case.exact_dtype)
    gfinal = torch.randn((case.rows, case.x.shape[2]), generator=generator, dtype=case.exact_dtype)

    h, final, ga, gx, *ginitial = scan_results(case, implementation.device, gh, gfinal)
    wanted = scan_results(fewer, implementation.device, gh, gfinal[kept])
    torch.testing.assert_close((h, final[kept], ga, gx), wanted[:4], rtol=0, atol=0)
    torch.testing.assert_close([g[kept] for g in ginitial], list(wanted[4:]), rtol=0, atol=0)
    nothing = torch.zeros_like(final[~kept])
    torch.testing.assert_close(final[~kept], nothing if more is None else more[~kept].to(final), rtol=0, atol=0)
    for g in ginitial:
        torch.testing.assert_close(g[~kept], gfinal[~kept].to(g), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "reverse"), [(torch.float64, False), (torch.complex128, True)])
@pytest.mark.parametrize(("fixed", "log"), [(True, False), (False, True)])
def test_derivatives_of_every_order_go_through(dtype, reverse, fixed, log):
    case = scan_cases.make_case(
        0, 1, 0, 1, dtype=dtype, fixed=fixed, log=log, reverse=reverse, lengths=[0, 2, 0, 0, 1, 0]
    )
    given, x, initial, cut = case.arguments()

    def function(given, x, initial):
        first = None if log else given
        return linear_scan(first, x, initial, return_state=True, cu_seqlens=cut, **case.options(given))

    assert torch.autograd.gradcheck(function, (given, x, initial), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (given, x, initial))


@pytest.mark.parametrize("function", [reference.wkv, reference.wkv_loop, wkv])
def test_exponent_of_a_state_that_goes_through_is_a_constant(function):
    state = WKVState(*(torch.full((2, 3), x, dtype=torch.float64, requires_grad=True) for x in (0.3, 0.5, 0.7)))
    w = torch.ones(3, dtype=torch.float64)
    k = torch.zeros(1, 4, 3, dtype=torch.float64)
    _, final = function(w, w, k, k, state, return_state=True, cu_seqlens=torch.tensor([0, 4, 4]))
    gnum, gden, gmax = torch.autograd.grad(final.num[1].sum() + 2 * final.den[1].sum(), tuple(state))
    for gradient, value in ((gnum, 1.0), (gden, 2.0), (gmax, 0.3 + 2 * 0.5)):
        torch.testing.assert_close(gradient[1], torch.full_like(gradient[1], value), rtol=1e-12, atol=0)
        assert not gradient[0].any()


def test_mapped_axes_go_through():
    cut = torch.tensor([0, 0, 3, 3, 7, 7])
    generator = torch.Generator().manual_seed(0)
    w, k, v, u = (
        torch.randn(shape, generator=generator).double() for shape in ((3,), (2, 1, 7, 3), (2, 1, 7, 3), (2, 3))
    )
    fields = torch.randn(2, 3, 5, 3, generator=generator).double().abs()

    def call_wkv(k, v, u, fields):
        y, final = wkv(w.abs(), u, k, v, WKVState(*fields), return_state=True, cu_seqlens=cut)
        return y.square().sum() + (final.num * final.den).sum()

    def call_scan(k, v, u, fields):
        h, final = linear_scan(u.sigmoid(), k, fields[0], return_state=True, cu_seqlens=cut)
        return (h * v).sum() + final.square().sum()

    for call in (call_wkv, call_scan):
        gradient = torch.func.grad(call, argnums=(0, 2, 3))
        together = torch.vmap(gradient)(k, v, u, fields)
        alone = [gradient(k[i], v[i], u[i], fields[i]) for i in range(2)]
        for found, *single in zip(together, *alone, strict=True):
            torch.testing.assert_close(found, torch.stack(single), rtol=1e-12, atol=1e-12)
