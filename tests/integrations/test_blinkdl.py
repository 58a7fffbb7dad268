"""The operator of BlinkDL's training code: in place of its function, and in place of the extension it compiles."""

import pytest
import torch
from comparison import Results, assert_close, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import cpp_extension
from wkv_cases import DTYPES, ORDINARY

from fastwkv import reference
from fastwkv.integrations.blinkdl import RUN_CUDA, install, uninstall, wkv_cuda

# Measured, of the bounds in ORDINARY: float32 y 6e-8, gradients 9e-7 (gw); bfloat16 2e-3 and 3e-3; float64 2e-15.
# Where the extension rounds a row of gw and gu to bfloat16, rows may cancel in the sum that follows: measured 7e-3.
ROUNDED_ROWS = {"w": 2e-2, "u": 2e-2}
NAMES = ("w", "u", "k", "v")
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 40), st.sampled_from((1, 2, 5, 17, 33)))
MANY = settings(max_examples=40)


@pytest.fixture
def installed():
    install()
    yield
    uninstall()


def training_code(dtype, *, hands_in_y=True):
    """What stands around the extension in a training script, compiled for texts of 8 tokens, with k of ``dtype``."""
    version = "_bf16" if dtype == torch.bfloat16 else ""
    sources = [f"cuda/wkv_op{version}.cpp", f"cuda/wkv_cuda{version}.cu"]
    extension = cpp_extension.load(
        name=f"wkv_8{version}", sources=sources, verbose=True, extra_cuda_cflags=["--use_fast_math", "-DTmax=8"]
    )

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, B, T, C, time_decay, time_first, k, v):
            rate = time_decay.to(torch.promote_types(dtype, torch.float32)).exp().neg()
            inputs = (rate, *(t.to(dtype).contiguous() for t in (time_first, k, v)))
            y = torch.empty(B, T, C, dtype=dtype, device=k.device)
            assert extension.forward(B, T, C, *inputs, y) is None
            ctx.sizes = B, T, C
            ctx.save_for_backward(*inputs, y)
            return y

        @staticmethod
        def backward(ctx, gy):
            B, T, C = ctx.sizes
            *inputs, y = ctx.saved_tensors
            gw, gu = torch.empty(2, B, C, dtype=dtype, device=gy.device)
            gk, gv = torch.empty(2, B, T, C, dtype=dtype, device=gy.device)
            given = (y, gy.contiguous()) if hands_in_y else (gy.contiguous(),)
            assert extension.backward(B, T, C, *inputs, *given, gw, gu, gk, gv) is None
            return None, None, None, gw.sum(0), gu.sum(0), gk, gv

    return Operator.apply


def draw(B, T, C, dtype=torch.float32, seed=0, device="cpu", vectors=None):
    """Return time_decay, time_first, k, v, gy; the first two of the dtype ``vectors``. Rates are from 0.007 to 20."""
    generator = torch.Generator().manual_seed(seed)
    time_decay = -5 + 8 * torch.rand(C, generator=generator, dtype=torch.float64)
    time_first = torch.randn(C, generator=generator, dtype=torch.float64)
    tokens = torch.randn(3, B, T, C, generator=generator, dtype=torch.float64)
    return *(t.to(device, vectors or dtype) for t in (time_decay, time_first)), *tokens.to(device, dtype)


def run(function, w, u, k, v, gy):
    leaves = [t.clone().requires_grad_() for t in (w, u, k, v)]
    y = function(*k.shape, *leaves)
    gradients = torch.autograd.grad(y, leaves, gy.to(y.dtype))
    return Results(y, {}, dict(zip(NAMES, gradients, strict=True)))


def expected(*inputs, function=reference.wkv):
    """The definition in float64."""
    return run(lambda B, T, C, w, u, k, v: function(w.exp(), u, k, v), *(t.double().cpu() for t in inputs))


@MANY
@given(SHAPES, st.sampled_from((torch.float32, torch.bfloat16, torch.float64)), st.booleans(), st.integers(0, 99))
def test_training_code_equals_reference_in_values_and_gradients(installed, shape, dtype, hands_in_y, seed):
    inputs = draw(*shape, dtype, seed)
    results = run(training_code(dtype, hands_in_y=hands_in_y), *inputs)
    rows = ROUNDED_ROWS if dtype == torch.bfloat16 else {}
    assert_close(results, expected(*inputs), ORDINARY[dtype], floor=1.0, **rows)


@MANY
@given(SHAPES, st.sampled_from(DTYPES), st.booleans(), st.integers(0, 99))
def test_run_cuda_equals_reference_in_values_and_gradients(shape, dtype, mixed, seed):
    vectors = torch.promote_types(dtype, torch.float32) if mixed else dtype
    inputs = draw(*shape, dtype, seed, vectors=vectors)
    results = run(RUN_CUDA, *inputs)
    assert results.y.dtype == dtype
    assert [g.dtype for g in results.gradients.values()] == [vectors, vectors, dtype, dtype]
    assert_close(results, expected(*inputs), ORDINARY[dtype], floor=1.0)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 9, 3), torch.bfloat16), ((2, 9, 1), torch.float32), ((3, 18, 5), torch.bfloat16)]
)
def test_both_equal_reference_on_every_implementation(implementation, installed, shape, dtype):
    inputs = draw(*shape, dtype, device=implementation.device)
    for function in (training_code(dtype), RUN_CUDA):
        assert_close(run(function, *inputs), expected(*inputs), ORDINARY[dtype], floor=1.0)


def test_text_longer_than_the_extension_was_compiled_for(installed):
    inputs = draw(2, 1500, 6)
    for function in (training_code(torch.float32), RUN_CUDA):
        assert_close(run(function, *inputs), expected(*inputs, function=reference.wkv_loop), ORDINARY[torch.float32])


def test_run_cuda_passes_gradcheck():
    inputs = [t.requires_grad_() for t in draw(2, 5, 3, torch.float64)[:4]]
    assert torch.autograd.gradcheck(lambda *leaves: RUN_CUDA(2, 5, 3, *leaves), inputs)


def test_run_cuda_takes_strided_keys_and_values():
    w, u, k, v, _ = draw(3, 7, 5)
    strided = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (k, v)]
    assert torch.equal(RUN_CUDA(3, 7, 5, w, u, *strided), RUN_CUDA(3, 7, 5, w, u, k, v))


def test_run_cuda_compiles_to_one_graph():
    torch._dynamo.reset()
    inputs = draw(2, 6, 3)
    compiled = torch.compile(RUN_CUDA, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, *inputs), run(RUN_CUDA, *inputs), (0.0, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rate_of_a_half_precision_parameter_is_computed_in_float32(dtype):
    w, u, k, v, _ = draw(2, 30, 8, vectors=dtype)
    y = RUN_CUDA(2, 30, 8, w.float(), u.float(), k, v)
    assert torch.equal(RUN_CUDA(2, 30, 8, w, u, k, v), y)


def backward(w, u, k, v, gy, dtype=None):
    """Return what the extension writes: gw and gu, in ``dtype``, gk and gv."""
    B, T, C = k.shape
    gw, gu = torch.empty(2, B, C, dtype=dtype or k.dtype)
    gk, gv = torch.empty(2, B, T, C, dtype=k.dtype)
    wkv_cuda.backward(B, T, C, w, u, k, v, torch.empty_like(k), gy, gw, gu, gk, gv)
    return gw, gu, gk, gv


def test_extension_gives_each_row_the_gradient_of_its_own_sequence():
    time_decay, u, k, v, gy = draw(4, 9, 5, torch.float64)
    w = -time_decay.exp()
    together = backward(w, u, k, v, gy)
    for row in range(4):
        alone = backward(w, u, *(t[row : row + 1] for t in (k, v, gy)))
        for gradient, wanted in zip(together, alone, strict=True):
            assert relative_error(gradient[row], wanted[0]) < 1e-14  # measured: 0


def test_extension_rounds_gradients_once_a_row():
    time_decay, u, k, v, gy = draw(3, 50, 7, torch.bfloat16)
    w = -time_decay.float().exp()
    exact, rounded = backward(w, u, k, v, gy, torch.float32), backward(w, u, k, v, gy)
    for wide, narrow in zip(exact, rounded, strict=True):
        assert narrow.dtype == torch.bfloat16
        assert torch.equal(wide.bfloat16(), narrow)


def test_extension_computes_with_w_and_u_of_any_dtype_in_float32():
    time_decay, u, k, v, gy = draw(2, 9, 5, vectors=torch.bfloat16)
    w = -time_decay.exp()
    y, wanted = torch.empty(2, 2, 9, 5)
    wkv_cuda.forward(2, 9, 5, w, u, k, v, y)
    wkv_cuda.forward(2, 9, 5, w.float(), u.float(), k, v, wanted)
    assert torch.equal(y, wanted)
    for gradient, wanted in zip(backward(w, u, k, v, gy), backward(w.float(), u.float(), k, v, gy), strict=True):
        assert torch.equal(gradient, wanted)


def train(function, steps=60):
    """Losses of a small layer that learns what another one computes, from texts of 20 tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 8, generator=generator)

    def layer():
        vectors = torch.randn(2, 8, generator=generator).unbind()
        matrices = (torch.randn(2, 8, 8, generator=generator) / 8**0.5).unbind()
        return [t.clone().requires_grad_() for t in (*vectors, *matrices)]

    def forward(time_decay, time_first, key, value):
        return function(3, 20, 8, time_decay, time_first, x @ key, x @ value)

    target, student, losses = forward(*layer()).detach(), layer(), []
    optimizer = torch.optim.Adam(student, lr=3e-2)
    for _ in range(steps):
        loss = (forward(*student) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_layer_trains_the_same_through_both(installed):
    through_extension, through_function = train(training_code(torch.float32)), train(RUN_CUDA)
    assert through_extension[-1] < 0.1 * through_extension[0]
    assert through_function == pytest.approx(through_extension, rel=1e-4)
