"""WKV with the decay rate as checkpoints store it, by its logarithm: w = exp(time_decay)."""

import math

import pytest
import torch
from comparison import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Implementation
from wkv_cases import DTYPES, cases, make_case

from fastwkv import WKVState, reference, wkv, wkv_step
from fastwkv.integrations._rwkv_forward import linear_attention
from fastwkv.integrations.blinkdl import RUN_CUDA, wkv_cuda
from fastwkv.nn import RWKV4, RWKV4Config

# Logarithms whose exponentials are 0, subnormal, small, beyond what kernels tell apart, and infinite.
ENDS = (
    -torch.inf,
    -1000.0,
    -110.0,
    -104.0,
    -103.0,
    -90.0,
    -3.0,
    2.0,
    30.0,
    66.0,
    70.0,
    88.7,
    89.0,
    100.0,
    1e4,
    torch.inf,
)


def results(function, time_decay, case, device="cpu", *, exact=False, by_rate=False):
    """y, final state and gradients of time_decay, u, k and v."""
    _, u, k, v, state, cut = case.arguments(device, exact=exact)
    time_decay = time_decay.to(device, copy=True).requires_grad_()
    given = {"w": time_decay.to(case.acc).exp()} if by_rate else {"time_decay": time_decay}
    y, final = function(u=u, k=k, v=v, initial_state=state, return_state=True, cu_seqlens=cut, **given)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(v.shape, generator=generator, dtype=torch.float64).to(device, y.dtype)
    loss = (y * weights).sum() + (final.num / final.den.clamp(min=1e-30)).sum()
    return y.detach(), final, torch.autograd.grad(loss, (time_decay, u, k, v))


@settings(max_examples=15)
@given(case=cases(max_tokens=20))
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_logarithm_gives_the_bits_of_the_rate(name, case):
    with Implementation(name) as implementation:
        time_decay = case.w.log().to(case.acc)
        y, final, gradients = results(wkv, time_decay, case, implementation.device)
        y_wanted, final_wanted, wanted = results(wkv, time_decay, case, implementation.device, by_rate=True)
    for actual, expected in zip((y, *final, *gradients), (y_wanted, *final_wanted, *wanted), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("time_decay_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exponential_is_taken_in_the_dtype_of_the_sums(implementation, dtype, time_decay_dtype):
    case = make_case(0, 2, 19, 5, dtype=dtype)
    time_decay = torch.linspace(-6, 2, 5, dtype=torch.float64).to(time_decay_dtype)
    sums = torch.float64 if torch.float64 in (dtype, time_decay_dtype) else torch.float32
    _, u, k, v, *_ = case.arguments(implementation.device)
    time_decay = time_decay.to(implementation.device).requires_grad_()
    rate = time_decay.detach().to(sums).exp().requires_grad_()
    y = wkv(None, u, k, v, time_decay=time_decay)
    y_wanted = wkv(rate, u, k, v)
    torch.testing.assert_close(y, y_wanted, rtol=0, atol=0)
    y.sum().backward()
    y_wanted.sum().backward()
    torch.testing.assert_close(time_decay.grad, (rate.grad * rate).detach().to(time_decay_dtype), rtol=0, atol=0)


@pytest.mark.parametrize("function", [reference.wkv, reference.wkv_loop])
def test_reference_takes_the_logarithm_too(function):
    case = make_case(0, 2, 9, 3, dtype=torch.float64)
    time_decay = case.w.log()
    y, _, gradients = results(function, time_decay, case)
    y_wanted, _, wanted = results(wkv, time_decay, case)
    for actual, expected in zip((y, *gradients), (y_wanted, *wanted), strict=True):
        assert relative_error(actual, expected) <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_right_at_both_ends(implementation, dtype):
    time_decay = torch.tensor(ENDS, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    case = make_case(0, 2, 19, len(ENDS), dtype=dtype, key_range=5.0)
    y, _, gradients = results(wkv, time_decay, case, implementation.device)
    y_wanted, _, wanted = results(reference.wkv_loop, time_decay.double(), case, exact=True)
    bound = {torch.float32: 2e-6, torch.float64: 1e-12}.get(dtype, 4e-3)
    for actual, expected in zip((y, *gradients), (y_wanted, *wanted), strict=True):
        assert actual.isfinite().all()
        assert relative_error(actual, expected) <= bound
    # What is 0 in float64 is 0; what is not is right on its own, where 32 bits can hold it.
    alone = wanted[0].abs() > 1e-36
    assert (gradients[0].cpu().double()[wanted[0] == 0] == 0).all()
    assert relative_error(gradients[0].cpu()[alone].double() / wanted[0][alone], torch.ones(int(alone.sum()))) <= 1e-3
    with torch.no_grad():
        _, u, k, v, state, _ = case.arguments(implementation.device)
        rest = wkv(None, u, k, v, state, time_decay=time_decay.to(implementation.device))
    torch.testing.assert_close(y, rest, rtol=0, atol=0)


@pytest.mark.parametrize("value", ENDS)
def test_absent_tokens_make_no_nan_at_either_end(implementation, value):
    case = make_case(0, 1, 9, 2)
    case.k[:, 3:6] = -torch.inf
    time_decay = torch.full((2,), value)
    y, _, gradients = results(wkv, time_decay, case, implementation.device)
    assert y.isfinite().all()
    assert not any(g.isnan().any() for g in gradients)


def test_nan_stays_in_its_channel_and_shows_in_its_gradient():
    case = make_case(0, 1, 9, 3)
    _, _, (gradient, *_) = results(wkv, torch.tensor([-1.0, torch.nan, 100.0]), case)
    assert gradient.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("differentiated", [False, True])
def test_step_takes_the_logarithm(implementation, dtype, differentiated):
    C = len(ENDS)
    case = make_case(0, 2, 1, C, dtype=dtype)
    time_decay = torch.tensor(ENDS, dtype=case.acc, device=implementation.device).requires_grad_(differentiated)
    with torch.set_grad_enabled(differentiated):
        _, u, k, v, state, _ = case.arguments(implementation.device)
        y, final = wkv_step(u=u, k_t=k[:, 0], v_t=v[:, 0], state=state, time_decay=time_decay)
        rate = time_decay.detach().exp()
        y_wanted, wanted = wkv_step(rate, u, k[:, 0], v[:, 0], state)
    torch.testing.assert_close((y, *final), (y_wanted, *wanted), rtol=0, atol=0)
    if differentiated:
        (y.sum() + final.num.sum() + final.den.sum()).backward()
        assert time_decay.grad.isfinite().all()
        assert time_decay.grad[ENDS.index(2.0)] != 0


@pytest.mark.unpoisoned
def test_compiled_and_exported_give_the_same():
    case = make_case(0, 2, 19, 3)
    time_decay = torch.tensor([-4.0, 0.5, 90.0])
    compiled = torch.compile(wkv, fullgraph=True)
    y, _, gradients = results(compiled, time_decay, case)
    y_wanted, _, wanted = results(wkv, time_decay, case)
    for actual, expected in zip((y, *gradients), (y_wanted, *wanted), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)

    class Mixer(torch.nn.Module):
        def forward(self, time_decay, u, k, v):
            return wkv(u=u, k=k, v=v, time_decay=time_decay)

    inputs = tuple(t.detach() for t in (time_decay, *case.arguments()[1:4]))
    exported = torch.export.export(Mixer(), inputs)
    torch.testing.assert_close(exported.module()(*inputs), wkv(None, *inputs[1:], time_decay=inputs[0]))


@given(value=st.floats(66.0, 1e6) | st.just(math.inf))
@settings(max_examples=10)
def test_rwkv4_that_forgets_at_once_has_gradients(value):
    model = RWKV4(RWKV4Config(layers=2, width=8, vocab_size=11))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(value) if name.endswith("time_decay") else parameter.normal_(0, 0.3)
    logits, _ = model(torch.arange(10).view(2, 5))
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if name.endswith("time_decay"):
            assert (parameter.grad == 0).all()


@pytest.mark.parametrize("value", [89.0, 1e4, math.inf])
def test_integrations_have_gradients_where_all_is_forgotten_at_once(value):
    case = make_case(0, 2, 7, 3)
    w = torch.tensor([-1.0, 0.5, value]).requires_grad_()
    _, u, k, v, state, _ = case.arguments()
    y, _ = linear_attention(w, u, k, v, list(state), True)
    (hugging_face,) = torch.autograd.grad(y.sum(), w)
    (blinkdl,) = torch.autograd.grad(RUN_CUDA(2, 7, 3, w, u, k, v).sum(), w)
    tensors = [t.detach() for t in (-w.exp(), u, k, v)]
    rows = [torch.empty(2, 3), torch.empty(2, 3), torch.empty_like(k), torch.empty_like(k)]
    wkv_cuda.backward(2, 7, 3, *tensors, torch.ones_like(k), *rows)
    for gradient in (hugging_face, blinkdl, rows[0].sum(0)):
        assert gradient.isfinite().all()
        assert gradient[2] == 0
        assert (gradient[:2] != 0).all()
    torch.testing.assert_close(rows[0].sum(0), blinkdl)


@pytest.mark.parametrize("given", [{}, {"w": torch.ones(3), "time_decay": torch.zeros(3)}])
def test_one_of_rate_and_logarithm_is_asked_for(given):
    k = torch.zeros(1, 2, 3)
    wanted = "give one of w and time_decay .*, got " + ("both" if given else "neither")
    with pytest.raises(TypeError, match=wanted):
        wkv(u=torch.ones(3), k=k, v=k, **given)
    empty = WKVState(*torch.zeros(3, 1, 3))
    with pytest.raises(TypeError, match=wanted):
        wkv_step(u=torch.ones(3), k_t=k[:, 0], v_t=k[:, 0], state=empty, **given)


def test_errors_name_the_logarithm():
    k = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"time_decay must be \[C\] = \[3\], got shape \[4\]"):
        wkv(None, torch.ones(3), k, k, time_decay=torch.ones(4))
    with pytest.raises(TypeError, match=r"time_decay must be float32.* got int64"):
        wkv(None, torch.ones(3), k, k, time_decay=torch.ones(3, dtype=torch.int64))
