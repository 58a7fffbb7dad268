"""The kernels of a token of RWKV-4 beside its matrix products, each against its formula."""

import pytest
import torch
from guarded import GuardedMemory
from implementations import Implementation
from torch.nn import functional as F

from fastwkv import WKVState, wkv_step

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of the largest value: one rounding of each result, and some of sums.
BOUNDS = {torch.float32: 3e-7, torch.float64: 1e-15, torch.bfloat16: 4e-3, torch.float16: 5e-4}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def context():
    with Implementation("triton") as context:
        yield context


def draw(context, dtype, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(context.device, dtype) for shape in shapes]


def assert_near(found, wanted, dtype, factor=1.0):
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= factor * BOUNDS[dtype]


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 20), (2, 64), (1, 2560)])
@pytest.mark.parametrize("count", [2, 3])
def test_normalised_and_mixed_with_what_was_before(context, count, shape, dtype):
    x, before, weight, bias, *mixes = draw(context, dtype, shape, shape, *[shape[1:]] * (2 + count))
    mixes[0], mixes[1] = torch.zeros_like(mixes[0]), torch.ones_like(mixes[1])  # and one beyond both ends
    y = F.layer_norm(x.double(), shape[1:], weight.double(), bias.double(), 1e-3)
    old = before.clone()
    mixed = context.launcher("norm_mix_")(x, weight, bias, 1e-3, before, mixes)
    assert_near(before, y, dtype)
    y = before.double()  # the mixtures are of what is kept
    assert mixed.shape == (count, *shape)
    assert torch.equal(mixed[0], old)
    assert torch.equal(mixed[1], before)
    for found, mix in zip(mixed, mixes, strict=True):
        assert_near(found, torch.lerp(old.double(), y, mix.double()), dtype, 2)


def test_small_deviations_from_a_large_mean_are_kept(context):
    (noise,) = draw(context, torch.float64, (2, 96))
    x = (1000 + noise).float()
    one, zero = torch.ones(96).to(x), torch.zeros(96).to(x)
    before = torch.zeros_like(x)
    context.launcher("norm_mix_")(x, one, zero, 1e-5, before, [one, one])
    torch.testing.assert_close(before.double(), F.layer_norm(x.double(), (96,)), rtol=0, atol=1e-4)  # of the mean
    x = (1e-4 * noise).double()  # as fresh embeddings are: what is added to their variance is as large
    before = torch.zeros_like(x)
    context.launcher("norm_mix_")(x, one.double(), zero.double(), 1e-8, before, [one.double()] * 2)
    torch.testing.assert_close(before, F.layer_norm(x, (96,), eps=1e-8), rtol=1e-13, atol=1e-13)


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (2, 20), (3, 128)])
def test_step_of_wkv_is_gated_and_moves_its_state(context, shape, dtype):
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    k, v, r = draw(context, dtype, shape, shape, shape)
    w, u, num, den, top = draw(context, sums, shape[1:], shape[1:], shape, shape, shape, seed=1)
    w, den = w.exp(), den.abs() + 0.1
    y, state = wkv_step(w, u, k, v, WKVState(num, den, top))
    exact, _ = wkv_step(*(t.double() for t in (w, u, k, v)), WKVState(num.double(), den.double(), top.double()))
    found = context.launcher("wkv_step_gated_")(w, u, k, v, r, num, den, top)
    assert found.dtype == y.dtype
    assert_near(found, exact * torch.sigmoid(r.double()), dtype, 2)
    for field, wanted in zip((num, den, top), state, strict=True):
        assert torch.equal(field, wanted)


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (1, 256)])
def test_squared_where_positive(context, shape, dtype):
    (x,) = draw(context, dtype, shape)
    wanted = x.double().relu().square()
    assert context.launcher("relu_squared_")(x) is None
    torch.testing.assert_close(x, wanted.to(dtype), rtol=0, atol=0)


@every_dtype
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (1, 256)])
def test_added_behind_a_gate(context, shape, factor, dtype):
    x, r, y = draw(context, dtype, shape, shape, shape)
    wanted = x.double() + factor * torch.sigmoid(r.double()) * y.double()
    assert context.launcher("add_gated_")(x, r, y, factor) is None
    assert_near(x, wanted, dtype)


def test_gates_are_closed_and_open_at_infinity_and_nan_stays(context):
    x = torch.zeros(1, 6).to(context.device)
    r = torch.tensor([[-1000.0, 1000.0, -torch.inf, torch.inf, torch.nan, 0.0]]).to(context.device)
    context.launcher("add_gated_")(x, r, torch.full_like(x, 3.0), 1.0)
    wanted = torch.tensor([[0.0, 3.0, 0.0, 3.0, torch.nan, 1.5]]).to(context.device)
    torch.testing.assert_close(x, wanted, rtol=0, atol=0, equal_nan=True)
    context.launcher("relu_squared_")(x)
    torch.testing.assert_close(x, wanted.square(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 43), (2, 128)])
def test_memory_beside_tensors_is_neither_read_nor_written(context, shape, dtype):
    C = shape[1]
    x, r, k, v, before, *rows = draw(context, dtype, *[shape] * 5, *[(C,)] * 5)
    w, u, num, den, top = draw(context, torch.float32, (C,), (C,), shape, shape, shape)

    def run(place):
        old, mixed_into = place(x), place(before)
        weight, bias, *mixes = map(place, rows)
        results = [context.launcher("norm_mix_")(old, weight, bias, 1e-5, mixed_into, mixes), mixed_into]
        state = [place(t) for t in (num, den.abs() + 1, top)]
        tokens = map(place, (w, u, k, v, r))
        results += [context.launcher("wkv_step_gated_")(*tokens, *state), *state]
        context.launcher("add_gated_")(old, place(r), place(k), 0.5)
        squared = place(v)
        context.launcher("relu_squared_")(squared)
        return [*results, old, squared]

    plain = run(torch.clone)
    with GuardedMemory() as memory:
        guarded = run(memory.guarded)
        memory.check()
    for found, wanted in zip(guarded, plain, strict=True):
        assert not found.isnan().any()
        assert torch.equal(found, wanted)
