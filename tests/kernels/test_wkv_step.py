"""One token of WKV on a GPU, in thousands of channels at once: what one step loses, thousands would add up."""

import numpy as np
import pytest
import torch
from implementations import Implementation

B, C = 4, 1024
FINE = 2.0**-7  # a scale that stays


def uniform(seed: int, low: float, high: float, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)).float()


def step(*inputs):
    """Return y and num, den, max of the state after one token: of w, u, k, v, num, den, max."""
    with Implementation("triton") as context:
        y, state = context.launcher("wkv_step")(*(t.to(context.device) for t in inputs))
    return [t.cpu() for t in (y, *state)]


def exact(w, u, k, v, num, den, scale):
    """Return y, mean and logarithm of the weight of the state after one token."""
    w, u, k, v, num, den, scale = (t.double() for t in (w, u, k, v, num, den, scale))
    results = []
    for past, now in ((scale, u + k), (scale - w, k)):
        top = torch.maximum(past, now)
        past, now = (past - top).exp(), (now - top).exp()
        total = den * past + now
        results += [(num * past + v * now) / total, top + total.log()]
    y, _, mean, log_weight = results
    return y, mean, log_weight


def errors(inputs):
    """Return the errors of y, of the mean and of the weight, of which nothing cancels, relative to them."""
    wanted_y, wanted_mean, wanted = exact(*inputs)
    y, num, den, scale = (t.double() for t in step(*inputs))
    return y / wanted_y - 1, num / den / wanted_mean - 1, scale + den.log() - wanted


def random_inputs(seed, scales=60.0, keys=60.0, values=2.0, weights=40.0):
    """Every kind of past: light and heavy, of any scale. Values are positive, so that nothing cancels."""
    w, u = uniform(seed, -12, 3, C).exp(), uniform(seed + 1, -5, 5, C)
    k, scale = uniform(seed + 2, -keys, keys, B, C), uniform(seed + 3, -scales, scales, B, C)
    v, mean = uniform(seed + 4, -2, values, B, C).exp(), uniform(seed + 5, -2, 2, B, C).exp()
    den = uniform(seed + 6, -weights, weights, B, C).exp()
    return w, u, k, v, mean * den, den, scale


@pytest.fixture
def rough_exponential(monkeypatch):
    """Have interpreted kernels take exponentials as a GPU does, which rounds x log2 e and promises 22 bits of 2^x."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder

    def exp2(self, x):
        result = np.exp2(x.data)
        below = np.nextafter(result, np.zeros_like(result))
        return interpreter.TensorHandle(np.where(x.data == np.floor(x.data), result, below), x.dtype.scalar)

    def exp(self, x):
        return exp2(self, interpreter.TensorHandle(x.data * np.float32(1.4426950408889634), x.dtype.scalar))

    monkeypatch.setattr(builder, "create_exp", exp)
    monkeypatch.setattr(builder, "create_exp2", exp2)


@pytest.mark.usefixtures("rough_exponential")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scales": FINE},
        {"scales": 0.0, "weights": 1.0},
        {"values": 30.0},
        {"scales": 100.0, "keys": 100.0, "weights": 1.0},
    ],
)
def test_a_step_is_right_to_a_few_roundings_of_its_results(options):
    inputs = random_inputs(0, **options)
    y, mean, weight = errors(inputs)
    for error in (y, mean, weight):
        assert error.abs().max() <= 6e-7  # of an exponential, or a division, 2^-22, and some roundings of 2^-24


@pytest.mark.usefixtures("rough_exponential")
@pytest.mark.parametrize("scale", [0.0, FINE])
def test_what_a_step_rounds_does_not_add_up(scale):
    # What it adds beside -w to the logarithm of every weight, the next step adds again. No token adds anything.
    w = uniform(0, -4.8, -2, 16).exp()
    den = uniform(1, 0, 1, 512, 16).exp()
    scale = uniform(2, -scale, scale, 16).expand(512, 16).contiguous()
    absent = torch.full_like(den, -torch.inf)
    *_, weight = errors((w, w, absent, den, den, den, scale))
    assert (weight.mean(0).abs() <= 3e-7 * w + 4e-9).all()  # 512 errors of 3e-8 and less


def test_scale_comes_near_zero_where_sums_allow_it():
    w, u, k, v, num, den, scale = random_inputs(0, scales=55.0, keys=100.0)
    sign = torch.where(torch.arange(C) % 2 == 0, -1.0, 1.0)
    inputs = w, u, k, v * sign, num * sign, den, scale
    *_, log_weight = exact(*inputs)
    _, num, den, scale = step(*inputs)
    allowed = (log_weight.abs() < 69) & (scale + num.abs().log() < 69) & (scale.abs() < 64)  # 1e30 is e^69.08
    assert allowed.sum() > 2000
    assert (scale[allowed].abs() <= FINE).all()
    assert ((den > 1e-30) & (den < 1e30) & (num.abs() < 1e30))[scale.abs() <= FINE].all()


@pytest.mark.usefixtures("rough_exponential")
def test_scale_near_zero_stays_whatever_the_token():
    # Then num and den change by what the token brings, and are not rounded for anything else.
    _, u, k, v, num, den, scale = random_inputs(0, scales=FINE / 2, weights=1.0)
    w = uniform(9, 1e-6, 1e-3, C)
    *_, scale_after = step(w, u, k, -v, num, den, scale)
    assert scale_after.equal(scale - w)
    _, num_after, den_after, _ = step(w, u, torch.full_like(k, -torch.inf), v, num, den, scale)
    assert num_after.equal(num)
    assert den_after.equal(den)


def test_large_values_of_either_sign_do_not_overflow():
    w, u, k, v, num, den, scale = random_inputs(0)
    for sign in (-1, 1):
        y, num_after, den_after, _ = step(w, u, k, v * sign * 1e12, num, den, scale)
        assert y.isfinite().all()
        assert (num_after.isfinite() & den_after.isfinite()).all()


@pytest.mark.parametrize("rate", [3e38, 1e35, -1e35, -3e38])
def test_a_step_takes_any_finite_rate(rate):
    w, u, k, v, num, den, scale = random_inputs(0, scales=1.0, keys=5.0, weights=1.0)
    y, num_after, den_after, scale_after = step(torch.full_like(w, rate), u, k, v, num, den, scale)
    wanted_y, *_ = exact(w, u, k, v, num, den, scale)
    torch.testing.assert_close(y.double(), wanted_y, rtol=5e-7, atol=0)
    mean = v if rate > 0 else num / den
    torch.testing.assert_close(num_after / den_after, mean, rtol=3e-7, atol=0)
    assert scale_after.isfinite().all()


def test_a_step_takes_a_scale_that_has_no_digits_for_the_rate():
    w, u, k, v, num, den, scale = random_inputs(0, scales=1.0, weights=1.0)
    y, num_after, den_after, _ = step(w * 10, u, k, v, num, den, scale + 1e10)
    torch.testing.assert_close(y, num / den, rtol=5e-7, atol=0)
    torch.testing.assert_close(num_after / den_after, num / den, rtol=3e-7, atol=0)


@pytest.mark.parametrize("rate", [1.0, -3e38])
@pytest.mark.parametrize("scale", [-torch.inf, -3.4e38])
@pytest.mark.parametrize("sums", [0.0, 1.0])
def test_absent_tokens_leave_an_empty_state_empty(scale, sums, rate):
    ones, absent = torch.ones(1, 3), torch.full((1, 3), -torch.inf)
    y, num, den, after = step(rate * ones[0], ones[0], absent, ones, sums * ones, sums * ones, scale * ones)
    torch.testing.assert_close(y, ones if sums and scale > -torch.inf else 0 * ones, rtol=3e-7, atol=0)
    assert num.equal(0 * ones)
    assert den.equal(0 * ones)
    assert after.equal(absent)
